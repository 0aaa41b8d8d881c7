"""What shows in a trainer's first step: whether it called what techniques stand on."""

from __future__ import annotations

from typing import Any

from torch import nn

from leanmill.core.errors import RunError
from leanmill.core.site import EmbeddingSite, LinearSite
from leanmill.core.sites import iter_sites
from leanmill.integrations.attached import Attached
from leanmill.integrations.refusals import OWN


class FirstStep:
    """Watches a step from before its first forward, and refuses it before the optimizer has written anything.

    Args:
        attached: What the trainer trains.
    """

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self._waiting: dict[int, str] = {}
        self._hooks: list[Any] = []
        if any(technique.leaves_modules_out() for technique in attached.recipe.techniques):
            return
        for name, site in iter_sites(attached.model):
            if site.is_staged and isinstance(site, LinearSite | EmbeddingSite):
                self._waiting[id(site)] = name
                self._hooks.append(site.register_forward_pre_hook(self._note))

    def _note(self, module: nn.Module, args: Any) -> None:
        self._waiting.pop(id(module), None)

    def check(self) -> None:
        """Refuse a step that left a technique out, and stop watching.

        Raises:
            RunError: The loss was computed elsewhere, or a staged weight was read behind its layer's back.
        """
        for hook in self._hooks:
            hook.remove()
        if self._needs_loss and not self.attached.losses.num_seen:
            raise RunError(
                f"the trainer computed a loss of its own, without what techniques add to it: leave out label_smoothing_"
                f"factor, compute_loss_func and the like; instead of TRL's SFTTrainer, whose head does so, use "
                f"transformers' Trainer, or {OWN}"
            )
        if self._waiting:
            raise RunError(
                f"the trainer never called {next(iter(self._waiting.values()))} ({len(self._waiting)} staged weights), "
                f"but reads its weight, as TRL's SFTTrainer does with the head; add it to the technique's exclude"
            )

    @property
    def _needs_loss(self) -> bool:
        losses = self.attached.losses
        return bool(losses.terms or losses.ledger.open_accounts or losses.cross_entropy_weight != 1)
