"""Eight-bit matrices for CPUs: weights with a scale an output, activations with a scale a token.

Products are `torch._int_mm` (oneDNN), which takes weights as they lie in memory, or in a file. What
lies between them is one native pass over every row, or plain PyTorch where there is no C compiler.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.native import Native
from pi0.engines.fast.weights import Matrix, quantise_rows
from pi0.model.gemma import EPS as RMS_EPS
from pi0.model.siglip import EPS as LAYER_EPS


class Quantised(NamedTuple):
    """values [R, E] int8 · scale [R] float32."""

    values: Tensor
    scale: Tensor


class Int8Kernels(Kernels):
    """Operands of quantised matrices are quantised, in plain PyTorch; all else is float32."""

    def operand(self, x: Tensor, into: Matrix) -> Any:
        return x if into.scale is None else Quantised(*quantise_rows(x, torch.int8))

    def project(self, a: Any, matrix: Matrix, residual: Tensor | None = None) -> Tensor:
        if matrix.scale is None:
            return super().project(a, matrix, residual)
        out = multiply(a, matrix) * a.scale[:, None] * matrix.scale
        if matrix.bias is not None:
            out += matrix.bias
        return out if residual is None else out.add_(residual)


class NativeKernels(Int8Kernels):
    """The same in native code, and GeGLU of float32 matrices, too."""

    def __init__(self, native: Native) -> None:
        self._native = native

    def operand(self, x: Tensor, into: Matrix) -> Any:
        return x if into.scale is None else self._quantise("quantise", x.contiguous())

    def rms_norm(self, x: Tensor, weight: Tensor, into: Matrix) -> Any:
        if into.scale is None:
            return super().rms_norm(x, weight, into)
        return self._quantise("rms_norm", x, weight, RMS_EPS)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, into: Matrix) -> Any:
        if into.scale is None:
            return super().layer_norm(x, weight, bias, into)
        return self._quantise("layer_norm", x, weight, bias, LAYER_EPS)

    def project(self, a: Any, matrix: Matrix, residual: Tensor | None = None) -> Tensor:
        if matrix.scale is None:
            return super().project(a, matrix, residual)
        product = multiply(a, matrix)
        out = product.view(torch.float32)  # in place: of every element only its own is read
        self._native("finish", *product.shape, product, *self._scales(a, matrix), residual, out)
        return out

    def gelu(self, a: Any, first: Matrix, into: Matrix) -> Any:
        if first.scale is None or into.scale is None:
            return super().gelu(a, first, into)
        product = multiply(a, first)
        scales = self._scales(a, first)
        return self._product_quantised("gelu_quantise", product, product.shape[1], *scales)

    def geglu(self, a: Any, gate_up: Matrix, into: Matrix) -> Any:
        units = len(gate_up.weight) // 2
        if gate_up.scale is not None and into.scale is not None:
            product = multiply(a, gate_up)
            scales = a.scale, gate_up.scale
            return self._product_quantised("geglu_quantise", product, units, *scales)
        product = self.project(a, gate_up)
        hidden = product.new_empty(len(product), units)
        self._native("geglu", *hidden.shape, product, hidden)
        return self.operand(hidden, into)

    @staticmethod
    def _scales(a: Quantised, matrix: Matrix) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return a.scale, matrix.scale, matrix.bias

    def _quantise(self, name: str, x: Tensor, *arguments: Tensor | float) -> Quantised:
        out = Quantised(torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x)))
        self._native(name, *x.shape, x, *arguments, *out)
        return out

    def _product_quantised(
        self, name: str, product: Tensor, units: int, *scales: Tensor | None
    ) -> Quantised:
        rows = len(product)
        out = Quantised(
            product.new_empty(rows, units, dtype=torch.int8),
            product.new_empty(rows, dtype=torch.float32),
        )
        self._native(name, rows, units, product, *scales, *out)
        return out


def multiply(a: Quantised, matrix: Matrix) -> Tensor:
    """The product without scales: [R, N] int32."""
    return torch._int_mm(a.values, matrix.weight.t())
