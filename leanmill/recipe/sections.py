"""The sections of a recipe. Imports no torch.

Sections of a package live with it; the run's own are here, and `Sections` joins all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.core.config import Config
from leanmill.core.registry import load_plugin, parse_technique
from leanmill.core.technique import TechniqueConfig
from leanmill.data.config import DataConfig
from leanmill.models.config import ModelConfig
from leanmill.optim.config import AdamW, OptimizerConfig, ScheduleConfig
from leanmill.parallel.config import AutoEngine, EngineConfig, LayoutConfig
from leanmill.recipe.phases import PhaseConfig


class BatchConfig(Config):
    """Batch sizes in tokens; accumulation is derived."""

    tokens_per_step: int = Field(default=32_768, ge=1)
    """Tokens of one optimizer step over all ranks; a multiple of
    `tokens_per_micro_batch` x data ranks."""
    tokens_per_micro_batch: int = Field(default=4096, ge=1)
    """Tokens of one forward on one rank; a multiple of `data.sequence_length`."""


class SpikeConfig(Config):
    """A step whose loss or gradient norm stands out. As in OLMo-core's optimizers that skip steps."""

    sigmas: float = Field(default=6.0, gt=0)
    """Standard deviations above the mean of the last steps from which on it stands out."""
    window_steps: int = Field(default=128, ge=4)
    """Steps that mean and deviation are taken over; nothing stands out until half as many have been seen."""
    action: Literal["skip", "stop", "rewind"] = "skip"
    """As `train.non_finite`; the update of such a step is never applied."""


class TrainConfig(Config):
    """The loop."""

    epochs: float | None = Field(default=None, gt=0)
    """Length of the run in passes over the training data; give one of `epochs`, `total_tokens` and `steps`.

    Of a mixture, a pass is as many rows as all its sources have together; how often each is read, its weight decides.
    The run turns it into `total_tokens` once the data is tokenised."""
    total_tokens: int | None = Field(default=None, ge=1)
    """Length of the run in tokens."""
    steps: int | None = Field(default=None, ge=1)
    """Length of the run in optimizer steps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 where the device multiplies bf16 natively, else fp32.

    `bf16` computes matmuls in bf16 over fp32 master weights (autocast; FSDP2 and DeepSpeed use
    their own bf16 policies); `fp32` computes in fp32."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip gradients to this global norm; None does not clip."""
    non_finite: Literal["stop", "skip", "rewind"] = "stop"
    """What a non-finite loss or gradient does: stop the run, skip that optimizer step, or go back to the checkpoint
    before it and on with the rows after it.

    Skipping is for the odd bad batch: a run that skips more than half of 100 steps, or of all its steps,
    saves and ends with an error. Of rewinds without a new checkpoint in between the fourth ends it."""
    spike: SpikeConfig | None = None
    """What a finite step does whose loss or gradient norm stands out of those before it; null looks at none."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """`full` recomputes each block in backward; `selective` keeps matmul and attention outputs."""
    compile: bool = False
    """torch.compile each block."""
    deterministic: bool = False
    """Refuse nondeterministic kernels (torch.use_deterministic_algorithms)."""
    cross_entropy_weight: float = Field(default=1.0, ge=0)
    """Weight of the next-token cross-entropy beside the techniques' loss terms."""
    logits_chunk_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Tokens whose logits exist at once; `auto` chooses by memory."""


class EvalConfig(Config):
    """Evaluation on held-out text: loss, perplexity and bits per byte of each domain."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations; None evaluates only at the end."""
    at_start: bool = False
    """Also evaluate before the first step: what the run begins with, such as a model that was just pruned."""
    tokens_per_domain: int = Field(default=65_536, ge=1)
    """Held-out tokens evaluated in each domain."""
    prompts: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Texts that the model continues at each evaluation; with `data.task: sft` each is what a user says, in the chat
    template. They change nothing of the training."""
    prompt_tokens: int = Field(default=64, ge=1)
    """The most tokens that it adds to each; prompt and these fit in `data.sequence_length`."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the draws: logits are divided by it; 0 takes the likeliest token. Draws depend on `seed`, prompt and position
    only, so what changes from one evaluation to the next is the model."""


class LogConfig(Config):
    """What is recorded while the run goes on."""

    every_steps: int = Field(default=10, ge=1)
    """Steps between records."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: bool = False
    """Log to Weights & Biases; offline where no key is configured."""
    wandb_project: str = "leanmill"
    """Project name at Weights & Biases."""
    report: bool = True
    """Write the HTML report at the end and at each evaluation."""
    watch: bool = True
    """Install unasked what only looks on: `moe_metrics` on models with routers. It changes no result."""


class ClusterConfig(Config):
    """Process groups and their time-outs."""

    init_timeout_seconds: int = Field(default=1800, ge=1)
    """Collective time-out until the first step is done (compilation, loading)."""
    step_timeout_seconds: int = Field(default=300, ge=1)
    """Collective time-out afterwards."""
    interrupt_seconds: int = Field(default=120, ge=1)
    """After Ctrl-C (SIGINT) the step under way and its checkpoint may take this long; then the run quits without it."""
    flight_recorder: bool = True
    """Record the last collectives (gloo and NCCL); where NCCL dumps them is printed at start."""
    hang_seconds: int | None = Field(default=60, ge=1)
    """Nothing may move for so long while ranks wait in a collective; then the ones that are not there are named, and
    every rank leaves its stacks and flight record in `hang` of the run's folder. null never looks."""

    slow_rank_factor: float | None = Field(default=1.5, gt=1)
    """A rank whose steps take so many times the median's outside of collectives, three looks in a row, is named in the
    log, with host and phase; a look is taken with a record, at most every 30 seconds, on the CPU. null never looks."""

    @model_validator(mode="after")
    def _records_what_it_reads(self) -> Self:
        for key in ("hang_seconds", "slow_rank_factor"):
            if getattr(self, key) is not None and not self.flight_recorder:
                raise ValueError(
                    f"cluster.{key}={getattr(self, key)} reads the flight recorder, which cluster.flight_recorder="
                    f"false switches off; set cluster.{key}=null as well"
                )
        return self


class Sections(Config):
    """Everything a recipe says, each section valid by itself."""

    name: str = "run"
    """Name of the run in logs and reports."""
    seed: int = Field(default=0, ge=0)
    """Seed of weights, data order and dropout."""
    run_dir: str = "runs/{name}"
    """Folder of everything the run writes; `{name}` is replaced."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is cuda where there is one."""
    plugins: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Python modules with techniques of your own, imported before the recipe is read on; each has a table
    `TECHNIQUES`, see *Add a technique*. Packages with the entry point `leanmill.techniques` need no mention."""
    model: ModelConfig
    """The model."""
    data: DataConfig = Field(default_factory=DataConfig)
    """The data."""
    techniques: list[Annotated[SerializeAsAny[TechniqueConfig], BeforeValidator(parse_technique)]] = Field(
        default_factory=list
    )
    """Techniques, each `{type: name, ...}`; the order does not matter."""
    engine: EngineConfig = Field(default_factory=AutoEngine)
    """How the run is spread over ranks; a bare string is short for `{type: ...}`."""
    layout: LayoutConfig = Field(default_factory=LayoutConfig)
    """How ranks share the work: sharding, replicas, experts."""
    optimizer: OptimizerConfig = Field(default_factory=AdamW)
    """The optimizer; without `type` it is AdamW."""
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """The learning-rate schedule."""
    batch: BatchConfig = Field(default_factory=BatchConfig)
    """Batch sizes."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The loop."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Evaluation."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints."""
    log: LogConfig = Field(default_factory=LogConfig)
    """Logs and report."""
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    """Process groups."""
    phases: list[PhaseConfig] = Field(default_factory=list, max_length=99)
    """Parts of the run one after another, each with passes or settings of its own; none is one stretch of training."""

    @property
    def run_folder(self) -> Path:
        """`run_dir` with its `{name}` filled in."""
        return Path(self.run_dir.format(name=self.name))

    @field_validator("plugins")
    @classmethod
    def _load_plugins(cls, names: list[str]) -> list[str]:
        # Before `techniques` are read, whose names they bring.
        for name in names:
            load_plugin(name)
        return names
