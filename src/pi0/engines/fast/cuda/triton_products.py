"""Triton kernels for products of few rows, with what follows them: the expert's.

Their time is that of reading the weights once a step, if enough programs read at the same time and
little else is launched in between. So rotary embedding and GEGLU are applied where a product has
its results; and where there are few outputs, the inner size is shared out among programs, the last
of which adds up what all of them found, in their order.

Runs on the CPU in Triton's interpreter (tests/engines/test_triton.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pi0.engines.fast.cuda.triton_attention import FUSED, MATRIX_DTYPES
from pi0.engines.fast.kernels import Rotation
from pi0.engines.fast.matrix import Matrix

# GELU's tanh form: x (1 + tanh(u / 2)) / 2 = x / (1 + exp(-u)), with 2 √(2 / π) in u.
GELU_SCALE = tl.constexpr(1.5957691216057308)
GELU_CUBE = tl.constexpr(0.044715)

ROWS = 64  # that a program computes: the actions and the state are fewer
MOST_ROWS = 2 * ROWS  # weights are read once for each ROWS; more are cuBLAS's
MOST_TILES = 4096  # of a result, each with a count of the programs that are done with it


class Tile(NamedTuple):
    """What a program computes: outputs, of which those of a pair are twice as many, and how much of
    the inner size at a time."""

    outputs: int
    inner: int
    warps: int
    stages: int


# The fastest on an H200 of those that fit the 99 KB of shared memory that the smallest GPUs have
# (tests/engines/test_triton_compiles.py).
HEADS = Tile(16, 128, warps=4, stages=4)
UNITS = Tile(32, 128, warps=4, stages=4)
SHARED = Tile(32, 128, warps=4, stages=5)
SHARES = 4  # of the inner size, in `add_product`


def suits(a: Any, matrix: Matrix) -> bool:
    """Whether these kernels multiply an operand with a matrix."""
    if not isinstance(a, Tensor) or a.dtype not in MATRIX_DTYPES or len(a) > MOST_ROWS:
        return False
    return matrix.scale is None and matrix.bias is None


def project_heads(a: Tensor, matrix: Matrix, rotation: Rotation, k: Tensor, v: Tensor) -> Tensor:
    """See `Kernels.project_heads`."""
    rows, inner = a.shape
    batch, tokens, kv_heads, width = k.shape
    heads = len(matrix.weight) // width
    q = a.new_empty(batch, tokens, heads - 2 * kv_heads, width)
    cos, sin = rotation
    tile, half = HEADS, width // 2
    _heads_kernel[heads, triton.cdiv(half, tile.outputs), triton.cdiv(rows, ROWS)](
        *(a, matrix.weight, cos, sin, q, k, v, rows, inner, tokens),
        *(cos.stride(0), cos.stride(1), *k.stride()[:2], *v.stride()[:2]),
        *(heads - 2 * kv_heads, kv_heads, half),
        *(ROWS, tile.outputs, tile.inner, inner % tile.inner == 0),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **FUSED,
    )
    return q


def geglu(a: Tensor, gate_up: Matrix) -> Tensor:
    """Hidden units [R, N / 2]: GELU of the first half of a · gate_upᵀ, times its second."""
    rows, inner = a.shape
    units, tile = len(gate_up.weight) // 2, UNITS
    out = a.new_empty(rows, units)
    _geglu_kernel[triton.cdiv(units, tile.outputs), triton.cdiv(rows, ROWS)](
        *(a, gate_up.weight, out, rows, inner, units),
        *(ROWS, tile.outputs, tile.inner, inner % tile.inner == 0),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **FUSED,
    )
    return out


def make_counts(device: torch.device) -> Tensor:
    """For `add_product`: how many programs of each tile are done, which is 0 between launches."""
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


def add_product(
    residual: Tensor, a: Tensor, matrix: Matrix, gate: Tensor | None, counts: Tensor
) -> Tensor:
    """residual [R, N] + a · matrixᵀ · gate, in place; gate [N] or None."""
    (rows, inner), outputs, tile = a.shape, len(matrix.weight), SHARED
    share = triton.cdiv(triton.cdiv(inner, SHARES), tile.inner) * tile.inner
    shares = triton.cdiv(inner, share)
    tiles = triton.cdiv(outputs, tile.outputs), triton.cdiv(rows, ROWS)
    assert tiles[0] * tiles[1] <= MOST_TILES
    parts = a.new_empty(shares, rows, outputs, dtype=torch.float32)
    _add_product_kernel[(*tiles, shares)](
        *(a, matrix.weight, gate, residual, parts, counts, rows, outputs, inner, share),
        *(ROWS, tile.outputs, tile.inner, inner % tile.inner == 0, shares),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **FUSED,
    )
    return residual


@triton.jit
def gelu(x):
    """In its tanh form, of float32."""
    u = (x + x * x * x * GELU_CUBE) * GELU_SCALE
    return x / (1 + tl.exp(-u))


@triton.jit
def _multiply(total, a, weight, row, rows, output, k, inner, EVEN: tl.constexpr):
    """total [ROWS, OUTPUTS] + a · weightᵀ over the places k [INNER] of the inner size."""
    shown = (row < rows)[:, None]
    inside = k[:, None] >= 0
    if not EVEN:
        shown, inside = shown & (k < inner)[None], (k < inner)[:, None]
    of_rows = row[:, None].to(tl.int64) * inner + k[None]
    of_outputs = output[None].to(tl.int64) * inner + k[:, None]
    values = tl.load(a + of_rows, mask=shown, other=0.0)
    weights = tl.load(weight + of_outputs, mask=inside, other=0.0)
    return tl.dot(values, weights, total, input_precision="ieee")


@triton.jit
def _multiply_pair(
    a, weight, row, rows, first, second, inner,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Products with two parts of a matrix, each [ROWS, OUTPUTS] float32."""
    one = tl.zeros([ROWS, OUTPUTS], tl.float32)
    two = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(0, inner, INNER):
        k = start + tl.arange(0, INNER)
        one = _multiply(one, a, weight, row, rows, first, k, inner, EVEN)
        two = _multiply(two, a, weight, row, rows, second, k, inner, EVEN)
    return one, two


@triton.jit
def _heads_kernel(
    a, weight, cos, sin, q, k, v, rows, inner, tokens,
    rotation_row, rotation_token, k_row, k_token, v_row, v_token, q_heads, kv_heads, half,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A program computes some lanes of both halves of a head, which rotary embedding mixes."""
    head = tl.program_id(0)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = head * 2 * half + tl.minimum(lane, half - 1)
    one, two = _multiply_pair(
        a, weight, row, rows, first, first + half, inner, ROWS, OUTPUTS, INNER, EVEN
    )
    inside = (row < rows)[:, None] & (lane < half)[None]
    batch, token = (row // tokens).to(tl.int64), row % tokens
    if head < q_heads + kv_heads:
        angle = (batch * rotation_row + token * rotation_token)[:, None] + lane[None]
        c = tl.load(cos + angle, mask=inside, other=0.0)
        s = tl.load(sin + angle, mask=inside, other=0.0)
        one, two = one * c - two * s, two * c + one * s
    if head < q_heads:
        place = q + ((row.to(tl.int64) * q_heads + head) * 2 * half)[:, None]
    elif head < q_heads + kv_heads:
        place = k + (batch * k_row + token * k_token + (head - q_heads) * 2 * half)[:, None]
    else:
        of_head = (head - q_heads - kv_heads) * 2 * half
        place = v + (batch * v_row + token * v_token + of_head)[:, None]
    tl.store(place + lane[None], one.to(q.dtype.element_ty), mask=inside)
    tl.store(place + lane[None] + half, two.to(q.dtype.element_ty), mask=inside)


@triton.jit
def _geglu_kernel(
    a, weight, out, rows, inner, units,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A program computes gates and ups of some hidden units, then GELU(gate) · up."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tl.minimum(unit, units - 1)
    gate, up = _multiply_pair(
        a, weight, row, rows, first, first + units, inner, ROWS, OUTPUTS, INNER, EVEN
    )
    value = gelu(gate) * up
    inside = (row < rows)[:, None] & (unit < units)[None]
    place = out + row[:, None].to(tl.int64) * units + unit[None]
    tl.store(place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_product_kernel(
    a, weight, gate, residual, parts, counts, rows, outputs, inner, share_inner,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    """A program multiplies a share of the inner size; the last one of a tile adds all shares."""
    tile, row_tile, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tl.minimum(output, outputs - 1)
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    end = tl.minimum(share * share_inner + share_inner, inner)
    for start in range(share * share_inner, end, INNER):
        k = start + tl.arange(0, INNER)
        total = _multiply(total, a, weight, row, rows, first, k, inner, EVEN)
    inside = (row < rows)[:, None] & (output < outputs)[None]
    place = row[:, None].to(tl.int64) * outputs + output[None]
    size = rows.to(tl.int64) * outputs
    tl.store(parts + share * size + place, total, mask=inside)
    tl.debug_barrier()  # every thread's stores come before the count
    count = counts + row_tile * tl.num_programs(0) + tile
    if tl.atomic_add(count, 1) == SHARES - 1:
        tl.store(count, 0)
        total = tl.zeros([ROWS, OUTPUTS], tl.float32)
        for other in range(SHARES):
            # Not through the first cache, which other programs' stores do not reach.
            at = parts + other * size + place
            total += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        if gate is not None:
            total = total * tl.load(gate + first)[None]
        total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + place, total.to(residual.dtype.element_ty), mask=inside)
