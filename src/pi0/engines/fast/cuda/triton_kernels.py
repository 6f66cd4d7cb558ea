"""Triton kernels for what lies between matrix products, and for the suffix's attention.

Notable: each reads bfloat16, e4m3 or float32, computes in float32 and rounds once. A row that is
meant for an e4m3 matrix is quantised where it is made. Residuals are added by the matrix product,
in place. The actions' few queries have their keys shared out among many programs, which would leave
most of a GPU idle otherwise. Masks are read as they are. Many queries without a mask are PyTorch's,
and so is all attention in float32.

Runs on the CPU in Triton's interpreter (tests/engines/test_triton.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pi0.engines.fast.cuda import triton_attention, triton_products
from pi0.engines.fast.cuda.fp8 import FP8, Fp8Kernels, Rows
from pi0.engines.fast.cuda.triton_attention import FUSED
from pi0.engines.fast.cuda.triton_products import gelu
from pi0.engines.fast.kernels import Norm, Rotation
from pi0.engines.fast.matrix import Matrix
from pi0.model.gemma import EPS as RMS_EPS
from pi0.model.siglip import EPS as LAYER_EPS

LIMIT = tl.constexpr(448.0)  # the largest e4m3
SMALLEST = tl.constexpr(448.0 * 1.1754944e-38)  # as in `quantise_rows`
COLUMNS = 1024  # of a row, that a program computes where a row need not be one program


class TritonKernels(Fp8Kernels):
    """Equals `Fp8Kernels` but for roundings in between, which are fewer."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def operand(self, x: Tensor, into: Matrix) -> Any:
        return x if into.scale is None else _activate(x, into, gelu=False, gated=False)

    def rms_norm(self, x: Tensor, norm: Norm, into: Matrix) -> Any:
        if norm.scale.ndim > 1:
            return super().rms_norm(x, norm, into)
        return _norm(x, norm.scale, norm.shift, RMS_EPS, into, centred=False)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, into: Matrix) -> Any:
        return _norm(x, weight, bias, LAYER_EPS, into, centred=True)

    def project(
        self, a: Any, matrix: Matrix, residual: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        if residual is not None and (gate is None or gate.ndim == 1):
            if triton_products.suits(a, matrix):
                if self.counts is None:
                    self.counts = triton_products.make_counts(a.device)
                return triton_products.add_product(residual, a, matrix, gate, self.counts)
            if gate is not None:
                return _add_gated(residual, super().project(a, matrix), gate)
            if matrix.scale is None and matrix.bias is None:
                return residual.addmm_(a, matrix.weight.t())
        return super().project(a, matrix, residual, gate)

    def gelu(self, a: Any, first: Matrix, into: Matrix) -> Any:
        return _activate(self.project(a, first), into, gelu=True, gated=False)

    def project_heads(
        self, a: Any, matrix: Matrix, rotation: Rotation, k: Tensor, v: Tensor
    ) -> Tensor:
        if triton_products.suits(a, matrix):
            return triton_products.project_heads(a, matrix, rotation, k, v)
        return super().project_heads(a, matrix, rotation, k, v)

    def geglu(self, a: Any, gate_up: Matrix, into: Matrix) -> Any:
        if triton_products.suits(a, gate_up) and into.scale is None:
            return triton_products.geglu(a, gate_up)
        return _activate(self.project(a, gate_up), into, gelu=True, gated=True)

    def split(self, qkv: Tensor, rotation: Rotation, k: Tensor, v: Tensor) -> Tensor:
        qkv = qkv.contiguous()
        batch, tokens = qkv.shape[:2]
        kv_heads, width = k.shape[2:]
        q_heads = qkv.shape[2] // width - 2 * kv_heads
        q = qkv.new_empty(batch, tokens, q_heads, width)
        cos, sin = rotation
        _split_kernel[(batch * tokens,)](
            *(qkv, cos, sin, q, k, v, tokens),
            *(cos.stride(0), cos.stride(1), *k.stride()[:2], *v.stride()[:2]),
            *(q_heads, kv_heads, width // 2),
            triton.next_power_of_2(q_heads + 2 * kv_heads),
            triton.next_power_of_2(width // 2),
            **FUSED,
        )
        return q

    def attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
        found = triton_attention.attend(q, k, v, valid)
        return super().attend(q, k, v, valid) if found is None else found


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, into: Matrix, centred: bool
) -> Any:
    x = x.contiguous()  # the patches of one view come transposed
    rows, width = x.shape
    out, scale = _room(x, width, into)
    block = triton.next_power_of_2(width)
    _norm_kernel[(rows,)](
        *(x, weight, bias, out, scale, width, eps, centred, bias is not None, block),
        num_warps=_warps(block),
        **FUSED,
    )
    return out if scale is None else Rows(out, scale)


def _add_gated(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    width = residual.shape[1]
    block = min(triton.next_power_of_2(width), COLUMNS)
    grid = (len(residual), triton.cdiv(width, block))
    _add_gated_kernel[grid](residual, branch, gate, width, block, num_warps=_warps(block), **FUSED)
    return residual


def _activate(x: Tensor, into: Matrix, gelu: bool, gated: bool) -> Any:
    x = x.contiguous()
    rows, width = x.shape[0], x.shape[1] // (2 if gated else 1)
    out, scale = _room(x, width, into)
    block = triton.next_power_of_2(width)
    if scale is None:
        block = min(block, COLUMNS)
    grid = (rows, triton.cdiv(width, block))
    _activate_kernel[grid](
        x, out, scale, width, gelu, gated, block, num_warps=_warps(block), **FUSED
    )
    return out if scale is None else Rows(out, scale)


def _room(x: Tensor, width: int, into: Matrix) -> tuple[Tensor, Tensor | None]:
    """For an operand [R, width] and, if the matrix is quantised, its scale [R, 1]."""
    if into.scale is None:
        return x.new_empty(len(x), width), None
    scale = x.new_empty(len(x), 1, dtype=torch.float32)
    return x.new_empty(len(x), width, dtype=FP8), scale


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


@triton.jit
def _put(value, out, scale, row, width, at, inside):
    """Stores a row, or part of it; quantised if there is a scale.

    NaN stays NaN, though `tl.max` may overlook it; infinity makes the scale infinite, and itself
    becomes infinity times 0.
    """
    if scale is not None:
        largest = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST)
        tl.store(scale + row, largest / LIMIT)
        value = value * (LIMIT / largest)
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_kernel(
    x, weight, bias, out, scale, width, eps,
    CENTRED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program normalises a row: by its root mean square or, CENTRED, as a layer norm."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value, 0) / width, 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    value = value * tl.load(weight + at, mask=inside, other=0.0)
    if BIASED:
        value = value + tl.load(bias + at, mask=inside, other=0.0)
    _put(value, out, scale, row, width, at, inside)


@triton.jit
def _add_gated_kernel(residual, branch, gate, width, BLOCK: tl.constexpr):
    """A program adds BLOCK columns of branch · gate to a row of the residual, in place."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    place = tl.program_id(0).to(tl.int64) * width + at
    value = tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.load(gate + at, mask=inside, other=0.0)
    value = value + tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual + place, value.to(residual.dtype.element_ty), mask=inside)


@triton.jit
def _activate_kernel(
    x, out, scale, width, GELU: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    """A program computes a row, or BLOCK of its columns, of GELU(x) or GELU(gate) · up or x."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    source = x + row * width * (2 if GATED else 1) + at
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        value = gelu(value)
    if GATED:
        value = value * tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    _put(value, out, scale, row, width, at, inside)


@triton.jit
def _split_kernel(
    qkv,
    cos,
    sin,
    q,
    k,
    v,
    tokens,
    rotation_row,
    rotation_token,
    k_row,
    k_token,
    v_row,
    v_token,
    q_heads,
    kv_heads,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """A program moves the heads of a token to where they belong, rotated but for the values."""
    token = tl.program_id(0).to(tl.int64)
    row, t = token // tokens, token % tokens
    head, lane = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None]
    heads, inside = q_heads + 2 * kv_heads, lane < half
    at = head * 2 * half + lane  # of the first half of a head
    source = qkv + token * heads * 2 * half + at
    a = tl.load(source, mask=inside & (head < heads), other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=inside & (head < heads), other=0.0).to(tl.float32)
    angle = row * rotation_row + t * rotation_token + lane
    rotated = head < q_heads + kv_heads
    c = tl.where(rotated, tl.load(cos + angle, mask=inside, other=0.0), 1.0)
    s = tl.where(rotated, tl.load(sin + angle, mask=inside, other=0.0), 0.0)
    first = (a * c - b * s).to(q.dtype.element_ty)
    second = (b * c + a * s).to(q.dtype.element_ty)
    target = q + token * q_heads * 2 * half + at
    tl.store(target, first, mask=inside & (head < q_heads))
    tl.store(target + half, second, mask=inside & (head < q_heads))
    target = k + row * k_row + t * k_token + at - q_heads * 2 * half
    is_key = inside & rotated & (head >= q_heads)
    tl.store(target, first, mask=is_key)
    tl.store(target + half, second, mask=is_key)
    target = v + row * v_row + t * v_token + at - (q_heads + kv_heads) * 2 * half
    is_value = inside & (head >= q_heads + kv_heads) & (head < heads)
    tl.store(target, first, mask=is_value)
    tl.store(target + half, second, mask=is_value)
