"""Two matrices in the place of one, with the norm that latent attention has between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


_CONSTANT = 1024.0
"""How much larger than the root mean square of a latent its constant is, at least. RMSNorm divides by
sqrt(constant^2 + |latent|^2) then: by the constant, to |latent|^2 / (2 constant^2), 5e-7 at the mean."""


@dataclass(frozen=True)
class Inputs:
    """What calibration showed of the inputs x of one layer's attention, a one put behind each."""

    gram: Tensor
    """Sum of (x, 1) (x, 1)^T [n + 1, n + 1] fp64."""

    @property
    def num_tokens(self) -> float:
        """How many there were."""
        return float(self.gram[-1, -1])

    @property
    def centre(self) -> Tensor:
        """Of x [n]."""
        return self.gram[:-1, -1] / self.gram[-1, -1]

    @property
    def covariance(self) -> Tensor:
        """Of x [n, n]."""
        centre = self.centre
        return self.gram[:-1, :-1] / self.gram[-1, -1] - centre[:, None] * centre


@dataclass(frozen=True, kw_only=True)
class Latent:
    """How outputs y = W x + b are computed through a latent: down W x, an RMSNorm, and back up.

    The latent holds the principal components of W x around its mean, which lose the least of it. Its last number is a
    constant so large that the norm divides every token by the same, and so changes nothing; it carries b and the mean
    besides.
    """

    components: Tensor
    """Orthonormal columns [out, rank - 1] fp64."""
    offset: Tensor
    """Of W x [out] fp64."""
    constant: float
    """A power of two, which bf16 holds exactly."""
    captured: float
    """Share of the variance of W x that the components hold."""

    @property
    def rank(self) -> int:
        """Numbers of the latent."""
        return self.components.shape[1] + 1

    def down(self, weight: Tensor) -> Tensor:
        """Return what makes the latent of inputs [rank, n], for W [out, n]; the constant is a bias alone."""
        return torch.cat([self.components.t() @ weight, weight.new_zeros(1, weight.shape[1])])

    def down_bias(self) -> Tensor:
        """Return the bias of `down` [rank]."""
        found = self.components.new_zeros(self.rank)
        found[-1] = self.constant
        return found

    def norm_weight(self) -> Tensor:
        """Return the weights of the norm [rank], powers of two.

        About the latent itself leaves it, and a constant of the size of its other numbers: one as large as it is before
        the norm would have every step of an optimizer on what reads it count a thousandfold.
        """
        found = torch.full((self.rank,), _power_of_two(self.constant / math.sqrt(self.rank)))
        found[-1] = _power_of_two(self.constant / _CONSTANT / self.rank)
        return found

    def up(self, read: Callable[[Tensor], Tensor], bias: Tensor) -> Tensor:
        """Return what makes, of the normed latent, what is read of y [m, rank].

        Args:
            read: Takes columns [out, k] that y may be and returns what is wanted of them [m, k]; linear.
            bias: b [out] fp64.
        """
        constant = self.offset - self.components @ (self.components.t() @ self.offset) + bias
        # What leaves the norm for one that enters, and for the constant as a whole.
        gain = self.norm_weight().double() * math.sqrt(self.rank)
        return read(torch.cat([self.components * (self.constant / gain[0]), constant[:, None] / gain[-1]], dim=1))


def _power_of_two(size: float) -> float:
    return float(2.0 ** round(math.log2(size)))


def latent_of(weight: Tensor, inputs: Inputs, rank: int) -> Latent:
    """Return the latent that loses the least of W x.

    Args:
        weight: W [out, n] fp64.
        inputs: What x is like.
        rank: Numbers of the latent, the constant included.
    """
    variances, vectors = torch.linalg.eigh(weight @ inputs.covariance @ weight.t())
    variances, components = variances.flip(0).clamp(min=0), vectors.flip(1)[:, : rank - 1].contiguous()
    held, total = float(variances[: rank - 1].sum()), float(variances.sum())
    offset = weight @ inputs.centre
    size = math.sqrt(held + float((components.t() @ offset).square().sum())) or 1.0
    return Latent(
        components=components,
        offset=offset,
        constant=2.0 ** math.ceil(math.log2(_CONSTANT * size)),
        captured=held / total if total else 1.0,
    )
