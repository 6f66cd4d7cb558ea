"""A matrix of a fast engine: its memory, and rows of a checkpoint that come into it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

INT8_MAX = 127
QUANTISED_AT_A_TIME = 128  # rows: what lies between stays in a cache


@dataclass
class Matrix:
    """weight [N, K], perhaps quantised by rows; bias [N]; scale [N] float32 of a quantised weight;
    offset: what kernels with a layout of their own need besides (`Kernels.lay_out`)."""

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None

    def write_rows(self, at: int, values: Tensor) -> None:
        """Fills rows from `at` on with values [n, K] float32 or bfloat16."""
        if self.scale is None:
            self.weight[at : at + len(values)].copy_(values)
            return
        for part in torch.split(values, QUANTISED_AT_A_TIME):
            rows = slice(at, at + len(part))
            self.weight[rows], self.scale[rows] = quantise_rows(part, self.weight.dtype)
            at += len(part)


PARTS = tuple(part.name for part in fields(Matrix))


def as_it_is(matrix: Matrix) -> Matrix:
    """A layout: rows one after the other."""
    return matrix


def quantised(dtype: torch.dtype) -> bool:
    """Whether matrices of a dtype have scales."""
    return dtype not in (torch.float32, torch.bfloat16)


def quantise_rows(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """values [R, K] float32 or bfloat16 → quantised, and scales [R] float32: values ≈ quantised ·
    scale.

    Symmetric; the largest magnitude of a row becomes the largest of the dtype.
    """
    limit = INT8_MAX if dtype == torch.int8 else torch.finfo(dtype).max
    # The maximum is exact in any dtype, and half the bytes are faster; the product is float32. A
    # row of zeros has to have a scale whose inverse is finite.
    smallest = limit * torch.finfo(torch.float32).tiny
    largest = values.abs().amax(dim=1).float().clamp_min_(smallest)
    scaled = values * (limit / largest)[:, None]
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), largest / limit
