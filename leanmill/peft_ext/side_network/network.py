"""The networks beside a model: what they make of the hidden states of its blocks.

Imports nothing of Leanmill, so that it can travel with its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Stream:
    """Hidden states of the forward under way, from the embeddings on."""

    def __init__(self) -> None:
        self._states: list[Tensor] = []
        self.num_past = 0
        """Tokens of which the model kept keys and values when the forward began."""

    @torch.compiler.disable
    def see(self, hidden: Tensor, given: dict[str, Any], *, is_first: bool) -> None:
        """Keep hidden states [B, S, H] of a block that is about to run; the first ones drop what another forward left.

        Args:
            hidden: What the block gets.
            given: Its other arguments by name.
            is_first: Whether it is the model's first block.
        """
        if is_first:
            cache = given.get("past_key_values")
            self._states, self.num_past = [], 0 if cache is None else int(cache.get_seq_length())
        self._states.append(hidden)

    @torch.compiler.disable
    def take(self) -> list[Tensor]:
        """Return what was kept, once: nothing keeps it alive after the forward."""
        states, self._states = self._states, []
        return states


class SideNetwork(nn.Module):
    """What both networks share.

    Args:
        hidden_size: H of the model.
        num_states: Hidden states that it reads, at least 2.
        size: D, of its own features.
        keeps_base: Whether the model's own hidden states are added to what it makes.
    """

    def __init__(self, hidden_size: int, num_states: int, size: int, keeps_base: bool) -> None:
        super().__init__()
        self.keeps_base = keeps_base
        self.up = nn.Linear(size, hidden_size)

    def reset_parameters(self) -> None:
        """Draw them; one that adds to the model starts by adding nothing."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        if self.keeps_base:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)


class UniPT(SideNetwork):
    """Every layer's features are asked by the last layer's, and what they answer is mixed token by token.

    With f_l = LayerNorm(D_l h_l) for the hidden states h_0 .. h_L, the last of them the anchor a:

        m_l = (I + relu(a f_l^T) / sum over keys of relu(a f_l^T)) f_l
        c   = softmax over l of gate(a * f_l)
        out = U relu(a + LayerNorm(P sum_l c_l m_l))

    where keys are the tokens that attention sees. Diao et al. 2023, arXiv:2308.14316, after the released code
    (VSE-infty/lib/adapter_for_transformer.py), which is for whole texts: there every token is a key of every other,
    and c is one for a text, from the means of a and f_l over it.
    """

    eps = 1e-8

    def __init__(self, hidden_size: int, num_states: int, size: int, keeps_base: bool) -> None:
        super().__init__(hidden_size, num_states, size, keeps_base)
        self.down = nn.ModuleDict({str(n): _Down(hidden_size, size) for n in range(num_states)})
        self.projection = _Down(size, size)
        self.gate = nn.Linear(size, 1, bias=False)  # softmax takes a bias out again
        self._past: WeakKeyDictionary[Any, list[Tensor]] = WeakKeyDictionary()

    def forward(self, states: Sequence[Tensor], seen: Seen) -> Tensor:
        """Return hidden states [B, S, H] in the place of the last ones.

        Args:
            states: [B, S, H] each, the last block's last.
            seen: Which tokens a token sees.
        """
        *features, anchor = [down(state) for down, state in zip(self.down.values(), states, strict=True)]
        confidence = torch.cat([self.gate(anchor * one) for one in features], dim=-1).float().softmax(-1)
        keys = self._with_past(features, seen)
        mask = seen.mask(anchor.shape[1], keys[0].shape[1], anchor.device)
        mixed = torch.zeros_like(anchor)
        for number, (own, context) in enumerate(zip(features, keys, strict=True)):
            answered = own + _asked(anchor, context, mask, self.eps)
            mixed = mixed + confidence[..., number : number + 1].to(answered.dtype) * answered
        made = self.up(torch.relu(anchor + self.projection(mixed)))
        return states[-1] + made if self.keeps_base else made  # type: ignore[no-any-return]

    @torch.compiler.disable
    def _with_past(self, features: list[Tensor], seen: Seen) -> list[Tensor]:
        """Put before `features` those of earlier tokens, of which the model keeps keys and values only."""
        if seen.cache is None:
            return features
        num_past = seen.num_past
        earlier = self._past.get(seen.cache, []) if num_past else []
        if num_past and (not earlier or earlier[0].shape[1] < num_past):
            raise ValueError(
                f"the side network has no features of the {num_past} tokens that the cache begins with; give it a "
                f"cache that this model filled, or use_cache=False"
            )
        if num_past:
            features = [torch.cat([old[:, :num_past], new], 1) for old, new in zip(earlier, features, strict=True)]
        self._past[seen.cache] = features
        return features


class Sherl(SideNetwork):
    """Earlier layers are merged, what they have in common counted once, and the late blocks go on from that.

    With f_l = (F x + x) * sigmoid(G x), x = relu(D_l h_l), for the hidden states h_0 .. h_K, token by token:

        r_l = sum over j of relu(cos(f_l, f_j))
        w_l = relu(v f_l * f_K) / r_l, divided by its sum over l
        out = U relu(f_K + sum_l w_l f_l) + g h_K

    with l and j below K, and g = 1, or without `keeps_base` tanh(p / 0.1) with p trained from 0. Diao et al. 2024,
    arXiv:2407.07523, after the released code for language (modeling_side_t5.py: MTSAdapter); g = 1 is that of
    its CLIP4Clip.
    """

    eps = 1e-6
    temperature = 0.1

    def __init__(self, hidden_size: int, num_states: int, size: int, keeps_base: bool) -> None:
        super().__init__(hidden_size, num_states, size, keeps_base)
        self.down = nn.ModuleDict({str(n): _GatedDown(hidden_size, size) for n in range(num_states)})
        self.attention = nn.Linear(size, 1)
        self.gate = None if keeps_base else nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def forward(self, states: Sequence[Tensor], seen: Seen) -> Tensor:
        """Return hidden states [B, S, H] in the place of the last of `states`; see `UniPT.forward`."""
        *features, guide = [down(state) for down, state in zip(self.down.values(), states, strict=True)]
        shallow = torch.stack(features, dim=-2)  # [B, S, L, D]
        alike = shallow.float()
        alike = alike / (alike.square().sum(-1, keepdim=True).sqrt() + self.eps)
        redundancy = torch.relu(alike @ alike.mT).sum(-1, keepdim=True)
        weights = torch.relu(self.attention(shallow * guide.unsqueeze(-2))).float() / redundancy
        weights = weights / (weights.sum(-2, keepdim=True) + self.eps)
        merged = (weights.to(shallow.dtype) * shallow).sum(-2) + guide
        made = self.up(torch.relu(merged))
        last = states[-1]
        return made + (last if self.gate is None else torch.tanh(self.gate / self.temperature) * last)  # type: ignore[no-any-return]


class _Down(nn.Module):
    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(hidden_size, size), nn.LayerNorm(size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.linear(hidden))  # type: ignore[no-any-return]


class _GatedDown(nn.Module):
    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.linear, self.mix, self.open = nn.Linear(hidden_size, size), nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = torch.relu(self.linear(hidden))
        return (self.mix(inner) + inner) * torch.sigmoid(self.open(inner))  # type: ignore[no-any-return]


NETWORKS: dict[str, type[SideNetwork]] = {"unipt": UniPT, "sherl": Sherl}


def _asked(anchor: Tensor, context: Tensor, mask: Tensor, eps: float) -> Tensor:
    """relu(a f^T), over the sum of its row, times f; the scores [B, S, T] are made once more in backward."""
    if torch.is_grad_enabled() and anchor.requires_grad:
        return checkpoint(_ask, anchor, context, mask, eps, use_reentrant=False)  # type: ignore[no-any-return]
    return _ask(anchor, context, mask, eps)


def _ask(anchor: Tensor, context: Tensor, mask: Tensor, eps: float) -> Tensor:
    scores = torch.relu((anchor @ context.mT).float()).masked_fill(~mask, 0.0)
    return (scores / (scores.sum(-1, keepdim=True) + eps)).to(context.dtype) @ context


class Seen:
    """Which tokens a token sees, by what a decoder block is called with.

    Args:
        given: The block's arguments by name.
        num_past: See `Stream`.
    """

    def __init__(self, given: dict[str, Any], num_past: int) -> None:
        self._given, self.num_past = given, num_past

    @property
    def cache(self) -> Any:
        """What keeps keys and values of earlier calls, where something does."""
        return self._given.get("past_key_values")

    def mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """Return bool [B or 1, S, T]: what attention is shown, or the earlier tokens of a document.

        A family that gives its blocks neither a mask nor positions tells of no documents, and rows are one each.
        """
        mask = self._given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4:
            whole = mask[:, 0, :, :num_keys]
            return whole if whole.dtype == torch.bool else whole == 0
        if hasattr(mask, "mask_mod"):  # flex_attention's BlockMask
            return _by_places(mask, num_queries, num_keys, device)
        places = torch.arange(num_keys, device=device)
        queries = places[num_keys - num_queries :]
        seen = (places <= queries[:, None])[None]
        positions = self._given.get("position_ids")
        if isinstance(positions, Tensor) and num_queries == num_keys:
            starts = places - positions  # equal within a document
            seen = seen & (starts[:, :, None] == starts[:, None, :])
        if isinstance(mask, Tensor) and mask.dim() == 2:
            seen = seen & mask[:, None, :num_keys].bool()
        return seen


@torch.compiler.disable
def _by_places(mask: Any, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Return what a BlockMask says of each place, bool [B, S, T]; it counts queries from the first of this call."""
    rows, queries, keys = (torch.arange(size, device=device) for size in (mask.shape[0], num_queries, num_keys))
    seen = mask.mask_mod(rows[:, None, None], torch.zeros_like(rows[0]), queries[:, None], keys)
    return seen.expand(len(rows), num_queries, num_keys)  # type: ignore[no-any-return]
