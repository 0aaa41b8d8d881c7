"""Whether a model calls the modules that carry stages, or reads their weights behind their backs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.encoders import encoder_inputs, is_encoder
from leanmill.core.errors import ConfigError
from leanmill.core.experts import is_stacked_experts
from leanmill.core.site import EmbeddingSite, LinearSite, Site
from leanmill.core.sites import iter_sites


_NUM_TOKENS = 2


@torch.no_grad()
def check_sites_are_called(model: nn.Module) -> None:
    """Run a model on the meta device once and refuse staged sites that nothing calls.

    A family that multiplies with `proj.weight` itself would train without the stages, and nobody would
    notice. Families that cannot run on the meta device are let pass, as are experts, whose compute we choose.

    Args:
        model: A causal LM on the meta device, its techniques installed.

    Raises:
        ConfigError: A staged linear layer or embedding is never called.
    """
    staged = {name: site for name, site in iter_sites(model) if site.is_staged}
    watched = {name: site for name, site in staged.items() if isinstance(site, LinearSite | EmbeddingSite)}
    missed = uncalled(model, watched)
    if missed:
        site = watched[missed[0]]
        technique = [*site.weight_stages(), *site.input_stages()][0].technique
        raise ConfigError(
            f"{type(model).__name__} never calls {missed[0]} ({len(missed)} of {len(watched)} staged weights), but "
            f"uses its weight otherwise or not at all, so {technique} would do nothing there; add {missed[0]!r} to "
            f"{technique}.exclude"
        )


@torch.no_grad()
def uncalled(model: nn.Module, watched: Mapping[str, Site]) -> list[str]:
    """Return the names of linear layers and embeddings that a causal LM on the meta device never calls.

    None where it cannot run there.
    """
    if not watched:
        return []
    called: set[int] = set()
    was_training = model.training
    try:
        with _plain(model, called):
            model.eval()(**_inputs(model))
    except Exception:  # noqa: BLE001 (what a family does on meta is its own business)
        return []
    finally:
        model.train(was_training)
    return [name for name, site in watched.items() if id(site) not in called]


def _inputs(model: nn.Module) -> dict[str, Any]:
    ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.int64, device="meta")
    if is_encoder(model):
        return encoder_inputs(model, {"input_ids": ids, "position_ids": torch.zeros_like(ids)})
    # A ready mask: to make one, transformers would look at values of the positions.
    mask = torch.zeros(1, 1, _NUM_TOKENS, _NUM_TOKENS, device="meta")
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


@contextmanager
def _plain(model: nn.Module, called: set[int]) -> Iterator[None]:
    """Let sites note their calls and compute without stages, and experts nothing, inside the context."""
    with ExitStack() as stack:
        for module in model.modules():
            if is_stacked_experts(module):
                stack.enter_context(_other_forward(module, lambda hidden, *rest, **options: hidden))
            elif isinstance(module, LinearSite | EmbeddingSite):
                stack.enter_context(_other_forward(module, _noting(module, called)))
        yield


def _noting(site: LinearSite | EmbeddingSite, called: set[int]) -> Any:
    def forward(input: Tensor) -> Tensor:  # noqa: A002
        called.add(id(site))
        if isinstance(site, EmbeddingSite):
            return F.embedding(input, site.weight)
        return F.linear(input, site.weight, site.bias)

    return forward


@contextmanager
def _other_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
