"""WeLore's ranks against its rule in plain code, pairs against truncated weights, and what trains."""

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_pass
from leanmill.export import export_model
from leanmill.peft_ext.welore.ranks import pair_ranks, threshold_for
from leanmill.trainer.passes.foresight import after_passes
from leanmill.trainer.passes.run import compress
from tests.core.tiny import install, tiny
from tests.export.checkpoints import recipe_of as checkpoint_recipe
from tests.export.checkpoints import save as save_checkpoint
from tests.export.checkpoints import trained_model
from tests.sparse.minitron.test_minitron import load, rows_of, save
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


def spectra_of(model):
    return {
        name.removesuffix(".weight"): torch.linalg.svdvals(parameter.detach().float())
        for name, parameter in model.named_parameters()
        if "_proj.weight" in name
    }


def ranks_by_hand(spectra, threshold, least):
    """The authors' adaptive_rank_pruning and do_rank_reduction."""
    ranks = {}
    for name, values in spectra.items():
        scaled = [(float(v) - float(values.min())) / (float(values.max()) - float(values.min())) for v in values]
        pruned = sum(v < threshold for v in scaled)
        ranks[name] = len(scaled) - pruned if pruned / len(scaled) > least else 0
    return ranks


@pytest.mark.parametrize("reduction", [0.3, 0.5, 0.7])
def test_one_threshold_takes_the_share_that_was_asked_for(reduction):
    generator = torch.Generator().manual_seed(0)
    spectra = {
        str(number): torch.rand(20, generator=generator).sort(descending=True).values ** (0.5 + number / 2)
        for number in range(6)
    }
    low, high = 0.0, 1.0
    for _ in range(60):  # bisection, as by hand
        middle = (low + high) / 2
        ranks = ranks_by_hand(spectra, middle, -1)
        share = 1 - sum(ranks.values()) / (6 * 20)
        low, high = (middle, high) if share < reduction else (low, middle)
    wanted = ranks_by_hand(spectra, high, 0.3)
    assert pair_ranks(spectra, reduction, 0.3) == wanted
    assert len(set(wanted.values())) > 2, "ranks differ from weight to weight"
    found = [(s - s.min()) / (s.max() - s.min()) for s in spectra.values()]
    assert (torch.cat(found) < threshold_for(found, reduction)).float().mean() == pytest.approx(reduction, abs=1 / 120)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_pairs_compute_what_truncated_weights_do(text, tokenizer, tmp_path, family):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, family, num_hidden_layers=2)
    with torch.no_grad():  # some are nearly of low rank
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "1.mlp.up_proj.weight")):
                left, values, right = torch.linalg.svd(parameter, full_matrices=False)
                values = values * 0.7 ** torch.arange(len(values))
                parameter.copy_(left @ values.diag() @ right)
    model.save_pretrained(tmp_path / "in")
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "welore", "rank_reduction": 0.4})
    report = compress(config, tmp_path / "out")
    small, rows = load(tmp_path / "out"), rows_of(config, tokenizer)
    ranks = pair_ranks(spectra_of(model), 0.4, 0.5)
    assert 0 < sum(rank > 0 for rank in ranks.values()) < len(ranks)
    assert f"{sum(rank > 0 for rank in ranks.values())} of {len(ranks)} weights are pairs" in str(report)
    with torch.no_grad():
        for name, rank in ranks.items():
            if rank:
                parameter = model.get_parameter(f"{name}.weight")
                pair = small.get_submodule(name)
                assert pair.down.weight.shape == (rank, parameter.shape[1])
                left, values, right = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_(left[:, :rank] @ values[:rank].diag() @ right[:rank])
                torch.testing.assert_close(pair.up.weight @ pair.down.weight, parameter, rtol=1e-5, atol=1e-5)
                # Singular values are shared out evenly between the two.
                torch.testing.assert_close(
                    pair.up.weight.norm(dim=0), pair.down.weight.norm(dim=1), rtol=1e-4, atol=1e-4
                )
        want, got = model(**rows, use_cache=False).logits, small(**rows, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert small.num_parameters() < model.num_parameters()


def test_pairs_and_norms_train_and_nothing_else():
    ranks = {"self_attn.q_proj": [4, 0], "mlp.down_proj": [0, 3]}
    recipe = checkpoint_recipe("llama", [{"type": "welore"}], model_type="pruned_llama", rank_by_linear=ranks)
    model = trained_model(recipe)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    pairs = {
        f"model.layers.{path}.{part}.weight"
        for path in ("0.self_attn.q_proj", "1.mlp.down_proj")
        for part in ("up", "down")
    }
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert trained == pairs | norms
    with pytest.raises(ConfigError, match="this model has none; make some"):
        install(tiny("llama"), {"type": "welore"})


def test_what_is_foreseen_has_the_share_of_ranks_that_was_asked_for(text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", tokenizer, num_hidden_layers=2)
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "welore", "rank_reduction": 0.5})
    foreseen = after_passes(config.model, config.passes, seed=0)
    assert foreseen.config["rank_by_linear"]["self_attn.k_proj"] == [12, 12]
    assert foreseen.config["rank_by_linear"]["mlp.down_proj"] == [24, 24]


def test_an_export_brings_the_code_of_pairs(tmp_path, modules_cache):
    ranks = {"self_attn.q_proj": [4, 0], "mlp.down_proj": [0, 3]}
    recipe = checkpoint_recipe("llama", [{"type": "welore"}], model_type="pruned_llama", rank_by_linear=ranks)
    model = trained_model(recipe)
    report = export_model(save_checkpoint(model, recipe, tmp_path / "run"), tmp_path / "out", to="hf_code")
    assert report.max_difference < 1e-4
    assert (tmp_path / "out" / "modeling_pruned_llama.py").is_file()


def test_what_cannot_be_is_refused(text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", tokenizer, num_hidden_layers=2)
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "welore", "rank_reduction": 0.02})
    with pytest.raises(ConfigError, match="raise rank_reduction, or lower least_reduction"):
        compress(config, tmp_path / "none")
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "welore", "rank_reduction": 0.6})
    compress(config, tmp_path / "out")
    pairs = config.model.model_copy(update={"path": str(tmp_path / "out")})
    with pytest.raises(ConfigError, match="pairs already"):
        after_passes(pairs, [parse_pass({"type": "welore", "rank_reduction": 0.5})], seed=0)
    with pytest.raises(ConfigError, match="run it before the pass welore"):
        after_passes(pairs, [parse_pass({"type": "remove_zeros"})], seed=0)
