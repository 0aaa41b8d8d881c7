"""Losses that arise inside a model: noted where they arise, their gradient injected on the way back.

A loss of a layer (balance of its router, distance of its output from a teacher's) cannot travel through
the model's return values. It is attached to a tensor that the model goes on with, the *carrier*: forward
leaves the carrier as it is, and backward hands the loss its gradient when the carrier gets its own.
So a sharding engine, accumulation and the output head need not know of it. With activation
checkpointing the loss is computed twice and differentiated once; with compiled blocks all of it is a
part of the graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from leanmill.core.account import Account, Per, Scales
from leanmill.core.batches import Batch


class Ledger(nn.Module):
    """The accounts of a run, part of its train module; techniques open them at installation."""

    output_factor: Tensor
    """fp32 (1,): what cross-entropy of the model's output is multiplied with in training, if it `shares_output`;
    step rules write it."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = Scales()
        self.accounts = nn.ModuleList()
        self._before_step: list[Callable[[Sequence[Batch]], None]] = []
        self._after_look: list[tuple[Callable[[], None], Callable[[Sequence[Batch]], bool]]] = []
        self._before_forward: list[Callable[[Batch], None]] = []
        self._after_forward: list[Callable[[], None]] = []
        self.is_looking = False
        """Whether the forward under way only looks ahead, see `look_ahead`."""
        self.shares_output = False
        """Whether a loss in the model takes a share of the cross-entropy of its output."""
        self.register_buffer("output_factor", torch.ones(1), persistent=False)

    def open(self, name: str, *, per: Per, weight: float = 1.0) -> Account:
        """Open an account.

        Args:
            name: What the loss is logged as; `name` or `name/place`. Values of `name/...` are also logged
                as their mean, `name`.
            per: See `Per`.
            weight: Of the loss in the objective.
        """
        account = Account(name, per, weight, self.scales)
        self.accounts.append(account)
        return account

    def free_name(self, name: str) -> str:
        """Return `name` if no account has it before its place, else the first free of `name_2`, `name_3`, ..."""
        taken = {account.name.partition("/")[0] for account in self.open_accounts}
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        return next(free for free in itertools.chain((name,), numbered) if free not in taken)

    def before_step(self, function: Callable[[Sequence[Batch]], None]) -> None:
        """Call `function` with all micro-batches that this rank has in a step, before the first forward."""
        self._before_step.append(function)

    def look_ahead(
        self, function: Callable[[], None], *, where: Callable[[Sequence[Batch]], bool] = lambda batches: True
    ) -> None:
        """Have every step begin with a forward of all its micro-batches, in training mode and without gradients.

        `function` is called after the last one, on every rank: for what must be known of the whole step before the
        backward of its first micro-batch. It costs a forward, however many ask for it. The functions of
        `before_forward` and `after_forward` are called in it too, and tell by `is_looking`; accounts take no note
        of it, and torch's random numbers are those of the forwards that follow.

        Args:
            function: See above.
            where: Whether a step with these micro-batches needs it; the same on every rank.
        """
        self._after_look.append((function, where))

    @property
    def sees_whole_steps(self) -> bool:
        """Whether something asked to see all micro-batches of a step before the first forward."""
        return bool(self._before_step or self._after_look)

    def before_forward(self, function: Callable[[Batch], None]) -> None:
        """Call `function` with each micro-batch before its training forward, on every rank."""
        self._before_forward.append(function)

    def after_forward(self, function: Callable[[], None]) -> None:
        """Call `function` after each training forward of a micro-batch and before its backward, on every rank."""
        self._after_forward.append(function)

    def begin_forward(self, batch: Batch) -> None:
        """Called by the train module before a micro-batch's training forward."""
        for function in self._before_forward:
            function(batch)

    def end_forward(self) -> None:
        """Called by the train module when a micro-batch's training forward is done."""
        for function in self._after_forward:
            function()

    @torch.no_grad()
    def begin_step(self, *, token_scale: Tensor, num_micro_batches: int) -> None:
        """Write the scales of a step; called by the engine, whose reductions over ranks average.

        Args:
            token_scale: What the engine multiplies the sum over tokens with: number of ranks / valid tokens of all.
            num_micro_batches: Backward passes of this step on this rank, as many on each.
        """
        self.scales.token.copy_(token_scale)
        self.scales.micro_batch.fill_(1 / num_micro_batches)

    def see_step(self, batches: Sequence[Batch], look: Callable[[Batch], None]) -> None:
        """Called by the engine with the micro-batches of a step, after `begin_step`.

        Args:
            batches: This rank's, in their order.
            look: Runs the train module on one, in training mode and without gradients.
        """
        for function in self._before_step:
            function(batches)
        after_look = [function for function, where in self._after_look if where(batches)]
        if after_look:
            with self._looking(batches[0]["input_ids"].device):
                for batch in batches:
                    look(batch)
        for after in after_look:
            after()

    @contextmanager
    def _looking(self, device: torch.device) -> Iterator[None]:
        noted = [account.sums.clone() for account in self.open_accounts]
        devices = [] if device.type == "cpu" else [device]
        self.is_looking = True
        try:
            with torch.no_grad(), torch.random.fork_rng(devices, device_type=device.type):
                yield
        finally:
            self.is_looking = False
        for account, sums in zip(self.open_accounts, noted, strict=True):
            account.sums.copy_(sums)

    @torch.no_grad()
    def take(self) -> Tensor:
        """Return the `sums` of all accounts of this rank, [accounts, 3], and start anew."""
        if not self.accounts:
            return self.scales.token.new_zeros(0, 3)
        sums = torch.stack([account.sums for account in self.open_accounts])
        torch._foreach_zero_([account.sums for account in self.open_accounts])
        return sums

    @property
    def open_accounts(self) -> list[Account]:
        """All accounts, in the order they were opened."""
        return list(self.accounts)  # type: ignore[arg-type]

    def means(self, sums: Tensor, num_valid: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return what losses have been on average, and what they add to the objective.

        Args:
            sums: What `take` returned, added up over ranks.
            num_valid: Tokens with a label, of all ranks since the last record.

        Returns:
            By name: each account's mean, and for names `a/...` their mean as `a`. The sum of the
            accounts' means x their weights.
        """
        means: dict[str, Tensor] = {}
        grouped: dict[str, list[Tensor]] = {}
        weighted = sums.new_zeros(())
        for account, (value, times_factor, count) in zip(self.open_accounts, sums, strict=True):
            divisor = num_valid if account.per == "token" else count.clamp(min=1)
            means[account.name] = value / divisor
            weighted = weighted + times_factor / divisor
            group, separator, _ = account.name.partition("/")
            if separator:
                grouped.setdefault(group, []).append(means[account.name])
        return {name: torch.stack(values).mean() for name, values in grouped.items()} | means, weighted


def ledger_of(module: nn.Module) -> Ledger | None:
    """Return the ledger of a train module, where it has one."""
    return next((child for child in module.children() if isinstance(child, Ledger)), None)
