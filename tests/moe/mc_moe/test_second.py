"""Second experts left out at inference, against plain code on what routers and attention of the same forward saw."""

from __future__ import annotations

import json

import pytest
import torch

from leanmill.cli.main import main
from leanmill.core.errors import ConfigError
from leanmill.core.places import find_modules
from leanmill.core.registry import parse_pass
from leanmill.moe.mc_moe.second import LeaveOutSecond, leave_out_second
from leanmill.moe.mc_moe.solver import median_ratio
from leanmill.trainer.inference import load_for_inference
from leanmill.trainer.passes.run import compress
from tests.core.tiny import VOCAB_SIZE, tiny, tokens
from tests.moe.mc_moe.test_mc_moe import MC, layer_of, save
from tests.trainer.passes.test_run import WANDA, recipe, text, tokenizer  # noqa: F401  (fixtures)


def spread(family="mixtral", **changes):
    model = tiny(family, **changes).eval()
    for _, _, router in find_modules(model, "router"):
        router.weight.data.mul_(20)
    return model


def forward(model, ids, **more):
    """Logits, and of each layer what its router saw, its attention maps, and the experts and weights it gave."""
    seen, handles = [{} for _ in range(2)], []
    for index, block in enumerate(model.model.layers):
        own = seen[index]
        handles += [
            block.self_attn.register_forward_hook(lambda *a, own=own: own.update(maps=a[-1][1])),
            block.mlp.gate.register_forward_pre_hook(lambda _, args, own=own: own.update(hidden=args[0])),
            block.mlp.experts.register_forward_pre_hook(lambda _, args, own=own: own.update(sent=args[1:3])),
        ]
    with torch.no_grad():
        logits = model(input_ids=ids, **more).logits
    for handle in handles:
        handle.remove()
    return logits, seen


@torch.no_grad()
def by_hand(router, own, threshold, share, normalise):
    """Experts [T, 2] and weights [T, 2], token by token."""
    maps, hidden = own["maps"], own["hidden"].view(own["maps"].shape[0], own["maps"].shape[2], -1)
    rows, length = hidden.shape[:2]
    experts, weights = [], []
    for row in range(rows):
        importance = []
        for j in range(length):
            attention = sum(maps[row, :, i, j].mean() for i in range(j, length)) / (length - j)
            importance.append(hidden[row, j].abs().sum() * attention)
        ranked = sorted(range(length), key=lambda j: -importance[j])
        protected = set(ranked[: int(share * length)]) if length > 1 else set()
        for j in range(length):
            chosen = (router.weight @ hidden[row, j]).softmax(-1).topk(2)
            (first, second), (one, two) = chosen.values, chosen.indices
            if second < threshold * first and j not in protected:
                experts.append([one, router.weight.shape[0]])
                weights.append([torch.ones(()) if normalise else first, torch.zeros(())])
            else:
                total = first + second if normalise else 1.0
                experts.append([one, two])
                weights.append([first / total, second / total])
    return torch.tensor(experts), torch.tensor(weights)


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_experts_and_weights_by_hand(family, share):
    model = spread(family)
    plain = model(tokens()).logits
    thresholds = {0: 0.5, 1: 0.8}
    probe = leave_out_second(model, thresholds, protected_share=share)
    logits, seen = forward(model, tokens())
    left_out = []
    for layer, own in enumerate(seen):
        if share == 0:
            own["maps"] = torch.ones(2, 1, 13, 13)
        router = model.model.layers[layer].mlp.gate
        experts, weights = by_hand(router, own, thresholds[layer], share, normalise=family == "mixtral")
        assert torch.equal(own["sent"][0], experts), "expert 4 of 4 is nobody, and costs nothing"
        torch.testing.assert_close(own["sent"][1], weights, rtol=1e-5, atol=1e-6)
        left_out.append((experts == 4).float().mean().item() * 2)
    assert 0 < left_out[0] < 1
    assert not torch.allclose(logits, plain, atol=1e-3)
    found = probe.find({"a": probe.take()}).metrics
    assert [found["second_left_out/0"], found["second_left_out/1"]] == pytest.approx(left_out)
    assert found["second_left_out"] == pytest.approx(sum(left_out) / 2)


def test_nothing_is_left_out_below_no_threshold_of_protected_tokens_or_in_training():
    plain = spread()(tokens()).logits
    for thresholds, share in (({0: 0.0, 1: 0.0}, 0.0), ({0: 2.0, 1: 2.0}, 1.0)):
        model = spread()
        leave_out_second(model, thresholds, protected_share=share)
        torch.testing.assert_close(model(tokens()).logits, plain, rtol=1e-4, atol=1e-5)
    option = LeaveOutSecond(2.0, 0.0, normalise=True).train()
    assert option.on_routing("whatever") == "whatever"


def test_tokens_that_only_stand_in_are_not_counted():
    model = spread()
    probe = leave_out_second(model, {0: 2.0, 1: 0.0}, protected_share=0.0)
    labels = tokens()
    labels[1] = -100
    probe.begin({"labels": labels})
    model(tokens())
    assert probe.take().tolist() == [13, 13, 0, 13]
    assert probe.take().tolist() == [0, 0, 0, 0]


def test_it_generates_token_by_token_as_at_once():
    """Without protection a token's experts do not depend on what comes with it; with it, only those of prompts do."""
    model = spread(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    leave_out_second(model, {0: 0.7, 1: 0.7}, protected_share=0.0)
    prompt = tokens(1, 6)
    made = model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=True)
    for end in range(6, 10):
        assert model(made[:, :end]).logits[0, -1].argmax() == made[0, end]
    protected = spread(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    probe = leave_out_second(protected, {0: 2.0, 1: 2.0}, protected_share=0.34)
    protected.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=True)
    assert probe.take().tolist() == [4 + 3, 9, 4 + 3, 9], "2 of 6 tokens of the prompt keep both, no later one does"


def test_attention_without_maps_is_refused():
    model = spread()
    leave_out_second(model, {0: 0.5}, protected_share=0.5)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match="set_attn_implementation"):
        model(tokens())
    with pytest.raises(ConfigError, match="layer 7 has no router"):
        leave_out_second(spread(), {7: 0.5}, protected_share=0.0)


def test_the_threshold_is_the_median():
    layer, _ = layer_of()
    wanted = (layer.weights.amin(-1) / layer.weights.amax(-1)).median()
    assert median_ratio(layer) == pytest.approx(wanted.item(), abs=1 / 4096)


def told_in(capsys):
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])  # libraries may have had something to say before


def test_a_folder_says_so_and_is_evaluated_so(text, tokenizer, tmp_path, capsys):  # noqa: F811
    save(tmp_path / "in", "mixtral")
    tokenizer.save_pretrained(tmp_path / "in")
    told = MC | {"leaves_out_second": True, "protected_share": 0.2}
    reports = compress(recipe(tmp_path / "in", text, tmp_path, told), tmp_path / "out")
    (entry,) = json.loads((tmp_path / "out" / "leanmill.json").read_text())["inference"]
    assert entry["pass"]["protected_share"] == 0.2
    assert entry["layers"].keys() == {"0", "1"}
    assert f"second expert left out below {entry['layers']['0']['threshold']:.3f} of the first" in str(reports[0])
    # A later pass, which sees the model without it, keeps it.
    later = WANDA | {"targets": ["self_attn.*"]}
    compress(recipe(tmp_path / "out", text, tmp_path, later), tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned" / "leanmill.json").read_text())["inference"] == [entry]
    options = ["data.source.type=hf", f"data.source.path={text}", "data.source.validation_fraction=0.2"]
    options += ["data.sequence_length=16", f"data.cache_dir={tmp_path / 'cache'}", "eval.tokens_per_domain=256"]
    options += ["device=cpu", "train.precision=fp32", "--json"]
    assert main(["eval", "--checkpoint", str(tmp_path / "out"), *options]) == 0
    found = told_in(capsys)
    assert 0.1 < found["metrics"]["mc_moe/second_left_out"] < 0.6
    assert found["step"] is None
    assert main(["eval", "--checkpoint", str(tmp_path / "in"), *options]) == 0
    plain = told_in(capsys)
    assert plain["metrics"] == {}
    assert plain["domains"]["all"]["loss"] != found["domains"]["all"]["loss"]
    assert main(["eval", "--checkpoint", str(tmp_path / "in"), "--routing"]) == 2
    assert "is a model folder" in capsys.readouterr().err
    assert load_for_inference(tmp_path / "pruned").model(tokens() % VOCAB_SIZE).logits.isfinite().all()
    (tmp_path / "out" / "leanmill.json").write_text("[")
    assert main(["eval", "--checkpoint", str(tmp_path / "out"), *options]) == 2
    assert "leanmill.json is damaged" in capsys.readouterr().err


def test_requests_that_do_not_fit():
    from transformers import AutoConfig

    config = AutoConfig.for_model("mixtral", hidden_size=32, intermediate_size=32, num_local_experts=8)
    config.num_experts_per_tok = 3
    with pytest.raises(ConfigError, match="two experts a token, and this model has 3"):
        parse_pass(MC | {"leaves_out_second": True}).solver().check(config)
    with pytest.raises(ValueError, match="set leaves_out_second: true"):
        parse_pass(MC | {"protected_share": 0.1})
