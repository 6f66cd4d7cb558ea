"""Plain PyTorch for CPUs, with eight-bit matrices: one scale per output of a weight and one per
token of activations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.matrix import Matrix, quantise_rows


class Quantised(NamedTuple):
    """values [R, E] int8, or with 128 added uint8, · scale [R] float32, NaN for a row with a value
    that is not finite."""

    values: Tensor
    scale: Tensor


class Int8Kernels(Kernels):
    """Operands of quantised matrices are quantised, and their products are `torch._int_mm`; all
    else has the dtype of the activations."""

    def operand(self, x: Tensor, into: Matrix) -> Any:
        return x if into.scale is None else Quantised(*quantise_rows(x, torch.int8))

    def dequantised(self, a: Any) -> Tensor:
        """The values of an operand [R, E] in float32."""
        return a.values * a.scale[:, None] if isinstance(a, Quantised) else a.float()

    def plain(self, matrix: Matrix) -> Matrix:
        """The same matrix in float32, [N, K]."""
        weight = matrix.weight.float()
        return Matrix(
            weight if matrix.scale is None else weight * matrix.scale[:, None], matrix.bias
        )

    def project(
        self, a: Any, matrix: Matrix, residual: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        if matrix.scale is None:
            return super().project(a, matrix, residual, gate)
        product = torch._int_mm(a.values, matrix.weight.t())
        out: Tensor = product * a.scale[:, None] * matrix.scale
        if matrix.bias is not None:
            out += matrix.bias
        return self._add(out, residual, gate)
