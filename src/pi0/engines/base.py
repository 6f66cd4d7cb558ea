"""Engine: something that computes the stages of π0, and the registry of those there are.

Engines are imported only when asked for. Knows nothing of robots.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint
from pi0.config import Pi0Config
from pi0.errors import EngineError
from pi0.inputs import ModelInputs
from pi0.model import Tap
from pi0.model.flow import integrate
from pi0.model.pi0 import no_tap
from pi0.model.precision import parse_dtype

ENGINES = {
    "reference": "pi0.engines.reference:ReferenceEngine",
    "compiled": "pi0.engines.reference:CompiledEngine",
    "cpu": "pi0.engines.fast.cpu.engine:CpuEngine",
    "cuda": "pi0.engines.fast.cuda.engine:CudaEngine",
    "ttnn": "pi0.engines.tenstorrent.engine:TtnnEngine",
    "ttnn-host": "pi0.engines.tenstorrent.engine:TtnnHostEngine",
    "transformers": "pi0.peers.engine:TransformersEngine",
    "lerobot": "pi0.peers.engine:LerobotEngine",
}
# What people write for precisions.
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Engine(ABC):
    """Computes actions, one call at a time. Inputs and results are float32 tensors on the CPU.

    `tap` sees every stage's result under its name in `pi0.model.STAGES`, and of every block the
    output (`vlm_transformer.block.3`) and in the trunks keys and values [B, T, K, D]
    (`vlm_transformer.block.3.keys`), shaped as in the model. What it hands on is what the engine
    goes on with.
    """

    precisions: ClassVar[tuple[str, ...]]  # the first is the default
    keeps: ClassVar[bool] = False  # whether it takes `cache`
    config: Pi0Config

    @abstractmethod
    def prefill(self, inputs: ModelInputs, tap: Tap = no_tap) -> Any:
        """Runs the prefix, once for all denoising steps.

        Returns what `velocity` wants as `cache`; its type is the engine's own affair.
        """

    @abstractmethod
    def velocity(
        self, x_t: Tensor, t: Tensor, state: Tensor, cache: Any, tap: Tap = no_tap
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

        return require_finite(integrate(velocity, noise, steps))


def require_finite(actions: Tensor) -> Tensor:
    """The actions themselves, if they are finite.

    Raises:
        EngineError: they are not.
    """
    if not torch.isfinite(actions).all():
        raise EngineError(
            "actions: expected finite values, found NaN or infinite ones. The weights or "
            "statistics are damaged: `pi0 trace` shows at which stage."
        )
    return actions


def make_engine(
    name: str,
    checkpoint: Checkpoint,
    device: str | None = None,
    dtype: str | None = None,
    image_size: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    cache: bool = False,
) -> Engine:
    """An engine with a checkpoint's weights.

    Args:
        device: as the engine calls it; None: its default.
        dtype: one of the engine's precisions; None: its first.
        cache: keep packed weights in a file beside the checkpoint, for the next start.

    Raises:
        EngineError: no such engine, precision or device; one that keeps no weights, or no room to
            write, if these are to be kept.
        CheckpointError, ConfigError: see `load_model`.
    """
    dtype = choose_precision(name, dtype)
    engine = _find(name)
    if cache and not engine.keeps:
        raise EngineError(
            f"cache: expected an engine that keeps packed weights (cpu), found {name}. Leave out "
            "--weight-cache."
        )
    kept = {"cache": True} if cache else {}
    made: Engine = engine(checkpoint, device, dtype, image_size, progress, **kept)
    return made


def check_engine_available(
    name: str, config: Pi0Config, device: str | None = None, image_size: int | None = None
) -> None:
    """Says what an engine lacks before there is work, for those who make it later.

    An engine that can tell has a classmethod `need`, called with the last three arguments.

    Raises:
        EngineError: no such engine; or its library, device or image size is not to be had.
    """
    need = getattr(_find(name), "need", None)
    if need is not None:
        need(config, device, image_size)


def choose_precision(name: str, dtype: str | None) -> str:
    """The precision that an engine of this name runs in.

    Raises:
        EngineError: no such engine, or not one of its precisions.
        ConfigError: float16.
    """
    precisions = _find(name).precisions
    dtype = DTYPE_ALIASES.get(dtype or "", dtype)
    if dtype == "float16":
        parse_dtype(dtype)  # says why not
    if dtype is not None and dtype not in precisions:
        raise EngineError(
            f"dtype: expected one of {', '.join(precisions)} for engine {name}, found {dtype!r}."
        )
    return dtype or precisions[0]


def _find(name: str) -> Any:
    if name not in ENGINES:
        raise EngineError(f"engine: expected one of {', '.join(ENGINES)}, found {name!r}.")
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
