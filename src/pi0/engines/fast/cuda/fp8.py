"""Eight-bit floating point matrices (e4m3): one scale per output of a weight, one per token.

Products are `torch._scaled_mm` with both scales, which sums in float32 and answers in bfloat16.
Attention is PyTorch's, with backends that are chosen here.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pi0.config import Pi0Config
from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.weights import Matrix, PackedWeights, Scheme, quantise_rows

FP8 = torch.float8_e4m3fn
MULTIPLE = 16  # what `_scaled_mm` wants of both sizes of a weight
# Rows, outputs, inner size and whether with a bias, of products that are tried: the actions' and
# the vision tower's, whose matrices all have biases and whose inner size is no multiple of 128.
PRODUCTS = ((50, 1024, 4096, False), (512, 1152, 4304, True), (50, 1152, 4304, True))
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

    def prepare(self, weights: PackedWeights) -> None:
        """Biases in bfloat16, as `_scaled_mm` wants them."""
        for matrix in weights.matrices.values():
            if matrix.scale is not None and matrix.bias is not None:
                matrix.bias = matrix.bias.bfloat16()

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
    """a · matrixᵀ + bias: [R, N] bfloat16."""
    assert matrix.scale is not None
    return torch._scaled_mm(
        a.values,
        matrix.weight.t(),
        a.scale,
        matrix.scale[None],
        bias=matrix.bias,
        out_dtype=torch.bfloat16,
    )


def check_products(device: torch.device) -> None:
    """Multiplies at sizes like the model's, of few and many tokens, with a bias and without.

    Raises:
        RuntimeError: a product cannot be computed on this device, or is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    for rows, outputs, inner, biased in PRODUCTS:
        a, b = (torch.randn(n, inner, generator=generator).to(device) for n in (rows, outputs))
        bias = b[:, 0].bfloat16() if biased else None
        (left, left_scale), (right, scale) = quantise_rows(a, FP8), quantise_rows(b, FP8)
        found = multiply(Rows(left, left_scale[:, None]), Matrix(right, bias, scale)).float()
        wanted = (left.float() * left_scale[:, None]) @ (right.float() * scale[:, None]).t()
        wanted = wanted if bias is None else wanted + bias.float()
        error = float((found - wanted).norm() / wanted.norm())
        if not error <= PRODUCT_LIMIT:  # a NaN is none
            raise RuntimeError(
                f"[{rows}, {inner}] times [{inner}, {outputs}] is off by {error:.2g}, more than "
                f"{PRODUCT_LIMIT}"
            )


def make_scheme(config: Pi0Config, part: int) -> tuple[Scheme, list[str]]:
    """Which matrices are e4m3, and notes on those that cannot be.

    The projector stays bfloat16: it is one product, and its error would enter every layer's input.
    """
    vision, notes, dtype_by_pattern = config.vision, [], {"projector": torch.bfloat16}
    sizes = {"vision_tower": {vision.width, vision.mlp_dim}}
    for trunk, gemma in (("vlm", config.vlm), ("expert", config.expert)):
        heads = {count * gemma.head_dim for count in (gemma.num_heads, gemma.num_kv_heads)}
        sizes[trunk] = {gemma.width, gemma.mlp_dim} | heads
    for trunk, widths in sizes.items():
        if odd := sorted(width for width in widths if width % MULTIPLE):
            dtype_by_pattern[rf"{re.escape(trunk)}\..*"] = torch.bfloat16
            notes.append(
                f"fp8: expected sizes that are multiples of {MULTIPLE} in {trunk}, found "
                f"{', '.join(map(str, odd))}. This tower stays bfloat16."
            )
    dtype_by_pattern[".*"] = FP8
    return Scheme(torch.bfloat16, dtype_by_pattern, part), notes
