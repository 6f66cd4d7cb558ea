"""Engine `cpu`: accurate (float32) or close (int8) actions, as fast as the processor can.

bfloat16 is for processors that multiply it faster than float32, which is measured, not looked up:
some have the instructions and are slower all the same.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0.checkpoint.load import Checkpoint
from pi0.config import Pi0Config
from pi0.engines.base import Capabilities, Engine, EngineOptions, SeeOperation, exclusive
from pi0.engines.fast.cpu.checked import CheckedKernels, show_weights
from pi0.engines.fast.cpu.int8 import Int8Kernels
from pi0.engines.fast.cpu.native import Native, NativeUnavailable
from pi0.engines.fast.cpu.native_kernels import NativeKernels
from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.matrix import Matrix
from pi0.engines.fast.network import VLM_OUTPUT, Cache, Network
from pi0.engines.fast.plan import copy, make_token_plan
from pi0.engines.fast.weight_cache import load_weights
from pi0.engines.fast.weights import Scheme
from pi0.errors import EngineError
from pi0.inputs import ModelInputs
from pi0.model import Tap
from pi0.model.pi0 import no_tap

SCHEMES = {
    "float32": Scheme(torch.float32, mlp_chunk=2048),
    "int8": Scheme(torch.float32, {".*": torch.int8}),
    "bfloat16": Scheme(torch.bfloat16),
}
PROBE = 256, 2048, 2048  # rows, inputs and outputs of the product that is measured


class CpuEngine(Engine):
    """See `Engine`."""

    name = "cpu"
    capabilities = Capabilities(precisions=tuple(SCHEMES), weight_cache=True)
    hidden_stages = MappingProxyType({"vlm_transformer": VLM_OUTPUT})
    unrounded = MappingProxyType(dict.fromkeys(SCHEMES, "cpu:float32"))

    def __init__(self, checkpoint: Checkpoint, options: EngineOptions) -> None:
        super().__init__(checkpoint, options)
        dtype = options.precision
        kernels = Kernels() if dtype == "bfloat16" else choose_kernels()
        name = f"cpu-{dtype}" if options.weight_cache else None
        weights = load_weights(
            checkpoint, SCHEMES[dtype], kernels, options.image_size, options.progress, name
        )
        self.network = Network(weights, kernels)
        self._checkpoint = checkpoint
        self._last: tuple[ModelInputs, Cache] | None = None  # of `sample`

    @classmethod
    def check_available(cls, config: Pi0Config, options: EngineOptions) -> None:
        """See `Engine`; bfloat16 is measured, which takes a fraction of a second."""
        if options.device not in (None, "cpu"):
            raise EngineError(
                f"device: expected cpu for engine cpu, found {options.device!r}. See --engine cuda."
            )
        if options.precision == "bfloat16":
            require_fast_bfloat16()

    @exclusive
    @torch.inference_mode()
    def prefill(self, inputs: ModelInputs, tap: Tap = no_tap) -> Cache:
        plan = make_token_plan(inputs, self.config.vision.num_patches, self.config.suffix_len)
        return self.network.prefill(inputs, plan, tap)

    @exclusive
    @torch.inference_mode()
    def velocity(self, x_t: Tensor, t: Tensor, cache: Cache, tap: Tap = no_tap) -> Tensor:
        return self.network.velocity(x_t, self.network.times(t), cache, tap)

    @torch.inference_mode()
    def _sample(
        self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: Callable[[], None]
    ) -> Tensor:
        """See `Engine`; where images and prompt are those of the last call, only the steps are
        computed."""
        cache = self._prefix(inputs)
        times = self.network.step_times(steps)
        return self.network.denoise(noise, times, cache, on_step)

    @contextmanager
    def show_operations(self, see: SeeOperation) -> Iterator[None]:
        """See `Engine`: those of int8, and how the weights were packed for it."""
        network, kernels = self.network, self.network.kernels
        if isinstance(kernels, Int8Kernels) and self.options.precision == "int8":
            show_weights(self._checkpoint, network.weights, kernels, see)
            network.kernels = CheckedKernels(kernels, network.weights, see)
        try:
            yield
        finally:
            network.kernels = kernels

    def _close(self) -> None:
        del self.network, self._last

    def _prefix(self, inputs: ModelInputs) -> Cache:
        """The last call's, if it is the same, else a new one."""
        if self._last and self._last[0].same_prefix(inputs):
            # The state token is computed anew, so that the same call gives the same bits.
            cache = self._last[1].with_state(inputs.state)
        else:
            self._last = None  # its memory is free for the next
            cache = self.prefill(inputs)
            self._last = copy(inputs, torch.device("cpu")), cache
        return cache


def require_fast_bfloat16() -> None:
    """Raises EngineError if float32 is faster here."""
    slower = product_seconds(torch.bfloat16) / product_seconds(torch.float32)
    if slower > 1:
        raise EngineError(
            "dtype bfloat16: expected a processor that multiplies it faster than float32, found "
            f"this one {slower:.1f} times as slow. Use --dtype int8 or float32."
        )


def product_seconds(dtype: torch.dtype) -> float:
    """The best of a few matrix products, after a warm-up."""
    rows, inputs, outputs = PROBE
    x, weight = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        F.linear(x, weight)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def make_int8_product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """A product x · weightᵀ as the engine computes it in int8, but for quantising x.

    Args:
        x: [R, K] float32.
        weight: [N, K] float32.
    """
    kernels = choose_kernels()
    empty = Matrix(torch.empty_like(weight, dtype=torch.int8), scale=torch.empty(len(weight)))
    matrix = kernels.lay_out(empty)
    matrix.write_rows(0, weight)
    operand = kernels.operand(x, matrix)
    return lambda: kernels.project(operand, matrix)


def choose_kernels() -> Kernels:
    """Native code, or, with a warning that says why not, PyTorch."""
    try:
        return NativeKernels(Native())
    except NativeUnavailable as why:
        warnings.warn(f"engine cpu: slower than it could be: {why}.", stacklevel=2)
        return Int8Kernels()
