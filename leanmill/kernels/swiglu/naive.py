"""The gate in plain tensor code: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def swiglu(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up` [..., I] of [..., 2I], where the last dim holds gate, then up."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient [..., 2I] of `gate_up`, given that of `swiglu`'s result."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, dim=-1)
    sigmoid, upstream = gate.sigmoid(), grad.to(wide)
    grad_gate = upstream * up * (sigmoid * (1 + gate * (1 - sigmoid)))
    return torch.cat([grad_gate, upstream * (gate * sigmoid)], dim=-1).to(gate_up.dtype)
