"""Flow matching: how time is embedded and how actions are sampled.

Time runs from t = 1 (noise) to t = 0 (actions), the convention of openpi's code, opposite to that
of its paper (arXiv 2410.24164).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pi0.config import MAX_STEPS
from pi0.errors import ConfigError

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0
SAMPLERS = {"euler": 1, "midpoint": 2}  # velocities that a step takes


def embed_time(t: Tensor, width: int) -> Tensor:
    """Sine and cosine of t at width/2 geometrically spaced periods: [B] → [B, width] float32.

    Angles are computed in float64: at the shortest period they reach 1571 rad.
    Source: openpi `posemb_sincos`, periods 4e-3 to 4.
    """
    half = width // 2
    fraction = torch.linspace(0, 1, half, dtype=torch.float64, device=t.device)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angle = 2 * math.pi * t.double()[:, None] / period
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int, sampler: str = "euler"
) -> Tensor:
    """From noise at t = 1 to actions at t = 0, in the dtype of the noise.

    Args:
        velocity: (x [B, ...], t [B]) → dx/dt, shaped as x.
        noise: x at t = 1.
        steps: how many equal steps to take.
        sampler: of `SAMPLERS`: "euler", as openpi does, with the velocity where a step begins; or
            "midpoint", with the one half way of Euler's step, whose error falls as steps².

    Raises:
        ConfigError: no such number of steps, or no such sampler.
    """
    check_sampler(sampler)

    def dx_dt(x: Tensor, time: float) -> Tensor:
        return velocity(x, torch.full((len(x),), time, dtype=torch.float32, device=x.device))

    x = noise
    for time in schedule(steps):
        v = dx_dt(x, time)
        if sampler == "midpoint":
            v = dx_dt(x - v / (2 * steps), time - 1 / (2 * steps))
        x = x - v / steps
    return x


def check_sampler(name: str) -> str:
    """The name itself; ConfigError if there is no such sampler."""
    if name not in SAMPLERS:
        raise ConfigError(f"sampler: expected one of {', '.join(SAMPLERS)}, found {name!r}.")
    return name


def schedule(steps: int) -> list[float]:
    """The time t of each of `steps` equal steps; ConfigError if there cannot be so many."""
    if not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"steps: expected 1 to {MAX_STEPS}, found {steps}.")
    return [1 - i / steps for i in range(steps)]
