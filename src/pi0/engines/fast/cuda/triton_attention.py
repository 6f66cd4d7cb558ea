"""Triton kernels for attention: of the suffix's few queries, and of many with a mask.

The actions' few queries have their keys shared out among many programs, which would leave most of a
GPU idle otherwise. Masks are read as they are. Many queries without a mask are PyTorch's, and so is
all attention in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

UNSEEN = tl.constexpr(-1e30)  # the logit of a masked key
# a·b + c is rounded once: Triton's default up to 3.9, which warns if it is not asked for.
FUSED = {"enable_fp_fusion": True}
MATRIX_DTYPES = {torch.bfloat16}  # float32 has no tensor cores, and no room in shared memory


class Tile(NamedTuple):
    """What a program of the attention holds: rows and columns of the logits."""

    queries: int
    keys: int
    warps: int
    stages: int


# 256 wide these take 82 and 68 KB of shared memory, of the 99 that the smallest GPUs have, and no
# stack: tests/engines/test_triton_compiles.py.
FEW = Tile(16, 64, warps=4, stages=2)  # the suffix's queries: their keys are shared out
MANY = Tile(64, 32, warps=8, stages=2)  # the prefix's: enough to keep a GPU busy without
SHARE = 64  # keys that one program goes through, of few queries
MOST_QUERIES = 1024  # that are few
LEAST_WIDTH = 16  # of an operand of `tl.dot` in bfloat16; the interpreter takes less


def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor | None:
    """See `Kernels.attend`; None where PyTorch's is to be used."""
    few = q[..., 0].numel() <= MOST_QUERIES
    if q.dtype not in MATRIX_DTYPES or not (few or valid is not None):
        return None
    return _attend(q, k, v, valid, *((FEW, SHARE) if few else (MANY, k.shape[1])))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, tile: Tile, share: int
) -> Tensor:
    batch, t, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    pairs, group = batch * kv_heads, heads // kv_heads
    rows, shares = t * group, triton.cdiv(keys, share)
    sums = q.new_empty(shares, pairs, rows, width, dtype=torch.float32)
    stats = q.new_empty(shares, pairs, rows, 2, dtype=torch.float32)
    out = q.new_empty(batch * t, heads * width)
    block = max(LEAST_WIDTH, triton.next_power_of_2(width))
    _attend_kernel[(triton.cdiv(rows, tile.queries), shares, pairs)](
        *(q, k, v, valid, sums, stats, rows, keys, share, kv_heads, group, width, width**-0.5),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        0 if valid is None else valid.stride(0),
        *(tile.queries, tile.keys, block),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **FUSED,
    )
    _join_kernel[(rows, pairs)](
        *(sums, stats, out, rows, shares, kv_heads, group, width),
        *(triton.next_power_of_2(shares), block),
        **FUSED,
    )
    return out


@triton.jit
def _attend_kernel(
    q,
    k,
    v,
    valid,
    sums,
    stats,
    rows,
    keys,
    share_keys,
    kv_heads,
    group,
    width,
    factor,
    q_row,
    q_token,
    k_row,
    k_token,
    v_row,
    v_token,
    valid_row,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program lets QUERIES queries of a key/value head see `share_keys` keys, KEYS at a time.

    It leaves Σ exp(l - m) v in `sums`, and m and Σ exp(l - m) in `stats`, l being the logits and m
    the largest of them.
    """
    share, pair = tl.program_id(1), tl.program_id(2)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    lane = tl.arange(0, WIDTH)
    asked = (query < rows)[:, None] & (lane < width)[None]
    head = kv_head * group + query % group
    source = batch * q_row + (query // group) * q_token + head * width
    queries = tl.load(q + source[:, None] + lane[None], mask=asked, other=0.0)
    peak = tl.full([QUERIES], UNSEEN, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    summed = tl.zeros([QUERIES, WIDTH], tl.float32)
    end = tl.minimum(share * share_keys + share_keys, keys)
    for start in range(share * share_keys, end, KEYS):
        key = start + tl.arange(0, KEYS)
        seen = key < end
        if valid is not None:
            seen = tl.load(valid + batch * valid_row + key, mask=seen, other=0) != 0
        there = (key < end)[:, None] & (lane < width)[None]
        of_keys = batch * k_row + key[:, None] * k_token + kv_head * width + lane[None]
        some_keys = tl.load(k + of_keys, mask=there, other=0.0)
        of_values = batch * v_row + key[:, None] * v_token + kv_head * width + lane[None]
        some_values = tl.load(v + of_values, mask=there, other=0.0)
        logits = tl.dot(queries, tl.trans(some_keys), input_precision="ieee") * factor
        logits = tl.where(seen[None], logits, UNSEEN)
        higher = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.where(seen[None], tl.exp(logits - higher[:, None]), 0.0)
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weights, 1)
        weights = weights.to(some_values.dtype)
        summed = summed * shrink[:, None] + tl.dot(weights, some_values, input_precision="ieee")
        peak = higher
    at = (share * tl.num_programs(2) + pair).to(tl.int64) * rows + query
    tl.store(sums + at[:, None] * width + lane[None], summed, mask=asked)
    tl.store(stats + at * 2, peak, mask=query < rows)
    tl.store(stats + at * 2 + 1, total, mask=query < rows)


@triton.jit
def _join_kernel(
    sums,
    stats,
    out,
    rows,
    shares,
    kv_heads,
    group,
    width,
    SHARES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program joins what a query saw of all shares."""
    query, pair = tl.program_id(0), tl.program_id(1)
    share, lane = tl.arange(0, SHARES), tl.arange(0, WIDTH)
    at = (share * tl.num_programs(1) + pair).to(tl.int64) * rows + query
    peak = tl.load(stats + at * 2, mask=share < shares, other=UNSEEN)
    total = tl.load(stats + at * 2 + 1, mask=share < shares, other=0.0)
    weight = tl.exp(peak - tl.max(peak, 0))
    there = (share < shares)[:, None] & (lane < width)[None]
    summed = tl.load(sums + at[:, None] * width + lane[None], mask=there, other=0.0)
    value = tl.sum(summed * weight[:, None], 0) / tl.sum(total * weight, 0)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    token = batch.to(tl.int64) * (rows // group) + query // group
    target = (token * kv_heads * group + kv_head * group + query % group) * width
    tl.store(out + target + lane, value.to(out.dtype.element_ty), mask=lane < width)
