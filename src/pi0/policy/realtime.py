"""Real-time chunking: the next chunk goes on from what the robot is about to execute.

While a chunk is computed, the robot executes the rest of the previous one. The new chunk is made to
agree with that rest by inpainting: in each denoising step the velocity is corrected towards it,
fully where the actions will have been executed before the new chunk arrives, less and less after.

Source: Black, Galliker, Levine, "Real-Time Execution of Action Chunking Flow Policies", arXiv
2506.07339, equations 2 to 5. Its time τ runs from noise to actions; ours is t = 1 - τ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pi0.errors import ConfigError, EngineError, ObservationError
from pi0.inputs import OVERFLOW_SIGMA, to_float64
from pi0.number import is_real, is_whole
from pi0.policy.pipeline import Pipeline

SCHEDULES = ("exponential", "linear", "ones", "zeros")
JACOBIANS = ("exact", "identity")


@dataclass(frozen=True)
class RealTimeChunking:
    """How a new chunk is made to agree with the previous one.

    The defaults are the paper's; LeRobot 0.6.1 computes max_guidance=10, schedule="linear",
    overlap=10 and jacobian="identity" (there `max_guidance_weight`, `prefix_attention_schedule` and
    `execution_horizon`; its gradient is taken with respect to a tensor that the velocity was not
    computed from, which leaves the identity).

    Attributes:
        max_guidance: β of equation 2, the largest weight of the correction.
        schedule: how weights fall over the overlap, after the actions that are executed in any
            case: "exponential" (equation 5), "linear", "ones" (not at all) or "zeros" (at once).
        overlap: the most remaining actions of the previous chunk that count; None: all.
        jacobian: "exact": the correction is a vector-Jacobian product through the denoiser, for
            engines that are differentiable; "identity": the Jacobian is taken as the identity,
            which takes no backward pass and which every engine can.
    """

    max_guidance: float = 5.0
    schedule: str = "exponential"
    overlap: int | None = None
    jacobian: str = "exact"

    def __post_init__(self) -> None:
        """Raises ConfigError for a setting that does not exist."""
        for name, allowed in (("schedule", SCHEDULES), ("jacobian", JACOBIANS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name}: expected one of {', '.join(allowed)}, found {getattr(self, name)!r}."
                )
        if not is_real(self.max_guidance) or not 0 < self.max_guidance < math.inf:
            raise ConfigError(
                f"max_guidance: expected a finite number above 0, found {self.max_guidance!r}."
            )
        if self.overlap is not None and not (is_whole(self.overlap) and self.overlap >= 1):
            raise ConfigError(
                f"overlap: expected a whole number of actions, at least 1, found {self.overlap!r}."
            )


class Inpainting:
    """Guidance of a chunk towards the previous one's remaining actions; see `Guidance`."""

    def __init__(
        self,
        settings: RealTimeChunking,
        previous: Tensor,
        delay: int,
        horizon: int,
        guided: Tensor | None = None,
    ) -> None:
        """
        Args:
            previous: [n, action_dim of the model] in the model's units for the new observation;
                the first is for the tick of that observation.
            delay: how many of them will have been executed when the new chunk arrives.
            horizon: actions of the new chunk, at least n.
            guided: [action_dim] bool, the dimensions that are guided; None: all.
        """
        self.settings = settings
        remaining = len(previous)
        self.target = torch.zeros(horizon, previous.shape[1])
        self.target[:remaining] = previous
        end = remaining if settings.overlap is None else min(settings.overlap, remaining)
        self.weights = soft_mask(horizon, delay, end, settings.schedule)[:, None]
        if guided is not None:
            self.weights = self.weights * guided

    @property
    def differentiates(self) -> bool:
        """See `Guidance`."""
        return self.settings.jacobian == "exact"

    def __call__(self, velocity: Callable[[Tensor], Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        """The corrected velocity [B, horizon, action_dim] (equation 2, with the sign of our t)."""
        t = t[:, None, None]
        if self.differentiates:
            v, correction = self._exact(velocity, x_t, t)
        else:
            v = velocity(x_t)
            correction = self._error(x_t - t * v)
        return v - guidance_weight(t, self.settings.max_guidance) * correction

    def _exact(
        self, velocity: Callable[[Tensor], Tensor], x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The velocity, and (Y - Â)ᵀ diag(W) ∂Â/∂x of equation 2."""
        with torch.enable_grad():
            x = x_t.detach().clone().requires_grad_()
            v = velocity(x)
            if not v.requires_grad:  # else the identity would silently take the Jacobian's place
                raise EngineError(
                    "velocity: expected one that autograd can follow, as the engine declares, "
                    'found none. Use jacobian="identity".'
                )
            estimate = x - t * v
            (correction,) = torch.autograd.grad(estimate, x, self._error(estimate.detach()))
        return v.detach(), correction

    def _error(self, estimate: Tensor) -> Tensor:
        """What the estimate of the actions Â (equation 3) lacks to the target, weighted."""
        return self.weights * (self.target - estimate)


def guidance_weight(t: Tensor, maximum: float) -> Tensor:
    """min(β, (1-τ) / (τ r²)) with r² = (1-τ)² / (τ² + (1-τ)²) and τ = 1 - t: equations 2 and 4."""
    tau = 1 - t
    return ((tau**2 + t**2) / (tau * t)).clamp(max=maximum)


def soft_mask(horizon: int, delay: int, end: int, schedule: str = "exponential") -> Tensor:
    """The weights W of equation 5: [horizon] float32.

    1 for the first `delay` actions, which are executed in any case; from there to `end` falling;
    then 0. `end` is H - s in the paper, s being the actions executed between two inferences.
    """
    index = torch.arange(horizon)
    start = min(delay, end)
    c = (end - index) / (end - start + 1)
    falling = {
        "exponential": c * torch.expm1(c) / (math.e - 1),
        "linear": c,
        "ones": torch.ones(horizon),
        "zeros": torch.zeros(horizon),
    }[schedule]
    return torch.where(index < start, 1.0, torch.where(index < end, falling, 0.0))


def make_inpainting(
    settings: RealTimeChunking,
    pipeline: Pipeline,
    previous: NDArray[np.floating] | Tensor,
    delay: int,
    state: NDArray[np.float64],
) -> Inpainting:
    """The guidance of a chunk for a new observation.

    The previous actions are encoded anew: where actions are relative, the same motion is other
    numbers for another state. Dimensions that the robot does not have, or that never moved in
    training, are not guided.

    Args:
        previous: [n, D] in the robot's units, the first for the tick of the new observation.
        delay: how many of them will have been executed when the new chunk arrives.
        state: [D] as observed.

    Raises:
        ObservationError: `previous` is not a part of a chunk of this robot, or `delay` is not
            within the chunk.
    """
    config = pipeline.config
    actions = to_float64("previous", previous)
    width = pipeline.action_dim
    if actions.shape[1:] != (width,) or not 1 <= len(actions) <= config.horizon:
        raise ObservationError(
            f"previous: expected 1 to {config.horizon} actions [n, {width}], found shape "
            f"{list(actions.shape)}."
        )
    if not np.isfinite(actions).all():
        raise ObservationError("previous: expected finite values, found NaN or infinite ones.")
    if not is_whole(delay) or not 0 <= delay <= config.horizon:
        raise ObservationError(
            f"delay: expected a whole number of ticks from 0 to {config.horizon}, found {delay!r}."
        )
    target = pipeline.encode_actions(actions, state)
    if not np.abs(target).max() <= OVERFLOW_SIGMA:
        raise ObservationError(
            f"previous: expected values less than {OVERFLOW_SIGMA:g} standard deviations or half "
            "ranges from what the checkpoint was trained on, found "
            f"{np.abs(actions).max():.6g}. Is it this robot's, in its units?"
        )
    guided = torch.arange(config.action_dim) < width
    guided[pipeline.target_stats.flat(width)] = False
    encoded = torch.from_numpy(target.astype(np.float32))
    return Inpainting(settings, encoded, int(delay), config.horizon, guided)


def require_inverse(pipeline: Pipeline) -> None:
    """Raises ConfigError unless statistics bring actions back to where they came from.

    Some LeRobot checkpoints normalise actions otherwise than they unnormalise them: the previous
    chunk would be inpainted as other actions.
    """
    width = pipeline.action_stats.width
    moving = np.setdiff1d(np.arange(width), pipeline.action_stats.flat(width))
    for value in (-1.0, 1.0):
        given = np.full(width, value)
        back = pipeline.target_stats.normalize(pipeline.action_stats.unnormalize(given))
        off = np.abs(back - given)[moving]
        if off.size and off.max() > 1e-3:
            raise ConfigError(
                "real-time chunking: expected a checkpoint that normalises actions as it "
                f"unnormalises them, found that {value:g} in action {moving[off.argmax()]} comes "
                f"back as {back[moving[off.argmax()]]:.6g}. Correct its processor files."
            )
