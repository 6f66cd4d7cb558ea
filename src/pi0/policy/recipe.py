"""How a policy is made from a checkpoint, as data that another process can be given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pi0.policy.policy import Policy
from pi0.policy.realtime import RealTimeChunking
from pi0.policy.setup import PolicyOptions


@dataclass(frozen=True)
class PolicyRecipe:
    """Arguments of `Policy.from_checkpoint`; can be pickled.

    Attributes:
        checkpoint: a path as `Policy.from_checkpoint` takes it.
        options: pre- and post-processing; the robot's table reads the observation.
        engine: ENGINE[:PRECISION][@DEVICE], or "auto".
        steps: denoising steps; None: what config.json says, else 10.
        sampler: "euler" or "midpoint".
        on_limit: "error", "clamp" or "warn", for actions beyond the robot's limits.
        horizon, max_tokens, base, weight_cache: see `Policy.from_checkpoint`.
        real_time: how a chunk continues what is left of the previous one; None: it does not.
    """

    checkpoint: Path | str
    options: PolicyOptions = field(default_factory=PolicyOptions)
    engine: str = "auto"
    steps: int | None = None
    on_limit: str = "error"
    horizon: int | None = None
    max_tokens: int | None = None
    base: Path | str | None = None
    real_time: RealTimeChunking | None = None
    weight_cache: bool = False
    sampler: str = "euler"

    def make(self) -> Policy:
        """Loads the checkpoint.

        Raises:
            Pi0Error: see `Policy.from_checkpoint`.
        """
        return Policy.from_checkpoint(
            self.checkpoint,
            **vars(self.options),
            engine=self.engine,
            steps=self.steps,
            sampler=self.sampler,
            on_limit=self.on_limit,
            horizon=self.horizon,
            max_tokens=self.max_tokens,
            base=self.base,
            real_time=self.real_time,
            weight_cache=self.weight_cache,
        )
