"""transformers' Trainer with our callback: the weights of our Trainer, plain folders, exact resumes, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import leanmill
from leanmill.core.errors import ConfigError, RunError
from leanmill.integrations import LeanmillCallback
from leanmill.integrations.callback import check_engine, check_trainer
from leanmill.trainer.loss_paths import FromLogits
from tests.integrations.setting import LR, NUM_STEPS, Rows, llama, ours, trainer_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    llama().save_pretrained(folder / "model")
    llama(3).save_pretrained(folder / "teacher")
    return folder


def given(folders, techniques):
    return [{k: str(folders / "teacher") if v == "TEACHER" else v for k, v in one.items()} for one in techniques]


SCALED = [{"type": "lsq"}, {"type": "distill", "teacher": "TEACHER"}]
PRUNED = [{"type": "nm_sparsity", "decay": 1e-3}, {"type": "distill", "teacher": "TEACHER"}]


def close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            found[name].detach().float(), weight.float(), rtol=tolerance, atol=tolerance, msg=name
        )


def test_weights_after_20_steps_are_those_of_our_trainer_and_what_is_saved_is_plain(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    model = llama()
    leanmill.attach(model, given(folders, PRUNED))
    trainer = trainer_of(model, tmp_path, clips_late=True)
    trainer.train()
    close(dict(model.named_parameters()), ours(folders / "model", given(folders, PRUNED)))
    record = next(one for one in trainer.state.log_history if "loss" in one)
    assert record["distill"] > 0
    assert record["cross_entropy"] == pytest.approx(4.1, abs=0.3)
    trainer.save_model(tmp_path / "final")
    plain, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "final"), Rows(1).ids[:2]
    assert plain.state_dict().keys() == llama().state_dict().keys()
    kept = (plain.model.layers[0].mlp.up_proj.weight.unflatten(-1, (-1, 4)) != 0).sum(-1)
    assert kept.max() <= 2
    torch.testing.assert_close(plain(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "techniques",
    [
        [{"type": "lsq"}],
        [{"type": "ternary"}, {"type": "distill", "teacher": "TEACHER"}],
        [{"type": "hidden_distill", "teacher": "TEACHER"}, {"type": "lora"}],
        [{"type": "gradual_pruning", "sparsity": 0.5}],
        [{"type": "peft", "method": "vera"}],
        [{"type": "stochastic_depth"}, {"type": "neftune"}],
    ],
    ids=lambda techniques: "-".join(one["type"] for one in techniques),
)
def test_other_mechanisms_train_the_same_weights(folders, tmp_path, techniques):
    model = llama()
    attached = leanmill.attach(model, given(folders, techniques))
    from leanmill.integrations.refusals import writes_gradients

    late = bool(writes_gradients(attached.installed.step_rules))
    trainer_of(model, tmp_path, clips_late=late).train()
    close(dict(model.named_parameters()), ours(folders / "model", given(folders, techniques)))


@pytest.mark.parametrize("num_steps", [4, pytest.param(NUM_STEPS, marks=pytest.mark.slow)])
def test_rounded_activations_train_the_same_weights_bitwise_where_sums_are_taken_in_one_order(
    folders, tmp_path, monkeypatch, num_steps
):
    """A level of an activation changes with the last bit of a sum, and with it all that follows."""
    monkeypatch.setattr(
        "leanmill.trainer.train_module.choose_path", lambda model, terms, chunk, **_: FromLogits(model, chunk)
    )
    techniques, model = [{"type": "nm_sparsity"}, {"type": "quest"}], llama()
    leanmill.attach(model, techniques)
    trainer_of(model, tmp_path, num_steps=num_steps, clips_late=True, activations="float").train()
    expected = ours(folders / "model", techniques, num_steps, engine={"type": "single", "staging": "per_use"})
    close(dict(model.named_parameters()), expected, tolerance=0)


def test_the_step_that_ends_an_epoch_has_fewer_micro_batches(tmp_path):
    def trained(**arguments):
        model, found = llama(), []
        attached = leanmill.attach(model, [{"type": "lora"}])
        trainer = trainer_of(model, tmp_path, max_steps=7, save_strategy="steps", save_steps=4, **arguments)
        trainer.train_dataset = trainer.train_dataset[:20]  # five micro-batches
        begin = attached.losses.begin_step
        attached.losses.begin_step = lambda first, number: (found.append((first, number)), begin(first, number))
        return trainer, found

    trainer, found = trained()
    trainer.train()
    assert found == [(2 * step, number) for step, number in enumerate([2, 2, 1, 2, 2, 1, 2])]
    trainer, again = trained()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again == found[4:]
    trainer, anew = trained(ignore_data_skip=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [number for _, number in anew] == [2, 2, 1]


def test_a_resumed_training_is_bitwise_the_one_that_was_not_stopped(folders, tmp_path):
    techniques = [{"type": "gradual_pruning", "sparsity": 0.5}]
    whole = llama()
    leanmill.attach(whole, techniques)
    trainer = trainer_of(whole, tmp_path, num_steps=6, clips_late=True, save_strategy="steps", save_steps=3)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["LeanmillCallback"]["attributes"]["rules"]
    resumed = llama(seed=5)
    leanmill.attach(resumed, techniques)
    trainer = trainer_of(resumed, tmp_path / "again", num_steps=6, clips_late=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    expected = dict(whole.named_parameters())
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    other = llama()
    leanmill.attach(other, [{"type": "nm_sparsity"}])
    trainer = trainer_of(other, tmp_path / "other", num_steps=6)
    with pytest.raises(ConfigError, match="other techniques than are attached"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_settings_under_which_techniques_would_not_do_what_they_say_are_refused(folders, tmp_path):
    def refused(techniques, said, kind=ConfigError, **arguments):
        model = llama()
        leanmill.attach(model, given(folders, techniques))
        trainer = trainer_of(model, tmp_path, num_steps=1, **arguments)
        with pytest.raises(kind, match=said):
            trainer.train()

    pruned = [{"type": "gradual_pruning", "sparsity": 0.5}]
    refused(pruned, r"gradual_pruning works on gradients .* LeanmillCallback\(model, max_grad_norm=0.5\)")
    refused([{"type": "quest"}], r"activations='float'")
    refused([{"type": "ternary"}], "clipped twice", clips_late=True, max_grad_norm=1.0)
    teacher = [{"type": "distill", "teacher": "TEACHER"}]
    refused(teacher, "a loss of its own", RunError, label_smoothing_factor=0.1)
    refused([{"type": "early_ticket", "sparsity": 0.5, "compare_every_steps": 50}], "early_ticket", clips_late=True)
    refused([{"type": "ternary"}], "torch_compile", torch_compile=True)


def test_gradients_that_a_loss_scale_multiplied_are_not_clipped(tmp_path):
    model = llama()
    attached = leanmill.attach(model, [{"type": "ternary"}])
    args = trainer_of(model, tmp_path, clips_late=True).args
    check_trainer(args, model, attached, 0.5)
    args.fp16 = True
    check_trainer(args, model, attached, None)
    with pytest.raises(ConfigError, match="before they are scaled back; set bf16=True"):
        check_trainer(args, model, attached, 0.5)


@pytest.mark.parametrize(
    ("technique", "arguments", "said"),
    [
        ({"type": "layer_metrics"}, {}, "DeepSpeed takes in the last backward, before callbacks are called"),
        ({"type": "gradual_pruning", "sparsity": 0.5}, {}, "reads optimizer state by element, under DeepSpeed"),
        (
            {"type": "ternary"},
            {"parallelism_config": SimpleNamespace(tp_size=1, cp_size=2)},
            "leave it out and take FSDP2",
        ),
    ],
    ids=lambda value: value.get("type", "") if isinstance(value, dict) else "",
)
def test_what_techniques_do_not_follow_of_an_engine_is_refused(technique, arguments, said):
    model = llama()
    attached = leanmill.attach(model, [technique])
    with pytest.raises(ConfigError, match=said):
        check_engine(SimpleNamespace(fsdp=None, **arguments), attached, under_deepspeed=True)
    check_engine(SimpleNamespace(fsdp=None), attached, under_deepspeed=False)
    if technique["type"] == "ternary":
        model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks what it has cut
        with pytest.raises(ConfigError, match=r"set zero_optimization\.stage to 2"):
            check_engine(SimpleNamespace(fsdp=None), attached, under_deepspeed=True)


def test_rates_of_techniques_are_compared_with_the_optimizer_that_was_built_for_them(tmp_path):
    model = llama()
    leanmill.attach(model, [{"type": "lora", "lr_factor": 4.0}])
    # The Trainer's own rate is another one, and rules no optimizer that it was given.
    trainer_of(model, tmp_path, num_steps=1, learning_rate=LR / 8).train()


def test_an_optimizer_that_decays_what_rests_is_refused(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = llama()
    leanmill.attach(model, [{"type": "lsq"}])
    settings = TrainingArguments(
        str(tmp_path), weight_decay=0.1, max_steps=1, use_cpu=True, report_to="none", remove_unused_columns=False
    )
    trainer = Trainer(model, settings, train_dataset=Rows(1).dataset(), callbacks=[LeanmillCallback(model)])
    with pytest.raises(ConfigError, match=r"wants .*stages.* trained otherwise .*attached.optimizer"):
        trainer.train()


RANK = """
import sys, torch, leanmill
from pathlib import Path
from tests.integrations.setting import llama, trainer_of
from tests.integrations.test_callback import PRUNED, given
folder = Path(sys.argv[1])
model = llama()
leanmill.attach(model, given(folder, PRUNED))
trainer = trainer_of(model, folder / "out", clips_late=True)
trainer.train()
trainer.save_model(folder / "final")
if trainer.args.process_index == 0:
    assert trainer.args.world_size == 2
    torch.save(dict(model.named_parameters()), folder / "weights.pt")
"""


DEEPSPEED = """
import sys, torch, leanmill
import torch.distributed as dist
from pathlib import Path
from leanmill.integrations.folded import whole_state
from leanmill.parallel.deepspeed_start import start_deepspeed
from tests.integrations.setting import llama, trainer_of
from tests.integrations.test_callback import SCALED, given
dist.init_process_group("gloo")
start_deepspeed(torch.device("cpu"))
folder = Path(sys.argv[1])
config = {
    "zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "zero_force_ds_cpu_optimizer": False,
}
model = llama()
leanmill.attach(model, given(folder, SCALED))
trainer = trainer_of(model, folder / "out", deepspeed=config)
trainer.train()
trainer.save_model(folder / "final")
weights = whole_state(model)
if trainer.args.process_index == 0:
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine" and trainer.args.world_size == 2
    torch.save(weights, folder / "weights.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "techniques", "tolerance"), [(RANK, PRUNED, 1e-5), (DEEPSPEED, SCALED, 4e-5)], ids=["ddp", "zero2"]
)
def test_two_ranks_train_the_weights_of_one_process(folders, script, techniques, tolerance):
    from transformers import AutoModelForCausalLM

    path = folders / "rank.py"
    path.write_text(script)
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path, folders],
        check=True, timeout=200, cwd=root, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    found = torch.load(folders / "weights.pt", weights_only=False)
    expected = ours(folders / "model", given(folders, techniques), NUM_STEPS)
    close({name: found[name] for name in expected}, expected, tolerance)
    plain = AutoModelForCausalLM.from_pretrained(folders / "final")
    assert plain.state_dict().keys() == llama().state_dict().keys()


@pytest.mark.slow
def test_sft_trainer_trains_the_same_weights_as_transformers(folders, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    class InOrder(trl.SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, "w0")), pad_token="w0", eos_token="w1"
    )
    rows = [{"input_ids": row.tolist()} for row in Rows(4).ids]

    def trainer_with(techniques, sft=True):
        model = llama()
        attached = leanmill.attach(model, techniques)
        trainer = trainer_of(model, tmp_path, num_steps=4)
        trainer.train_dataset = [{"input_ids": row, "labels": row} for row in Rows(4).ids]
        if not sft:
            return trainer
        return InOrder(
            model,
            trl.SFTConfig(**{**trainer.args.to_dict(), "max_length": None}),
            train_dataset=Dataset.from_list(rows),
            processing_class=words,
            optimizers=(attached.optimizer(lr=LR, weight_decay=0.01, eps=1e-6), None),
            callbacks=[LeanmillCallback(model)],
        )

    trainers = [trainer_with([{"type": "ternary"}], sft) for sft in (True, False)]
    for trainer in trainers:
        trainer.train()
    close(*(dict(trainer.model.named_parameters()) for trainer in trainers))
    trainers[0].save_model(tmp_path / "final")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict().keys() == llama().state_dict().keys()
    with pytest.raises(RunError, match="a loss of its own.*SFTTrainer"):
        trainer_with([{"type": "distill", "teacher": str(folders / "teacher")}]).train()
    with pytest.raises(RunError, match="never called lm_head.*SFTTrainer"):
        trainer_with([{"type": "ternary", "targets": ["lm_head"]}]).train()
