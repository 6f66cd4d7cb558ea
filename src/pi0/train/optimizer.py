"""AdamW, its learning rate over a run, and the moving average of the weights.

Defaults are openpi's (`training/optimizer.py`, `training/config.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pi0.errors import ConfigError


@dataclass(frozen=True)
class OptimizerOptions:
    """How weights change.

    Attributes:
        steps: of the whole run, over which the learning rate falls.
        learning_rate: the highest, reached after `warmup` steps.
        final: the last learning rate, as a part of the highest.
        clip: largest norm of the gradient.
        ema: how much of the moving average stays at every step; 0: there is none.

    Raises:
        ConfigError: a value that has no meaning.
    """

    steps: int = 30_000
    learning_rate: float = 2.5e-5
    warmup: int = 1000
    final: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-10
    clip: float = 1.0
    ema: float = 0.99

    def __post_init__(self) -> None:
        bounds = {
            "steps": (1, 10**9), "learning_rate": (1e-12, 10), "warmup": (0, 10**9),
            "final": (0, 1), "weight_decay": (0, 10), "clip": (1e-12, 1e12), "ema": (0, 0.999999),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name}: expected {low:g} to {high:g}, found {value:g}.")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a straight line up, then a cosine down."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup + 1)
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return self.learning_rate * (self.final + (1 - self.final) * cosine)


def make_optimizer(module: nn.Module, options: OptimizerOptions) -> torch.optim.AdamW:
    """AdamW over what is trained; matrices decay, biases and norms do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
    )


class MovingAverage:
    """The exponential moving average of trained weights, which is what is exported.

    In the first steps it forgets faster, or it would keep the weights that training began with:
    the share that stays at update n is at most (1 + n) / (10 + n), as in TensorFlow's
    `ExponentialMovingAverage`.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], step: int) -> None:
        """Takes in the weights after a step, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, parameter in zip(self.values, parameters, strict=True):
            value.lerp_(parameter.detach(), 1 - decay)
