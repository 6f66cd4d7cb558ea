"""Guidance: a change of the velocity in each denoising step, towards something that is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Guidance(Protocol):
    """Called in each denoising step in place of the velocity.

    Attributes:
        differentiates: it computes gradients of the velocity, which not every engine has
            (`Capabilities.differentiable`).
    """

    @property
    def differentiates(self) -> bool: ...

    def __call__(self, velocity: Callable[[Tensor], Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        """dx/dt [B, horizon, action_dim] of noisy actions x_t of that shape at t [B].

        Args:
            velocity: x → dx/dt as the model has it, at t; differentiable in x if `differentiates`.
        """
        ...
