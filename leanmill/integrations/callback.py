"""A callback for transformers' Trainer, and so for TRL's SFTTrainer, which is one."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from leanmill.core.errors import ConfigError
from leanmill.core.names import clean_name
from leanmill.core.parameters import PLAIN, settings_by_name
from leanmill.core.views import View, Views
from leanmill.export.formats import Activations
from leanmill.integrations.accumulation import Accumulation
from leanmill.integrations.attached import Attached, attached_to
from leanmill.integrations.first_step import FirstStep
from leanmill.integrations.folded import check_plain, plain_model, state_of_names, whole_state
from leanmill.integrations.optimizers import inner_optimizer, is_deepspeed, parameter_groups
from leanmill.integrations.refusals import OWN, writes_gradients
from leanmill.parallel.tensors import global_norm, scale_to_norm
from leanmill.trainer.prepare import undecayed


class LeanmillCallback(TrainerCallback, ExportableState):
    """Runs the step rules of what is attached to a model, and folds the model that the Trainer saves at the end.

    Checkpoints (`checkpoint-N`) stay what the Trainer resumes from: raw weights and what the techniques brought.
    Once training has ended, `trainer.save_model(folder)` and `model.save_pretrained(folder)` write the plain model.
    Losses of techniques and metrics of rules are in `trainer.state.log_history` beside the Trainer's own.

    Args:
        model: One that `leanmill.attach` was called on.
        max_grad_norm: Clip here rather than in the Trainer (`TrainingArguments(max_grad_norm=0)`), which clips before
            callbacks see gradients: needed where a rule writes them.
        activations: See `leanmill.fold`.
    """

    def __init__(self, model: Any, *, max_grad_norm: float | None = None, activations: Activations = "trained") -> None:
        self.attached: Attached = attached_to(model)
        self.max_grad_norm, self.activations = max_grad_norm, activations
        self._views: Views | None = None
        self._first_step: FirstStep | None = None
        self._accumulation: Accumulation | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at what the Trainer made of the model, and take up what a checkpoint knew."""
        attached, model = self.attached, given["model"]
        check_trainer(args, model, attached, self.max_grad_norm)
        under_deepspeed = is_deepspeed(given["optimizer"])
        check_engine(args, attached, under_deepspeed)
        check_plain(attached, self.activations)
        if under_deepspeed and self.max_grad_norm is not None:
            raise ConfigError(
                "DeepSpeed keeps gradients where no callback clips them; leave LeanmillCallback's max_grad_norm out"
            )
        check_groups(attached, given["optimizer"], args)
        self._views = _NoViews() if under_deepspeed else None
        losses = attached.losses
        losses.rank, losses.world_size = args.process_index, args.world_size
        losses.loss_scale = float(args.world_size) if args.average_tokens_across_devices else 1.0
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if saved is not None:
            attached.load_state_dict((saved[0] if isinstance(saved, list) else saved)["attributes"])
        vars(attached.model).pop("save_pretrained", None)
        self._first_step = FirstStep(attached)
        self._accumulation = Accumulation(args)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """See how long the epoch is."""
        assert self._accumulation is not None
        self._accumulation.begin_epoch(state.global_step, given["train_dataloader"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write schedules."""
        assert self._accumulation is not None
        self.attached.begin_step(
            state.global_step,
            num_steps=state.max_steps,
            num_micro_batches=self._accumulation.of_step(state.global_step),
            usual_micro_batches=self._accumulation.usual,
            optimizer=inner_optimizer(given["optimizer"]),
            views=self._views,
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let rules see complete gradients, and clip them if that was left to this callback."""
        if self._first_step is not None:
            self._first_step.check()
            self._first_step = None
        self.attached.before_optimizer()
        if self.max_grad_norm is not None:
            gradients = [p.grad for p in self.attached.model.parameters() if p.grad is not None]
            scale_to_norm(gradients, global_norm(gradients, gradients[0].device), self.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let rules see the new weights."""
        self.attached.after_optimizer(skipped=bool(getattr(given["optimizer"], "step_was_skipped", False)))

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Add losses and metrics to the Trainer's record of a step."""
        if state.log_history and "loss" in (given.get("logs") or {}):
            state.log_history[-1].update(self.attached.metrics())

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """From here on what is saved is the plain model."""
        model = self.attached.model
        vars(model)["save_pretrained"] = functools.partial(_save_folded, self.attached, self.activations)

    def state(self) -> dict[str, Any]:
        """Return what goes into a checkpoint's `trainer_state.json`."""
        return {"args": {}, "attributes": self.attached.state_dict()}


class _NoViews(Views):
    """Of DeepSpeed, whose step is over when callbacks are called; rules that need some are refused beforehand."""

    def of(self, parameter: nn.Parameter) -> View:
        raise ConfigError(f"a rule reads weights or gradients by element, under DeepSpeed; {OWN}")

    named = of  # type: ignore[assignment]

    def publish(self, views: Any) -> None:
        return


def check_trainer(args: Any, model: Any, attached: Attached, max_grad_norm: float | None) -> None:
    """Refuse settings under which techniques would not do what they say.

    Raises:
        ConfigError: The message says what to set.
    """
    if attached_to(model) is not attached or _has_foreign_adapters(model):
        raise ConfigError(
            "the Trainer trains another model than techniques are attached to; in place of PEFT's wrapping of it, "
            "attach {type: lora} or {type: peft}"
        )
    if args.n_gpu > 1:
        raise ConfigError("DataParallel copies the model in every step; start with torchrun or accelerate launch")
    if args.torch_compile:
        raise ConfigError(f"torch_compile=True would compile what techniques do between calls; leave it out, or {OWN}")
    if args.fp16 and attached.losses.ledger.open_accounts:
        raise ConfigError("fp16 scales the loss, and losses inside the model are not scaled along; set bf16=True")
    if args.fp16 and (max_grad_norm is not None or writes_gradients(attached.installed.step_rules)):
        raise ConfigError("fp16 scales gradients, and callbacks see them before they are scaled back; set bf16=True")
    if args.restore_callback_states_from_checkpoint:
        raise ConfigError(
            "restore_callback_states_from_checkpoint builds callbacks anew; leave it out, this one resumes"
        )
    named = writes_gradients(attached.installed.step_rules)
    if named and args.max_grad_norm and args.max_grad_norm > 0:
        raise ConfigError(
            f"{named[0]} works on gradients before they are clipped, and the Trainer clips first; set "
            f"TrainingArguments(max_grad_norm=0) and LeanmillCallback(model, max_grad_norm={args.max_grad_norm:g})"
        )
    if max_grad_norm is not None and args.max_grad_norm:
        raise ConfigError("gradients would be clipped twice; set TrainingArguments(max_grad_norm=0)")


def check_engine(args: Any, attached: Attached, under_deepspeed: bool) -> None:
    """Refuse what of sharding techniques do not follow.

    Raises:
        ConfigError: The message says what to set.
    """
    if under_deepspeed and any(hasattr(parameter, "ds_id") for parameter in attached.model.parameters()):
        raise ConfigError(
            f"under ZeRO-3 transformers cuts every model that is built from then on, a teacher and the folded one too; "
            f"set zero_optimization.stage to 2, use FSDP2, or {OWN}"
        )
    is_sharded = any(isinstance(parameter, DTensor) for parameter in attached.model.parameters())
    if getattr(args, "fsdp", None) and not is_sharded:
        raise ConfigError(
            "fsdp was asked for and the model is not sharded by FSDP2: accelerate trains plain DDP on CPUs, and "
            "fsdp_version 1 hides weights; set fsdp_config={'fsdp_version': 2} on GPUs, or leave fsdp out"
        )
    others = getattr(args, "parallelism_config", None)
    if others is not None and any(getattr(others, f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp")):
        raise ConfigError(
            f"parallelism_config cuts rows or weights over ranks in ways that losses of techniques do not follow; "
            f"leave it out and take FSDP2 or DeepSpeed, or {OWN}"
        )
    for technique in attached.recipe.techniques if under_deepspeed else ():
        if technique.reads_optimizer_state():
            kind: str = technique.type  # type: ignore[attr-defined]
            raise ConfigError(f"{kind} reads optimizer state by element, under DeepSpeed {OWN}, or use FSDP2")
    named = writes_gradients(attached.installed.step_rules) if under_deepspeed else []
    if named:
        raise ConfigError(
            f"{named[0]} works on gradients before the optimizer's step, which DeepSpeed takes in the last backward, "
            f"before callbacks are called; use FSDP2 or DDP, or {OWN}"
        )


def check_groups(attached: Attached, optimizer: Any, args: Any) -> None:
    """Refuse an optimizer that treats parameters otherwise than techniques ask.

    Raises:
        ConfigError: The message says which to pass.
    """
    groups = parameter_groups(optimizer)
    named = [(name, p) for name, p in attached.model.named_parameters() if p.requires_grad]
    settings = settings_by_name(attached.installed.param_rules, [clean_name(name) for name, _ in named])
    resting = undecayed(attached.model)
    base_rate = args.learning_rate if attached.lr is None else attached.lr
    for name, parameter in named:
        said, group = settings.get(clean_name(name), PLAIN), groups.get(id(parameter))
        decay = 0.0 if said.weight_decay is None and id(parameter) in resting else said.weight_decay
        if group is None:  # in no group that can be seen
            differs = said != PLAIN or (decay is not None and args.weight_decay != decay)
        else:
            rate = base_rate * (said.lr_factor or 1.0)
            differs = (
                (decay is not None and group["weight_decay"] != decay)
                or (said.lr_factor is not None and abs(group.get("initial_lr", group["lr"]) - rate) > 1e-9 * rate)
                or (said.betas is not None and tuple(group.get("betas", ())) != said.betas)
                or (said.pull is not None and group.get("pull") != said.pull)
                or (said.kept is not None and group.get("kept") != said.kept)
            )
        if differs:
            raise ConfigError(
                f"a technique wants {name} trained otherwise than this optimizer does (decay, rate or pull); "
                f"{_how_to_pass(optimizer)}, where attached is what attach returned"
            )


def _how_to_pass(optimizer: Any) -> str:
    if is_deepspeed(optimizer):  # the Trainer drops `optimizers` under it
        return (
            "under DeepSpeed give your Trainer a method create_optimizer(self, model=None) that returns "
            "self.optimizer, once set to attached.optimizer(lr=..., weight_decay=...)"
        )
    return "pass the Trainer optimizers=(attached.optimizer(lr=..., weight_decay=...), None)"


def _has_foreign_adapters(model: Any) -> bool:
    return type(model).__module__.startswith("peft.")


def _save_folded(
    attached: Attached, activations: Activations, folder: Any, *, state_dict: Any = None, **options: Any
) -> None:
    """`save_pretrained` of a trained model: the plain one."""
    model = attached.model
    state = whole_state(model) if state_dict is None else state_of_names(model, state_dict)
    plain = plain_model(attached, state, activations)
    plain.config.use_cache = True
    plain.save_pretrained(folder, **options)
