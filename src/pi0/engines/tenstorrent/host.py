"""TTNN's numbers without a device: golden functions on torch tensors, rounded as a device would.

Every result is rounded to the dtype that the operation has on a device: bfloat16 by torch, whose
rounding equals TTNN's (a test compares them), block formats by TTNN's own conversion. Inside an
operation golden functions compute in float32, so what differs from a device is the order of sums
and what fidelities below HiFi4 leave out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0.engines.tenstorrent.backend import Backend, Grid, Upload
from pi0.engines.tenstorrent.precision import BF16, F32, U32

# Options that say how, not what; golden functions do not know them.
HOW = ("program_config", "compute_kernel_config", "memory_config", "layout")


@dataclass(frozen=True)
class HostTensor:
    """Values that a device tensor of a dtype can hold; kept in bfloat16 where that holds them."""

    value: Tensor
    dtype: str

    @property
    def shape(self) -> torch.Size:
        return self.value.shape


class HostBackend(Backend):
    """Runs golden functions; programs are laid out as for an n150, and dropped."""

    grid = Grid(8, 8)

    def __init__(self, ttnn: Any) -> None:
        self.ttnn = ttnn
        self.arch = ttnn.device.Arch.WORMHOLE_B0

    def put(self, upload: Upload) -> HostTensor:
        return HostTensor(self._round(upload.value, upload.dtype), upload.dtype)

    def get(self, handle: HostTensor) -> Tensor:
        return handle.value.float()

    def dtype(self, handle: HostTensor) -> str:
        return handle.dtype

    def run(self, name: str, *args: Any, dtype: str | None = None, **options: Any) -> Any:
        what = {key: value for key, value in options.items() if key not in HOW}
        first = args[0][0] if isinstance(args[0], list) else args[0]
        if name in GOLDEN:
            result = GOLDEN[name](*args, **what)
        else:
            golden = self.ttnn.get_golden_function(self.option(name))
            plain = {key: as_float32(value) for key, value in what.items()}
            result = golden(*(as_float32(arg) for arg in args), **plain)
        dtype = dtype or first.dtype
        if isinstance(result, tuple):
            return tuple(HostTensor(self._round(part, dtype), dtype) for part in result)
        return HostTensor(self._round(result, dtype), dtype)

    def _round(self, value: Tensor, dtype: str) -> Tensor:
        if dtype == F32:
            return value.float()
        if dtype == BF16:
            return value.to(torch.bfloat16)
        if dtype == U32:
            return value
        packed = self.ttnn.from_torch(
            value.float().contiguous(),
            dtype=self.option(dtype),
            layout=self.option("TILE_LAYOUT"),
        )
        unpacked: Tensor = self.ttnn.to_torch(packed)
        return unpacked.to(torch.bfloat16)  # exact: 7 bits and an exponent


def as_float32(value: Any) -> Any:
    if isinstance(value, HostTensor):
        return value.value.float()
    if isinstance(value, list):
        return [as_float32(part) for part in value]
    return value


def embedding(tokens: HostTensor, table: HostTensor) -> Tensor:
    """As TTNN's, without a float32 copy of the table."""
    return table.value[tokens.value.long()]


def create_heads(
    qkv: HostTensor, num_heads: int, num_kv_heads: int, transpose_k_heads: bool
) -> tuple[Tensor, ...]:
    batch, _, rows, width = qkv.shape
    head = width // (num_heads + 2 * num_kv_heads)
    parts = qkv.value.view(batch, rows, -1, head).transpose(1, 2)
    q = parts[:, :num_heads]
    k, v = parts[:, num_heads:].chunk(2, dim=1)
    return q, k.transpose(-1, -2) if transpose_k_heads else k, v


def concat_heads(x: HostTensor) -> Tensor:
    return x.value.transpose(1, 2).flatten(2)[:, None]


def rotary_embedding(x: HostTensor, cos: HostTensor, sin: HostTensor) -> Tensor:
    a, b = x.value.float().chunk(2, dim=-1)
    turned: Tensor = torch.cat([-b, a], dim=-1) * sin.value.float()
    return x.value.float() * cos.value.float() + turned


def gelu(x: HostTensor, variant: Any) -> Tensor:
    """TTNN's golden function is the exact form whatever the variant."""
    if variant.name != "Tanh":
        raise ValueError(f"no golden function for GELU variant {variant}")
    return F.gelu(x.value.float(), approximate="tanh")


def typecast(x: HostTensor) -> Tensor:
    return x.value


# What has no golden function in TTNN 0.81.1, or one of another form.
GOLDEN: dict[str, Callable[..., Any]] = {
    "embedding": embedding,
    "experimental.nlp_create_qkv_heads": create_heads,
    "experimental.nlp_concat_heads": concat_heads,
    "experimental.rotary_embedding": rotary_embedding,
    "gelu": gelu,
    "typecast": typecast,
}
