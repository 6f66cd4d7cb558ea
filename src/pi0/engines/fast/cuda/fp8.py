"""Eight-bit floating point matrices (e4m3): one scale per output of a weight, one per token.

They are the VLM's MLP, two thirds of the arithmetic of a call. On an H200 other matrices are not
faster in e4m3 (their rows, or they themselves, are too few), and cost accuracy: docs/cuda.md.
Products are `torch._scaled_mm` with both scales, which answers in bfloat16.
Attention is PyTorch's, with backends that are chosen here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pi0.config import Pi0Config
from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.matrix import Matrix, quantise_rows
from pi0.engines.fast.weights import Scheme

FP8 = torch.float8_e4m3fn
MULTIPLE = 16  # what `_scaled_mm` wants of both sizes of a weight
MATRICES = r"vlm\..*\.(gate_up|down)\..*"
# Rows, outputs and inner size of products that are tried: of few tokens and of many.
PRODUCTS = ((50, 2048, 16384), (560, 4096, 2048), (560, 2048, 16384))
# Relative L2: the answer is rounded to bfloat16 (0.002); Hopper keeps 14 bits of e4m3's sums.
PRODUCT_LIMIT = 0.02

# Not cuDNN's, which versions of PyTorch put first or not: it reads masks of another dtype wrongly
# (pytorch#191612) and gives wrong numbers with few key/value heads on some GPUs (pytorch#193893).
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
EXACT_BACKENDS = [SDPBackend.MATH]  # the others may multiply float32 in parts of fewer bits


class Rows(NamedTuple):
    """values [R, E] e4m3 · scale [R, 1] float32."""

    values: Tensor
    scale: Tensor


class Fp8Kernels(Kernels):
    """Operands of quantised matrices are quantised, in plain PyTorch; all else is bfloat16."""

    def operand(self, x: Tensor, into: Matrix) -> Any:
        if into.scale is None:
            return x
        values, scale = quantise_rows(x.float(), FP8)
        return Rows(values, scale[:, None])

    def project(
        self, a: Any, matrix: Matrix, residual: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        if matrix.scale is None:
            return super().project(a, matrix, residual, gate)
        return self._add(multiply(a, matrix), residual, gate)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
        with sdpa_kernel(EXACT_BACKENDS if q.dtype == torch.float32 else BACKENDS):
            return super().attend(q, k, v, valid)


def multiply(a: Rows, matrix: Matrix) -> Tensor:
    """a · matrixᵀ: [R, N] bfloat16."""
    assert matrix.scale is not None
    return torch._scaled_mm(
        a.values,
        matrix.weight.t(),
        a.scale,
        matrix.scale[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,  # a fifth faster, and far below what e4m3 rounds
    )


def check_products(device: torch.device) -> None:
    """Multiplies at sizes like the model's, of few and many tokens.

    Raises:
        RuntimeError: a product cannot be computed on this device, or is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    for rows, outputs, inner in PRODUCTS:
        a, b = (torch.randn(n, inner, generator=generator).to(device) for n in (rows, outputs))
        (left, left_scale), (right, scale) = quantise_rows(a, FP8), quantise_rows(b, FP8)
        found = multiply(Rows(left, left_scale[:, None]), Matrix(right, scale=scale)).float()
        wanted = (left.float() * left_scale[:, None]) @ (right.float() * scale[:, None]).t()
        error = float((found - wanted).norm() / wanted.norm())
        if not error <= PRODUCT_LIMIT:  # a NaN is none
            raise RuntimeError(
                f"[{rows}, {inner}] times [{inner}, {outputs}] is off by {error:.2g}, more than "
                f"{PRODUCT_LIMIT}"
            )


def make_scheme(config: Pi0Config, part: int) -> tuple[Scheme, list[str]]:
    """Which matrices are e4m3, and a note if they cannot be."""
    sizes = config.vlm.width, config.vlm.mlp_dim
    odd = [str(size) for size in sizes if size % MULTIPLE]
    if not odd:
        return Scheme(torch.bfloat16, {MATRICES: FP8}, part), []
    note = (
        f"fp8: expected multiples of {MULTIPLE} as width and MLP size of the VLM, found "
        f"{' and '.join(odd)}. It stays bfloat16."
    )
    return Scheme(torch.bfloat16, mlp_chunk=part), [note]
