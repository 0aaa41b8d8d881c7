"""What a technique is: a validated configuration that installs stages, loss terms and step rules.

A technique never sees the trainer. It gets the model's sites and an `InstallContext`, and hands
back an `Installation`. The configuration is frozen, so whatever a technique builds lives in the
modules it installed or in the terms and rules it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_args, runtime_checkable

from pydantic import Field, model_validator

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError
from leanmill.core.losses import AnyLossTerm
from leanmill.core.parameters import ParamRule, ParamSettings, TrainableSchedule
from leanmill.core.pooling import Pooling
from leanmill.core.probes import Probe
from leanmill.core.rules import StepRule


if TYPE_CHECKING:
    from torch import Tensor, nn

    from leanmill.core.facets import StoredFactors
    from leanmill.core.ledger import Ledger
    from leanmill.core.sites import Sites
    from leanmill.core.taps import FrozenTaps


ModelTask = Literal["causal_lm", "masked_lm", "embedding"]
"""What a model is for, see `model.task`."""
ALL_TASKS: frozenset[ModelTask] = frozenset(get_args(ModelTask))

_Shared = TypeVar("_Shared")


def _new_ledger() -> Ledger:
    from leanmill.core.ledger import Ledger

    return Ledger()


def _new_taps(load: Callable[[], nn.Module]) -> FrozenTaps:
    from leanmill.core.taps import FrozenTaps

    return FrozenTaps(load)


@dataclass(frozen=True, kw_only=True)
class InstallContext:
    """What the trainer offers a technique at installation."""

    load_frozen_model: Callable[[str], nn.Module]
    """Load a causal LM from a folder or hub name, frozen, in eval mode, ready on the run's device
    (sharded when the engine shards). Call it lazily: it is valid only once training starts."""
    vocab_size: int
    """Rows of the student's embedding."""
    tokenizer_fingerprint: str | None = None
    """Digest of the student's tokenizer, where there is one."""
    other_tokens: Callable[[str], str | None] | None = None
    """Compare the student's tokens with those of the tokenizer in a folder or hub repository, number by number:
    "" where it has all of them, else what the first difference is; None where there is no tokenizer."""
    num_tokens: int | None = None
    """Tokens of the student's tokenizer, where there is one; the embedding may have more rows."""
    end_of_text: int | None = None
    """The token that ends a text, where there is a tokenizer."""
    data_fingerprint: str | None = None
    """Digest of the data: equal ones give equal rows by number. None where nothing will train."""
    fingerprint_of_model: Callable[[str], str | None] | None = None
    """Digest of the weights in a folder or hub repository; None where it cannot be had."""
    seed: int | None = None
    """Seed of the run, for what is drawn in training (`leanmill.core.noise`)."""
    frozen_config: Callable[[str], Any] | None = None
    """The transformers configuration of a model in a folder or hub repository, for shapes that depend on it;
    None where nothing will train."""
    cross_entropy_weight: float = 1.0
    """Weight of next-token cross-entropy in the loss (`train.cross_entropy_weight`)."""
    pooling: Pooling = Pooling()
    """How vectors of texts are made of hidden states, for `model.task: embedding`."""
    pooling_of: Callable[[str, Literal["auto", "mean", "cls"]], Pooling] | None = None
    """The same of a model in a folder or hub repository, given what a recipe says; None where nothing will train."""
    ledger: Ledger = field(default_factory=_new_ledger)
    """Where losses that arise inside the model are attached; its train module's."""
    open_weights: Callable[[str], Callable[[str, Tensor], Tensor]] | None = None
    """Open the weights of a model in a folder or hub repository, to be read once. The function returned takes a
    weight's plain name and a tensor of the shape it must have, and gives the weight, whole, on the CPU; a
    collective, for `Stage.initialise`. None where what is initialised will be overwritten."""
    stored_adapter: Callable[[], Mapping[str, StoredFactors]] | None = None
    """Return the adapter that lies beside the weights of the model that trains, by the plain name of the layer; None
    where what starts from it will be overwritten."""
    block_scores: Callable[[str], Sequence[float]] | None = None
    """Return what the pass of a name has noted of each decoder block of the model that trains; None where nothing
    trains."""
    check_base: Callable[[str, str], None] | None = None
    """Refuse another base than the model that trains, for an adapter that training starts from: takes the base's folder
    or hub name and the name of the adapter in a recipe. None where adapters will be overwritten, or nothing trains."""
    _taps: dict[str, FrozenTaps] = field(default_factory=dict, repr=False)
    _shared: dict[type, Any] = field(default_factory=dict, repr=False)

    def taps(self, path: str) -> FrozenTaps:
        """Return the taps on a frozen model, the same for all who ask, so that it runs once a micro-batch."""
        if path not in self._taps:
            self._taps[path] = taps = _new_taps(lambda: self.load_frozen_model(path))
            self.ledger.after_forward(taps.release)
        return self._taps[path]

    def shared(self, kind: type[_Shared], make: Callable[[], _Shared]) -> _Shared:
        """Return the one object of `kind` that the techniques of a run share; the first to ask has it made.

        One that is a step rule becomes a rule of the run.
        """
        if kind not in self._shared:
            self._shared[kind] = make()
        found: _Shared = self._shared[kind]
        return found

    def shared_rules(self) -> list[StepRule]:
        """Return the shared objects that are step rules, in the order they were made."""
        return [one for one in self._shared.values() if isinstance(one, StepRule)]


@dataclass(frozen=True, kw_only=True)
class Installation:
    """What a technique put in place."""

    loss_terms: Sequence[AnyLossTerm] = ()
    step_rules: Sequence[StepRule] = ()
    probes: Sequence[Probe] = ()
    """What looks on while held-out text is evaluated."""
    param_rules: Sequence[ParamRule] = ()
    """Learning rate, decay and whether to train, by parameter."""
    trainable_schedule: TrainableSchedule | None = None
    """Which parameters train in which step."""
    freeze_base: bool = False
    """Train only the parameters that stages and branches added, and what a rule says is trained."""
    add_branches: Callable[[nn.Module], None] | None = None
    """Called with the model after every technique has put its stages: wraps sites with output
    branches (adapters). Wrapping last keeps the result independent of the listed order."""
    keep: Callable[[nn.Module], None] | None = None
    """Called with the model once every technique has put its stages and what trains is settled: gives frozen weights
    another form, whose shape need not be the weight's."""
    reset_branch: Callable[[nn.Module], None] | None = None
    """Fills the parameters of one layer that `add_branches` wrapped, once they have been materialised
    from meta; called with the random generator seeded for this layer, on full tensors."""
    fill_branches: Callable[[nn.Module], None] | None = None
    """In place of `reset_branch`: fills all that `add_branches` brought, once, after the base has its values. Called
    with the model, which may be sharded, on all ranks."""


class TechniqueConfig(Config):
    """Base of every technique's configuration; subclasses add `type: Literal["name"]`."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put stages on the sites of a model whose weights may still be on the meta device."""
        raise NotImplementedError

    def model_tasks(self) -> frozenset[ModelTask]:
        """Return what models it trains are for (`model.task`): here causal LMs, whose parts and losses it is about."""
        return frozenset({"causal_lm"})

    def learns_embeddings(self) -> bool:
        """Whether it brings a loss of `model.task: embedding`, which has none of its own."""
        return False

    def frozen_models(self) -> Mapping[str, str]:
        """Return the models that a run keeps beside its own: key of this configuration -> folder or hub name."""
        return {}

    def read_models(self) -> Mapping[str, str]:
        """Return the models that are read once, at the start: key of this configuration -> folder or hub name."""
        return {}

    def reads_optimizer_state(self) -> bool:
        """Whether its step rules read or write optimizer state or masters by element, see `core.views`."""
        return False

    def writes_masters(self) -> bool:
        """Whether its step rules read or write what the optimizer writes, if not its state."""
        return self.reads_optimizer_state()

    def needs_whole_experts(self) -> bool:
        """Whether every rank must hold all experts of a weight that it takes."""
        return False

    def holds_where_matmuls_are_shared(self) -> bool:
        """Whether it has been shown to train what one process trains where ranks share matmuls (`layout.tp`)."""
        return False

    def holds_where_rows_are_shared(self) -> bool:
        """Whether it has been shown to train what one process trains where ranks have parts of rows (`layout.cp`)."""
        return False

    def holds_where_blocks_are_apart(self) -> bool:
        """Whether it has been shown to train what one process trains where ranks have some blocks (`layout.pp`).

        What it puts on a model is in places of their own, and what its losses look at is known on the last stage.
        """
        return False

    def holds_where_workers_drift(self) -> bool:
        """Whether it has been shown to hold where workers step without each other (`layout.low_comm`).

        All it changes in training is weights that train, which workers exchange; what else it keeps is the same
        whatever they did, such as a schedule.
        """
        return False

    def reads_second_moments(self) -> str | None:
        """Where it needs AdamW's second moments of gradients, return what to set so that it does not."""
        return None

    def num_frozen_logits(self) -> int:
        """Of how many frozen models its losses hold the logits at once, beside the student's."""
        return 0

    def changes_what_trains(self) -> bool:
        """Whether other parameters train in some steps than in others, which not every engine can do."""
        return False

    def is_for_training_only(self, name: str) -> bool:
        """Whether a tensor of this name in a checkpoint serves training alone and is nothing to an export."""
        return False

    def leaves_modules_out(self) -> str | None:
        """Return what to set so that every step calls every module that has weights; None where that is so already.

        Under ZeRO-3 a weight that a step does not use keeps its gradient of the last one.
        """
        return None

    def problems_in_a_run_of(self, num_steps: int) -> Iterable[str]:
        """Yield what does not fit a run of so many steps, such as a schedule that ends after it, and what to type."""
        return ()

    def problems_with_rows_of(self, num_tokens: int) -> Iterable[str]:
        """Yield what does not fit rows of so many tokens (`data.sequence_length`), and what to type."""
        return ()

    def adds_branches(self) -> bool:
        """Whether it wraps layers with output branches, which one technique of a run may do."""
        return False

    def num_compared(self) -> int:
        """Return how many conversations of a document its loss compares, see `data.task: preference`; 0 for none."""
        return 0

    def shares_cross_entropy(self) -> str | None:
        """Return its field whose loss is a share of `train.cross_entropy_weight`, and nothing where that is 0."""
        return None

    def writes_text(self) -> bool:
        """Whether it trains on text that the model writes, whose tokens are no targets of cross-entropy."""
        return False

    def knows_rows_by_number(self) -> bool:
        """Whether it keeps something of rows by their numbers, which holds for the data's own text only."""
        return False

    def takes_tokens_out(self) -> bool:
        """Whether it keeps some tokens from being predicted."""
        return False

    def changes_base(self) -> bool:
        """Whether its start writes weights of the base, so that they are no longer those of `model.path`."""
        return False

    def reads_base(self) -> bool:
        """Whether its branches read or write weights of the layers they wrap, rather than only call them."""
        return False

    def token_shares(self, num_layers: int) -> Mapping[int, float]:
        """Return what share of a row's tokens decoder blocks run for in training, by index; all where none is given.

        Raises:
            ConfigError: It does not fit a model of so many blocks.
        """
        return {}

    def further_tokens(self) -> int:
        """Return how many further tokens every position predicts in training.

        Each takes a matmul [H, 2H], a block like the model's last and the output head once more.
        """
        return 0

    def watches(self, model: nn.Module) -> bool:
        """Whether it has something to look at in `model`, for techniques that are installed unasked.

        Only such do: they change nothing of the maths and cost next to nothing.
        """
        return False

    def own_settings(self) -> ParamSettings:
        """Return how the parameters that this technique brings are trained."""
        return ParamSettings()

    @model_validator(mode="before")
    @classmethod
    def _has_parameters_of_its_own(cls, raw: Any) -> Any:
        for key in ("lr_factor", "weight_decay"):
            if isinstance(raw, dict) and key in raw and key not in cls.model_fields:
                name = raw.get("type")
                raise ConfigError(
                    f"{name}.{key}: {name} brings no parameters that are trained, so there is nothing to set it for; "
                    f"remove it, or set optimizer.{key.removesuffix('_factor')} for the whole model"
                )
        return raw


def token_shares(configs: Sequence[TechniqueConfig], num_layers: int) -> list[float]:
    """Return what share of a row's tokens each of a model's blocks runs for, under all its techniques."""
    shares = [1.0] * num_layers
    for config in configs:
        for layer, share in config.token_shares(num_layers).items():
            shares[layer] *= share
    return shares


class TrainedTechniqueConfig(TechniqueConfig):
    """Mixed into techniques that bring parameters which the optimizer trains."""

    lr_factor: float | None = Field(default=None, gt=0)
    """Learning rate of the technique's own parameters as a multiple of `optimizer.lr`; None is 1."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of the technique's own parameters; None leaves scales alone and gives adapters
    `optimizer.weight_decay`."""

    def own_settings(self) -> ParamSettings:
        """Return what the two keys say."""
        return ParamSettings(lr_factor=self.lr_factor, weight_decay=self.weight_decay)


class WeightTechniqueConfig(TechniqueConfig):
    """Base of techniques that take weights by pattern."""

    targets: list[str] | None = None
    """Patterns of weights to take; None takes every linear and expert weight except the head."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of weights to leave out again."""

    def model_tasks(self) -> frozenset[ModelTask]:
        """Return all: weights are weights."""
        return ALL_TASKS


@runtime_checkable
class Technique(Protocol):
    """The protocol the trainer programs against."""

    type: str

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """See `TechniqueConfig.install`."""
        ...


@dataclass
class InstalledTechniques:
    """All techniques of a run, merged in the listed order."""

    loss_terms: list[AnyLossTerm] = field(default_factory=list)
    step_rules: list[StepRule] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    param_rules: list[ParamRule] = field(default_factory=list)
    trainable_schedule: TrainableSchedule | None = None
    freeze_base: bool = False
    reset_branch: Callable[[nn.Module], None] | None = None
    fill_branches: Callable[[nn.Module], None] | None = None
    frozen_weights: str = ""
    """How frozen weights are kept, where not in fp32; for the log."""
