"""The model itself, eagerly, on a CPU or CUDA device: what other engines are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint, load_model
from pi0.config import Pi0Config
from pi0.dtypes import DTYPES, parse_dtype
from pi0.engines.base import Capabilities, Engine, EngineOptions, exclusive
from pi0.errors import EngineError
from pi0.inputs import ModelInputs
from pi0.model import PrefixCache, Tap
from pi0.model.pi0 import no_tap


class ReferenceEngine(Engine):
    """See `Engine`; results stay on the device between prefill and velocity."""

    name = "reference"
    capabilities = Capabilities(
        precisions=tuple(DTYPES),
        devices=("cpu", "cuda"),
        differentiable=True,
        whole_logits=True,
    )
    unrounded = MappingProxyType(dict.fromkeys(DTYPES, "reference:float32"))

    def __init__(self, checkpoint: Checkpoint, options: EngineOptions) -> None:
        super().__init__(checkpoint, options)
        self.device = parse_device(options.device or "cpu")
        dtype = parse_dtype(options.precision)
        self.model = load_model(
            checkpoint, dtype, self.device, options.image_size, options.progress
        )

    @classmethod
    def check_available(cls, config: Pi0Config, options: EngineOptions) -> None:
        """See `Engine`."""
        parse_device(options.device or "cpu")

    @exclusive
    @torch.no_grad()  # not inference mode: guidance differentiates `velocity`, which reads this
    def prefill(self, inputs: ModelInputs, tap: Tap = no_tap) -> PrefixCache:
        return self.model.prefill(inputs.to(self.device), tap)

    @exclusive
    def velocity(self, x_t: Tensor, t: Tensor, cache: PrefixCache, tap: Tap = no_tap) -> Tensor:
        with torch.inference_mode(not x_t.requires_grad):
            return self.model.velocity(x_t.to(self.device), t.to(self.device), cache, tap).cpu()

    def _close(self) -> None:
        del self.model


class CompiledEngine(ReferenceEngine):
    """The model through `torch.compile`: what PyTorch makes of it by itself, a baseline to beat.

    The first call at a shape compiles, which takes a C++ compiler and up to minutes.
    """

    name = "compiled"
    # 0.6 GB for a prefix of 4000 where the eager model takes 1.0: the softmax is fused.
    capabilities = replace(ReferenceEngine.capabilities, whole_logits=False)
    unrounded = MappingProxyType(dict.fromkeys(DTYPES, "compiled:float32"))

    def __init__(self, checkpoint: Checkpoint, options: EngineOptions) -> None:
        super().__init__(checkpoint, options)
        for part in ("prefill", "velocity"):
            setattr(self.model, part, compile_part(getattr(self.model, part)))


def compile_part(part: Callable[..., Any]) -> Callable[..., Any]:
    """A part of the model, compiled at its first call; EngineError if that cannot be. A tap, its
    last argument, is not compiled with it."""
    compiled = torch.compile(part, dynamic=False)

    def call(*args: Any) -> Any:
        *given, tap = args
        if tap is not no_tap:
            tap = torch.compiler.disable(tap)  # type: ignore[no-untyped-call]
        try:
            return compiled(*given, tap)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise EngineError(
                "engine compiled: expected PyTorch to compile the model, which takes a C++ "
                f"compiler (c++, or what CXX names), found {str(error).splitlines()[0]}"
            ) from error

    return call


def parse_device(name: str) -> torch.device:
    """The CPU or a CUDA device of this machine.

    Raises:
        EngineError: it is not the name of a device, or this machine has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"device: expected cpu or cuda, found {name!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device: expected cpu or cuda, found {name!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            "device cuda: expected a CUDA device and a PyTorch built for it, found none. "
            "Use device cpu."
        )
    return device
