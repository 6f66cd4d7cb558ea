"""The dtype policy, all of it: what stays float32 when the model runs in bfloat16.

A module that derives from `Float32` holds float32 parameters and computes in float32 whatever the
model's dtype: normalisations, softmax, rotary embedding, patch and position embedding, and the
small projections of state, action and time. All other modules hold parameters of the model's dtype
and hand on what they get. The Euler state is float32 because the sampler only sees the output of
such a module.

Trunk in bfloat16 with these exceptions is what openpi's PyTorch port does, but for its rotary
frequencies, which it rounds to bfloat16 by accident (0.4 % each, 13 % in the keys).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Sums of squares of larger values leave float32, and a norm answers with zeros.
OVERFLOW = 1e17


class Float32(nn.Module):
    """Computes in float32 and answers in the dtype of its first input."""

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        out: Tensor = super().__call__(x.float(), *args)
        return out.to(x.dtype)


class Float32Linear(Float32, nn.Linear):
    """A linear layer that stays float32."""


def refuse_overflow(x: Tensor) -> Tensor:
    """x itself, or NaN throughout if a value is NaN or too large for a norm to see."""
    return torch.where(x.abs().amax() < OVERFLOW, x, torch.nan) if x.numel() else x


def set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives every parameter the dtype that the policy assigns to it, in place."""
    kept = {
        parameter
        for module in model.modules()
        if isinstance(module, Float32)
        for parameter in module.parameters()
    }
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter in kept else dtype)
