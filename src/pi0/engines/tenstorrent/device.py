"""TTNN on a device, real or mock."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pi0.engines.tenstorrent.backend import Backend, Grid, Handle, Upload
from pi0.engines.tenstorrent.precision import BF16, F32, I32, U32
from pi0.engines.tenstorrent.ttnn_import import MOCK
from pi0.errors import EngineError

# Bytes of DRAM for captured commands: an estimated 30 to 70 MB for a call of 2 900 programs.
# Left to TTNN (0), they would have to find room beside all that the call puts in DRAM.
CAPTURE_REGION = 256 << 20
L1_SMALL = 32 << 10  # bytes of each core for the bookkeeping of operations
TORCH_DTYPES = {BF16: torch.bfloat16, F32: torch.float32, U32: torch.int32, I32: torch.int32}


class DeviceBackend(Backend):
    """An open device. Tensors on torch's meta device become uninitialised ones of their shape."""

    def __init__(self, ttnn: Any, device_id: int) -> None:
        self.ttnn = ttnn
        # Neither a mock device, nor the emulator, which is one, nor slow dispatch can capture.
        self.can_replay = not {MOCK, "TT_METAL_SLOW_DISPATCH_MODE"} & set(os.environ)
        with translate_errors(f"engine ttnn: expected a device {device_id} that can be opened"):
            self.device = ttnn.open_device(
                device_id=device_id,
                l1_small_size=L1_SMALL,
                trace_region_size=CAPTURE_REGION if self.can_replay else 0,
                num_command_queues=2 if self.can_replay else 1,
            )
        self.arch = self.device.arch()
        size = self.device.compute_with_storage_grid_size()
        self.grid = Grid(size.x, size.y)

    def put(self, upload: Upload) -> Handle:
        shape, where = tuple(upload.value.shape), {"device": self.device, **self._kind(upload)}
        with translate_errors(f"{self.stage}: expected room for {upload.dtype} {list(shape)}"):
            if upload.value.is_meta:
                return self.ttnn.empty(shape, **where)
            return self.ttnn.from_torch(self._plain(upload), **where)

    def stage_upload(self, upload: Upload) -> Handle:
        """The upload as a tensor of the library, still on the host."""
        return self.ttnn.from_torch(self._plain(upload), **self._kind(upload, placed=False))

    def get(self, handle: Handle) -> Tensor:
        with translate_errors(f"{self.stage}: expected a result of the device"):
            read: Tensor = self.ttnn.to_torch(handle)
        return read.float()

    def dtype(self, handle: Handle) -> str:
        name: str = handle.dtype.name.lower()
        return name

    def run(self, name: str, *args: Any, dtype: str | None = None, **options: Any) -> Any:
        if dtype is not None:
            options["dtype"] = self.option(dtype)
        what = f"ttnn.{name} in stage {self.stage}: expected an operation that the device takes"
        with translate_errors(what):
            return self.option(name)(*args, **options)

    def dram(self) -> tuple[int, int]:
        """Bytes of DRAM that tensors hold, and that there are."""
        view = self.ttnn.get_memory_view(self.device, self.option("BufferType.DRAM"))
        return (
            view.total_bytes_allocated_per_bank * view.num_banks,
            view.total_bytes_per_bank * view.num_banks,
        )

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # of a card that hangs: what failed before says so
            self.ttnn.close_device(self.device)

    def _plain(self, upload: Upload) -> Tensor:
        return upload.value.to(TORCH_DTYPES.get(upload.dtype, torch.float32)).contiguous()

    def _kind(self, upload: Upload, placed: bool = True) -> dict[str, Any]:
        kind = {
            "dtype": self.option(upload.dtype),
            "layout": self.option("TILE_LAYOUT" if upload.tiled else "ROW_MAJOR_LAYOUT"),
        }
        return kind | {"memory_config": self.option("DRAM_MEMORY_CONFIG")} if placed else kind


@contextlib.contextmanager
def translate_errors(what: str, into: type[EngineError] = EngineError) -> Iterator[None]:
    """Turns what TTNN refuses into an EngineError, whose sentence begins with `what`."""
    try:
        yield
    except RuntimeError as error:
        raise into(f"{what}, found: {reason(error)}") from error


def reason(error: RuntimeError) -> str:
    """What TTNN says is wrong, without where in its sources and without the stack."""
    lines = [line.strip() for line in re.split("backtrace:|Location:", str(error))[0].splitlines()]
    lines = [line for line in lines if line and line != "info:"]
    return " ".join(lines[1:] or lines)
