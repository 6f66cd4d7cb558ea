"""Engine: something that computes the stages of π0, and the registry of those there are.

Engines are imported only when asked for. Knows nothing of robots.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint
from pi0.config import Pi0Config
from pi0.errors import EngineError
from pi0.inputs import ModelInputs
from pi0.model import PrefixCache, Tap
from pi0.model.flow import integrate
from pi0.model.pi0 import no_tap

ENGINES = {"reference": "pi0.engines.reference:ReferenceEngine"}


class Engine(ABC):
    """Computes actions. Inputs and results are float32 tensors on the CPU.

    `tap` sees every stage's result under its name in `pi0.model.STAGES`, and every block's.
    """

    config: Pi0Config

    @abstractmethod
    def prefill(self, inputs: ModelInputs, tap: Tap = no_tap) -> PrefixCache:
        """Runs the prefix, once for all denoising steps."""

    @abstractmethod
    def velocity(
        self, x_t: Tensor, t: Tensor, state: Tensor, cache: PrefixCache, tap: Tap = no_tap
    ) -> Tensor:
        """dx/dt [B, horizon, action_dim] of noisy actions x_t of that shape at t [B]."""

    def sample(
        self,
        inputs: ModelInputs,
        noise: Tensor,
        steps: int = 10,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Actions [B, horizon, action_dim] from noise of that shape.

        Raises:
            EngineError: the result is not finite.
        """
        cache = self.prefill(inputs)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            v = self.velocity(x, t, inputs.state, cache)
            on_step()
            return v

        actions = integrate(velocity, noise, steps)
        if not torch.isfinite(actions).all():
            raise EngineError(
                "actions: expected finite values, found NaN or infinite ones. The weights or "
                "statistics are damaged: `pi0 trace` shows at which stage."
            )
        return actions


def make_engine(
    name: str,
    checkpoint: Checkpoint,
    device: str = "cpu",
    dtype: str = "float32",
    image_size: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Engine:
    """An engine with a checkpoint's weights.

    Raises:
        EngineError: no such engine or device.
        CheckpointError, ConfigError: see `load_model`.
    """
    if name not in ENGINES:
        raise EngineError(f"engine: expected one of {', '.join(ENGINES)}, found {name!r}.")
    module, _, attribute = ENGINES[name].partition(":")
    engine = getattr(importlib.import_module(module), attribute)
    made: Engine = engine(checkpoint, device, dtype, image_size, progress)
    return made
