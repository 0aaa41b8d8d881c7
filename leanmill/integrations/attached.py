"""Techniques on a model that somebody else trains: the same stages, loss terms and step rules."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext, load_state, metrics_of, state_of
from leanmill.core.technique import InstallContext, InstalledTechniques, TechniqueConfig
from leanmill.core.transposed import as_linears
from leanmill.core.views import Views
from leanmill.data.tokenizer import other_tokens, tokenizer_fingerprint
from leanmill.integrations.losses import AttachedLosses
from leanmill.integrations.refusals import check_installed, check_masters, check_model, check_techniques
from leanmill.integrations.without_storage import without_storage
from leanmill.models.calls import check_sites_are_called
from leanmill.models.config import ModelConfig
from leanmill.models.materialise import fill_added
from leanmill.models.pretrained import load_frozen, pretrained_config
from leanmill.models.stored_adapter import stored_adapter
from leanmill.models.stored_weights import StoredWeights
from leanmill.models.summary import block_scores
from leanmill.optim.config import AdamW
from leanmill.parallel.views import NativeViews
from leanmill.recipe.io import validate_recipe
from leanmill.recipe.root import Recipe
from leanmill.trainer.adapter_base import check_base
from leanmill.trainer.prepare import install_techniques, optimizer_for


_KEY = "_leanmill_attached"


def attach(
    model: Any,
    techniques: Sequence[TechniqueConfig | Mapping[str, Any]],
    *,
    seed: int = 0,
    cross_entropy_weight: float = 1.0,
    tokenizer: Any = None,
) -> Attached:
    """Put techniques on a causal LM of transformers, in place, for another trainer.

    From here on `model(input_ids, labels=..., num_items_in_batch=...).loss` in training mode has the losses of the
    techniques. What happens once a step the trainer asks for: `leanmill.integrations.LeanmillCallback` does so for
    transformers' Trainer, other loops call `Attached.begin_step`, `before_optimizer` and `after_optimizer`.

    Args:
        model: On the CPU with its weights, trained ones in fp32, not wrapped yet.
        techniques: As under `techniques` in a recipe: mappings with a `type`, or configurations.
        seed: Of what techniques draw: adapters, noise.
        cross_entropy_weight: Weight of next-token cross-entropy, as `train.cross_entropy_weight`.
        tokenizer: The model's, for techniques that compare vocabularies (a teacher's).

    Raises:
        ConfigError: The techniques contradict each other or the model, or need what only Leanmill's own trainer
            has; the message says what to use.
    """
    check_model(model)
    raw = [one.model_dump(mode="json") if isinstance(one, TechniqueConfig) else dict(one) for one in techniques]
    check_techniques(_readable(raw))
    recipe = validate_recipe(
        {
            "name": "attached",
            "seed": seed,
            "model": {"config": {"model_type": model.config.model_type}},
            "techniques": raw,
            # Epochs, since how many steps those are is the trainer's to say.
            "train": {"epochs": 1, "cross_entropy_weight": cross_entropy_weight},
            "log": {"watch": False},
        },
        "attach",
    )
    attached = Attached(model, recipe, tokenizer)
    vars(model)[_KEY] = attached
    return attached


def _readable(raw: Sequence[Mapping[str, Any]]) -> Iterator[TechniqueConfig]:
    """Yield the configurations that can be read; what is wrong with others, the recipe says."""
    for one in raw:
        with suppress(ValueError):
            yield parse_technique(one)


def attached_to(model: Any) -> Attached:
    """Return what is attached to a model, which a trainer may have wrapped since.

    Raises:
        ConfigError: Nothing is.
    """
    inner = model
    while _KEY not in vars(inner):
        inner = getattr(inner, "module", None) or vars(inner).get("_modules", {}).get("_orig_mod")
        if inner is None:
            raise ConfigError(f"nothing is attached to this {type(model).__name__}; call leanmill.attach(model, [...])")
    return vars(inner)[_KEY]  # type: ignore[no-any-return]


class Attached:
    """What `attach` put on a model, and what its trainer must do once a step.

    Args:
        model: The causal LM.
        recipe: Holds the techniques, the seed and the weight of cross-entropy.
        tokenizer: The model's, if given.
    """

    def __init__(self, model: Any, recipe: Recipe, tokenizer: Any) -> None:
        self.model, self.recipe, self.tokenizer = model, recipe, tokenizer
        self.model_class, self.plain_config = type(model), copy.deepcopy(model.config)
        self.step, self.num_steps = 0, 0
        self.lr: float | None = None
        """Peak rate of the optimizer that was built here; None before one was."""
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        context, stored = self._context()
        context = dataclasses.replace(context, check_base=self._check_base)
        # On a copy first: what is refused is refused before the model is touched.
        self._install(self.plain_on_meta().train(), context)
        as_linears(model)
        with without_storage(model):
            self.installed = self._install(model, context)
        fill_added(
            model,
            seed=recipe.seed,
            reset_branches=self.installed.reset_branch,
            fill_branches=self.installed.fill_branches,
        )
        for weights in stored:
            weights.close()
        self.losses = AttachedLosses(
            model, self.installed.loss_terms, context.ledger, recipe.train.cross_entropy_weight
        )
        model.config.use_cache = False
        _keep_from_ddp(model)
        self._now: StepContext | None = None

    def _install(self, model: nn.Module, context: InstallContext) -> InstalledTechniques:
        installed = install_techniques(list(self.recipe.techniques), model, context)
        check_installed(installed, context.ledger)
        check_sites_are_called(model)
        check_masters(model, self.dtypes)
        return installed

    def _context(self) -> tuple[InstallContext, list[StoredWeights]]:
        opened: list[StoredWeights] = []

        @cache
        def load_frozen_model(path: str) -> nn.Module:
            return load_frozen(path).to(next(self.model.parameters()).device)

        def open_weights(path: str) -> Any:
            opened.append(StoredWeights(ModelConfig(path=path)))
            return opened[-1].take

        offered = InstallContext(
            load_frozen_model=load_frozen_model,
            vocab_size=self.model.config.vocab_size,
            tokenizer_fingerprint=None if self.tokenizer is None else tokenizer_fingerprint(self.tokenizer),
            other_tokens=None if self.tokenizer is None else partial(other_tokens, self.tokenizer, for_encoder=False),
            seed=self.recipe.seed,
            cross_entropy_weight=self.recipe.train.cross_entropy_weight,
            frozen_config=lambda path: pretrained_config(ModelConfig(path=path)),
            open_weights=open_weights,
            stored_adapter=lambda: stored_adapter(ModelConfig(path=self.plain_config.name_or_path or ".")),
            block_scores=lambda name: block_scores(ModelConfig(path=self.plain_config.name_or_path or "."), name),
        )
        return offered, opened

    def _check_base(self, base: str, adapter: str) -> None:
        """Compare the base of an adapter with what the model was read from; one that has no name is taken as it is."""
        if named := self.plain_config.name_or_path:
            check_base(ModelConfig(path=named), base, adapter)

    def plain_on_meta(self) -> Any:
        """Build the plain model without storage."""
        with torch.device("meta"):
            return as_linears(self.model_class._from_config(copy.deepcopy(self.plain_config), dtype=torch.float32))

    def on_meta(self) -> Any:
        """Build the model with its techniques, without storage."""
        model = self.plain_on_meta().train()
        self._install(model, self._context()[0])
        return model

    def optimizer(
        self, *, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ) -> torch.optim.Optimizer:
        """Build AdamW with the groups that techniques ask for: no decay of scales, rates and pulls of their own.

        Args:
            lr: Peak learning rate; techniques' `lr_factor` multiplies it.
            weight_decay: Of matrices, embeddings and adapters.
            betas: Decay of the moments.
            eps: Added to the root of the second moment.
        """
        self.lr = lr
        config = AdamW(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
        return optimizer_for(config, self.model, self.installed.param_rules)

    def begin_step(
        self,
        step: int,
        *,
        num_steps: int,
        num_micro_batches: int = 1,
        usual_micro_batches: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        views: Views | None = None,
    ) -> None:
        """Call before the first forward of an optimizer step, on every rank.

        Args:
            step: From 0.
            num_steps: Of the whole training.
            num_micro_batches: Backward passes of this step on this rank.
            usual_micro_batches: Of a step that no epoch's end cuts short, by which rows are numbered (noise is drawn by
                that); None takes those of this one.
            optimizer: Torch's own, whose state rules may read and write.
            views: What rules see of weights and gradients; None makes those of `optimizer`.
        """
        if num_steps != self.num_steps:
            self._check_length(num_steps)
        if views is None and optimizer is not None:
            views = NativeViews(self.model, optimizer)
        self.step, self.num_steps = step, num_steps
        self.losses.begin_step(step * (usual_micro_batches or num_micro_batches), num_micro_batches)
        self._now = StepContext(step=step, num_steps=num_steps, num_micro_batches=num_micro_batches, views=views)
        with torch.no_grad():
            for rule in self.installed.step_rules:
                rule.begin_step(self._now)

    def _check_length(self, num_steps: int) -> None:
        problems = [line for technique in self.recipe.techniques for line in technique.problems_in_a_run_of(num_steps)]
        if problems:
            raise ConfigError("\n".join(problems))

    @torch.no_grad()
    def before_optimizer(self) -> None:
        """Call when the gradients of a step are complete, before they are clipped."""
        now = self._context_now()
        for rule in self.installed.step_rules:
            rule.before_optimizer(now)

    @torch.no_grad()
    def after_optimizer(self, *, skipped: bool = False) -> None:
        """Call after the optimizer's step; `skipped` is whether it left all weights as they were."""
        flag = torch.tensor(skipped, device=next(self.model.parameters()).device)
        now = dataclasses.replace(self._context_now(), skipped=flag)
        for rule in self.installed.step_rules:
            rule.after_optimizer(now)
        self.step += 1

    def _context_now(self) -> StepContext:
        if self._now is None:
            raise ConfigError("no step has begun; call begin_step before the first forward of every optimizer step")
        return self._now

    def metrics(self) -> dict[str, float]:
        """Return each loss of the last step on this rank, a token, and what rules have to say. Waits for the device."""
        values = {name: float(value) for name, value in self.losses.values.items()}
        targets = max(values.pop("targets", 1.0), 1.0)
        values.pop("total", None)
        return {name: value / targets for name, value in values.items()} | metrics_of(self.installed.step_rules)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training must know beside the model's tensors: JSON-able."""
        return {
            "techniques": [technique.model_dump(mode="json") for technique in self.recipe.techniques],
            "rules": state_of(self.installed.step_rules),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned, before training goes on.

        Raises:
            ConfigError: It is of other techniques.
        """
        own = self.state_dict()["techniques"]
        if state.get("techniques") != own:
            raise ConfigError("the checkpoint was trained with other techniques than are attached; attach those")
        load_state(self.installed.step_rules, state.get("rules", {}))


def _keep_from_ddp(model: nn.Module) -> None:
    """Have DDP neither broadcast nor reduce what is equal on all ranks by itself: schedules, keys of noise, masks."""
    from torch.nn.parallel import DistributedDataParallel

    from leanmill.core.names import state_name
    from leanmill.core.stage import TechniqueModule

    names: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, TechniqueModule):
            own: list[tuple[str, Tensor]] = [*module.named_buffers(), *module.named_parameters()]
            names += [state_name(f"{path}.{name}") for name, one in own if not one.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
