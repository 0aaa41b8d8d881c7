"""What stands behind the model in multi-token prediction: a chain of blocks, each with a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leanmill.architecture.multi_token.targets import labels_ahead, tokens_ahead
from leanmill.core.account import Account
from leanmill.core.around import Around, Beside, Call, Ring
from leanmill.core.batches import Batch
from leanmill.core.errors import RunError
from leanmill.core.shared_head import SharedHead


class Stream:
    """What the chain needs of the forward under way: its batch, and how the last block was called."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def see_batch(self, batch: Batch) -> None:
        """Note the batch of the next forward."""
        self.batch = batch

    @torch.compiler.disable
    def see_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note masks and positions."""
        self._call = args, kwargs

    def take_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the noted arguments, once: nothing keeps them alive after the forward."""
        call, self._call = self._call, None
        if call is None:
            raise RunError("multi_token did not see the model's last block run")
        return call


class SeenBlock(Around):
    """Around the last block: tells the chain how it was called."""

    technique: ClassVar[str] = "multi_token"
    ring: ClassVar[Ring] = Ring.TAP

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, call: Call, /, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            self.stream.see_call(args, kwargs)
        return call(hidden, *args, **kwargs)


class Depth(nn.Module):
    """One further token: h' = M [norm(emb(t_{i+k})); norm(h)], a block of the model's kind, and a norm.

    M's columns are in the order of the released checkpoint of DeepSeek-V3, embedding first; the paper writes the
    hidden state first.

    Args:
        hidden_size: H.
        norm: Makes a norm [H].
        block: A decoder block.
    """

    def __init__(self, hidden_size: int, norm: Callable[[], nn.Module], block: nn.Module) -> None:
        super().__init__()
        self.enorm, self.hnorm = norm(), norm()
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False, device="meta")
        self.block, self.post_norm = block, norm()

    def forward(self, hidden: Tensor, embedded: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Return the hidden states [B, S, H] that the head and the next depth get.

        Args:
            hidden: [B, S, H] of the model, or of the depth before.
            embedded: [B, S, H] of the tokens k ahead.
            args: What else the model's last block got, by position.
            kwargs: And by name.
        """
        joined = torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1)
        return self.post_norm(self.block(self.eh_proj(joined), *args, **kwargs))  # type: ignore[no-any-return]


class FurtherTokens(Around):
    """Around the model's last norm: in training, adds the losses of further tokens.

    Depth k sees what the depth before made, behind its norm, as transformers and the released checkpoints do it;
    depth 1 sees the model's last hidden state.

    Args:
        model: The causal LM, whose embedding is shared.
        head: Its head, shared too.
        stream: Of the forward.
        depths: The chain.
        accounts: One for each depth, per token.
        family_has_place: Whether checkpoints of the family hold further blocks.
    """

    technique: ClassVar[str] = "multi_token"
    ring: ClassVar[Ring] = Ring.TAP

    def __init__(
        self,
        model: Any,
        head: SharedHead,
        stream: Stream,
        depths: Sequence[Depth],
        accounts: Sequence[Account],
        *,
        family_has_place: bool,
    ) -> None:
        super().__init__()
        # No ModuleList: the longest one of a model holds its blocks.
        self.depths = nn.ModuleDict({str(number): depth for number, depth in enumerate(depths, 1)})
        self.head, self.stream, self.accounts = head, stream, tuple(accounts)
        self.family_has_place = family_has_place
        self.__dict__["_lm"] = model  # past nn.Module's registration, which would make a cycle of parents

    def forward(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        return self._with_losses(output) if self.training else output

    def _with_losses(self, output: Tensor) -> Tensor:
        batch, (args, kwargs) = self.stream.batch, self.stream.take_call()
        if batch is None:
            raise RunError("multi_token was not told the tokens of a batch")
        hidden, embed = output, self._lm.get_input_embeddings()
        for number, (depth, account) in enumerate(zip(self.depths.values(), self.accounts, strict=True), 1):
            hidden = depth(hidden, embed(tokens_ahead(batch, number)), args, kwargs)
            output = account.attach(output, self.head.cross_entropy(hidden, labels_ahead(batch, number)))
        return output

    @property
    def _lm(self) -> Any:
        return self.__dict__["_lm"]

    def blocks(self) -> Iterator[nn.Module]:
        for depth in self.depths.values():
            yield depth.block  # type: ignore[misc]

    def decays(self, name: str) -> bool:
        return True

    def reset_parameters(self) -> None:
        """Draw them as the family draws its own."""
        for module in self.depths.modules():
            self._lm._init_weights(module)

    def beside(self) -> Beside:
        if not self.family_has_place:
            family = self._lm.config.model_type
            return Beside(notes=(f"the blocks of multi_token are left out: {family} has no place for them",))
        first: int = self._lm.config.num_hidden_layers
        prefix = f"{self._lm.base_model_prefix}.layers"
        weights: dict[str, Tensor] = {}
        for index, depth in enumerate(self.depths.values(), first):
            weights |= {f"{prefix}.{index}.{_stored(name)}": value for name, value in depth.state_dict().items()}
        last = first + len(self.depths) - 1
        which = f"{prefix}.{first}" if last == first else f"{prefix}.{first} to {last}"
        return Beside(
            weights=weights,
            settings={"num_mtp_layers": len(self.depths)},
            notes=(f"the blocks of multi_token are written as {which}, which transformers reads for drafting only",),
        )


def _stored(name: str) -> str:
    """What released checkpoints call a tensor of a depth."""
    return name.removeprefix("block.").replace("post_norm.", "shared_head.norm.")
