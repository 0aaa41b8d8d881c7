"""Losses of a model without some of its parts, a block at a time, against the whole model with hooks."""

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from leanmill.models.config import ModelConfig
from leanmill.trainer.passes.calibrated import Calibrated
from leanmill.trainer.passes.folder import SourceFolder
from tests.trainer.passes.test_run import save_model


def without(model, rows, parts):
    handles = []
    for layer, part in parts:
        block = model.model.layers[layer]
        if part == "block":
            handles.append(block.register_forward_hook(lambda _, args, output: args[0]))
        elif part == "attention":
            handles.append(block.self_attn.register_forward_hook(lambda _, args, output: (output[0] * 0, *output[1:])))
        else:
            handles.append(block.mlp.register_forward_hook(lambda _, args, output: output * 0))
    total = 0.0
    with torch.no_grad():
        for batch in rows:
            logits = model(**batch, use_cache=False).logits[:, :-1]
            total += float(F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="sum"))
    for handle in handles:
        handle.remove()
    return total / sum(batch["input_ids"][:, 1:].numel() for batch in rows)


def test_losses_without_parts(tmp_path):
    skipped = [frozenset(), frozenset({(1, "block")}), frozenset({(0, "attention"), (2, "mlp")})]
    skipped += [frozenset({(2, "mlp")}), frozenset({(0, "attention"), (0, "mlp"), (1, "block")})]
    skipped += [frozenset({(layer, part)}) for layer in range(3) for part in ("attention", "mlp")]
    for family, tied in [("llama", True), ("gemma2", False), ("mixtral", False)]:
        changes = {"num_local_experts": 2, "num_experts_per_tok": 1} if family == "mixtral" else {"head_dim": 16}
        folder = tmp_path / family
        model = save_model(folder, family, tie_word_embeddings=tied, initializer_range=0.5, **changes)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        shapes = [(3, 12), (2, 12)]
        torch.manual_seed(0)
        rows = [
            {"input_ids": torch.randint(0, 300, shape), "position_ids": torch.arange(12).expand(shape)}
            for shape in shapes
        ]
        config = ModelConfig(path=str(folder), attention="eager")
        calibrated = Calibrated(SourceFolder(folder), config, rows, device=torch.device("cpu"), dtype=torch.float32)
        got = calibrated.without(skipped)
        want = [without(model, rows, parts) for parts in skipped]
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-5)
        assert len(set(want)) > 8
