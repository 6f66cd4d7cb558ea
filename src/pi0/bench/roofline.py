"""The roofline: how fast this machine multiplies plain large matrices and reads memory.

It is no law of nature: a kernel that is faster than PyTorch's plain product beats it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0.bench.flops import Work
from pi0.engines.fast.cpu.engine import make_int8_product

SIZES = {"cpu": 2048, "cuda": 8192}  # of square matrices, beyond what caches hold
READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
SECONDS = 1.0  # of measuring, for each rate
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1}  # of a weight, by precision


@dataclass(frozen=True)
class Rate:
    """What the machine reaches in one precision.

    Attributes:
        flops: operations per second of a plain large matrix product.
        bandwidth: bytes read per second.
        weight_bytes: size of one weight.
    """

    flops: float
    bandwidth: float
    weight_bytes: int

    def roofline(self, work: Work) -> float:
        """The seconds of the work's arithmetic or of reading its weights, whichever is longer."""
        return max(work.flop / self.flops, work.weights * self.weight_bytes / self.bandwidth)


def measure(device: str, precision: str) -> Rate | None:
    """The best rates within a second for each product, on "cpu" or "cuda".

    None for a precision that has no plain product there, such as fp8 on the CPU or an old GPU.
    """
    n = SIZES[device]
    values = torch.ones(READ_BYTES[device] // 4, device=device)
    bandwidth = values.nbytes / _best(values.sum)
    del values
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    products = make_products(precision, a, b)
    if not products:
        return None
    return Rate(2 * n**3 / min(map(_best, products)), bandwidth, BYTES[precision])


def make_products(precision: str, a: Tensor, b: Tensor) -> list[Callable[[], Tensor]]:
    """Plain products of two square matrices a·bᵀ, rounded to a precision; the fastest counts.

    In int8 on the CPU these are PyTorch's and engine cpu's: on processors without VNNI the first is
    fifty times slower.
    """
    if precision in ("float32", "bfloat16"):
        x, w = (value.to(getattr(torch, precision)) for value in (a, b))
        return [lambda: F.linear(x, w)]
    if precision == "int8":
        x, w = ((value * 8).to(torch.int8) for value in (a, b))
        plain = [lambda: torch._int_mm(x, w.t())]
        return plain if a.is_cuda else [*plain, make_int8_product(a, b)]
    if precision == "fp8" and a.is_cuda and torch.cuda.get_device_capability() >= (8, 9):
        x, w = (value.to(torch.float8_e4m3fn) for value in (a, b))
        one = torch.ones((), device=a.device)
        return [lambda: torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16)]
    return []


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest call."""
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
