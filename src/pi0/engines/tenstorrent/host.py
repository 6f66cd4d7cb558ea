"""TTNN's numbers without a device: golden functions on torch tensors, rounded as a device would.

Every result is rounded to the dtype that the operation has on a device: bfloat16 by torch, whose
rounding equals TTNN's (a test compares them), block formats by TTNN's own conversion. Inside an
operation `golden.py` follows the kernel, on the matrix engine of `silicon.py`. What differs from a
device is the order of sums and the vector engine's exponentials and roots, which are exact here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pi0.engines.tenstorrent.backend import Backend, Grid, Upload
from pi0.engines.tenstorrent.golden import OURS, Core, HostTensor
from pi0.engines.tenstorrent.precision import BF16, F32, I32, U32
from pi0.engines.tenstorrent.silicon import CARD, Fpu, Silicon

PASSES = {"LoFi": 1, "HiFi2": 2, "HiFi3": 3, "HiFi4": 4}
# Options that say where and in what order, which golden functions do not know.
WHERE = ("config", "memory_config", "layout")


class HostBackend(Backend):
    """Runs golden functions; programs are laid out as for an n150, and dropped.

    Args:
        silicon: what of a card is followed.
    """

    grid = Grid(8, 8)

    def __init__(self, ttnn: Any, silicon: Silicon = CARD) -> None:
        self.ttnn, self.silicon = ttnn, silicon
        self.arch = ttnn.device.Arch.WORMHOLE_B0

    def put(self, upload: Upload) -> HostTensor:
        return HostTensor(self._round(upload.value, upload.dtype), upload.dtype)

    def get(self, handle: HostTensor) -> Tensor:
        return handle.value.float()

    def dtype(self, handle: HostTensor) -> str:
        return handle.dtype

    def run(self, name: str, *args: Any, dtype: str | None = None, **options: Any) -> Any:
        what = {key: value for key, value in options.items() if key not in WHERE}
        fpu = self._fpu(what.pop("compute_kernel_config", None))
        if name in OURS:
            if name != "transformer.scaled_dot_product_attention":
                what.pop("program_config", None)
            result = OURS[name].function(Core(fpu, self._round), *args, **what)
        else:
            golden = self.ttnn.get_golden_function(self.option(name))
            result = golden(*(as_float32(arg) for arg in args), **what)
        first = args[0][0] if isinstance(args[0], list) else args[0]
        dtype = dtype or first.dtype
        if isinstance(result, tuple):
            return tuple(HostTensor(self._round(part, dtype), dtype) for part in result)
        return HostTensor(self._round(result, dtype), dtype)

    def _fpu(self, kernel: Any) -> Fpu:
        if kernel is None:
            return Fpu(self.silicon)
        passes = PASSES[kernel.math_fidelity.name]
        return Fpu(self.silicon, passes, kernel.fp32_dest_acc_en)

    def _round(self, value: Tensor, dtype: str) -> Tensor:
        if dtype in (U32, I32):
            return value
        if dtype == F32 or not self.silicon.rounding:
            return value.float()
        if dtype == BF16:
            return value.to(torch.bfloat16)
        packed = self.ttnn.from_torch(
            value.float().contiguous(),
            dtype=self.option(dtype),
            layout=self.option("TILE_LAYOUT"),
        )
        unpacked: Tensor = self.ttnn.to_torch(packed)
        return unpacked.to(torch.bfloat16)  # exact: 7 bits and an exponent


def as_float32(value: Any) -> Any:
    if isinstance(value, HostTensor):
        return value.real
    if isinstance(value, list):
        return [as_float32(part) for part in value]
    return value
