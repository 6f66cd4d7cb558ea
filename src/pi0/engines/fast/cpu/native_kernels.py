"""The network's operations in native code (`native.py`), for float32 and eight bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pi0.engines.fast.cpu.int8 import Int8Kernels, Quantised
from pi0.engines.fast.cpu.native import Argument, Native
from pi0.engines.fast.kernels import Norm, Rotation
from pi0.engines.fast.matrix import Matrix
from pi0.model.gemma import EPS as RMS_EPS
from pi0.model.siglip import EPS as LAYER_EPS

BLOCK = 16  # outputs that lie together
LINEAR, GELU, GEGLU = range(3)  # kinds of products
QUERIES = 768  # rows of logits that are computed at a time


@dataclass
class NativeMatrix(Matrix):
    """Of whole blocks of rows: weight [N/16, K, 16] float32, or [N/16, K/4, 16, 4] of eight bits.

    Rows are brought into place as they come: a second pass over all weights takes seconds.
    """

    native: Native = field(kw_only=True)

    def write_rows(self, at: int, values: Tensor) -> None:
        assert values.dtype in (torch.float32, torch.bfloat16)
        if values.stride(1) != 1:
            values = values.contiguous()
        narrow = values.dtype == torch.bfloat16
        source = *values.shape, values.stride(0), narrow, values.data_ptr()
        self.native("pack", *source, at, self.weight, self.scale, self.offset)


class NativeKernels(Int8Kernels):
    """Plain PyTorch remains for matrices that do not come in whole blocks."""

    def __init__(self, native: Native) -> None:
        self.native = native

    def lay_out(self, matrix: Matrix) -> Matrix:
        weight, bias, scale = matrix.weight, matrix.bias, matrix.scale
        n, k = weight.shape
        if n % BLOCK or k % 4:
            return matrix
        if scale is None:
            return NativeMatrix(weight.view(n // BLOCK, k, BLOCK), bias, native=self.native)
        blocks, offset = (
            weight.view(n // BLOCK, k // 4, BLOCK, 4),
            torch.empty(n, dtype=torch.int32),
        )
        return NativeMatrix(blocks, bias, scale, offset, native=self.native)

    def dequantised(self, a: Any) -> Tensor:
        return super().dequantised(self._signed(a))

    def plain(self, matrix: Matrix) -> Matrix:
        if is_packed(matrix):
            packed = matrix.weight
            rows = packed.transpose(1, 2).reshape(len(packed) * BLOCK, -1)
            matrix = Matrix(rows, matrix.bias, matrix.scale)
        return super().plain(matrix)

    def operand(self, x: Tensor, into: Matrix) -> Any:
        if not is_packed(into):
            return super().operand(x, into)
        x = x.contiguous()
        return x if into.scale is None else self._quantise("quantise", x)

    def rms_norm(self, x: Tensor, norm: Norm, into: Matrix) -> Any:
        if into.offset is None or norm.scale.ndim > 1:
            return super().rms_norm(x, norm, into)
        return self._quantise("rms_norm", x, norm.scale, norm.shift, RMS_EPS)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, into: Matrix) -> Any:
        if into.offset is None:
            return super().layer_norm(x, weight, bias, into)
        return self._quantise("layer_norm", x, weight, bias, LAYER_EPS)

    def project(
        self, a: Any, matrix: Matrix, residual: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        if not is_packed(matrix):
            return super().project(self._signed(a), matrix, residual, gate)
        if gate is not None and gate.ndim > 1:
            return self._add(self._multiply(LINEAR, a, matrix), residual, gate)
        return self._multiply(LINEAR, a, matrix, gate, residual)

    def gelu(self, a: Any, first: Matrix, into: Matrix) -> Any:
        if not is_packed(first):
            return super().gelu(a, first, into)
        return self.operand(self._multiply(GELU, a, first), into)

    def geglu(self, a: Any, gate_up: Matrix, into: Matrix) -> Any:
        if not is_packed(gate_up) or len(gate_up.weight) % 2:
            return super().geglu(a, gate_up, into)
        return self.operand(self._multiply(GEGLU, a, gate_up), into)

    def split(self, qkv: Tensor, rotation: Rotation, k: Tensor, v: Tensor) -> Tensor:
        batch, tokens = qkv.shape[:2]
        kv_heads, width = k.shape[2:]
        q = qkv.new_empty(batch, tokens, qkv.shape[2] // width - 2 * kv_heads, width)
        sizes = tokens, q.shape[2], kv_heads, width // 2
        for row, cos, sin, *places in zip(qkv, *rotation, q, k, v, strict=True):
            self.native("split", *sizes, row, cos.contiguous(), sin.contiguous(), *places)
        return q

    def attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
        """With one key/value head, as in the trunks, some queries at a time: their logits stay in
        a cache between two products."""
        if k.shape[2] != 1:
            return super().attend(q, k, v, valid)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        factor, rows = q.shape[3] ** -0.5, q.shape[1] * q.shape[2]
        buffer = q.new_empty(min(QUERIES, rows), k.shape[1])
        for i in range(len(q)):
            keys, values = k[i, :, 0], v[i, :, 0]
            seen = None if valid is None else valid[i].contiguous()
            parts = (torch.split(x[i].flatten(0, 1), QUERIES) for x in (q, out))
            for queries, results in zip(*parts, strict=True):
                logits = torch.mm(queries, keys.t(), out=buffer[: len(queries)])
                self.native("softmax", *logits.shape, factor, seen, logits)
                torch.mm(logits, values, out=results)
        return out.view(len(q) * q.shape[1], -1)

    def _signed(self, a: Any) -> Any:
        """An operand without what is added for products.c: chunks of an MLP share it, and a last,
        odd one may not be packed."""
        if isinstance(a, Quantised) and a.values.dtype == torch.uint8:
            return Quantised((a.values.short() - self.native.zero).to(torch.int8), a.scale)
        return a

    def _multiply(
        self,
        kind: int,
        a: Tensor | Quantised,
        matrix: Matrix,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The finished product [R, N] float32; of half as many columns for GEGLU."""
        x, scale = a if isinstance(a, Quantised) else (a, None)
        columns = len(matrix.weight) * BLOCK // (2 if kind == GEGLU else 1)
        out = torch.empty(len(x), columns)
        weights = matrix.weight, matrix.offset, matrix.scale, matrix.bias
        sizes = *out.shape, x.shape[1]
        self.native("multiply", kind, *sizes, x, scale, *weights, gate, residual, out)
        return out

    def _quantise(self, name: str, x: Tensor, *arguments: Argument) -> Quantised:
        dtype = torch.uint8 if self.native.zero else torch.int8
        out = Quantised(torch.empty_like(x, dtype=dtype), x.new_empty(len(x)))
        self.native(name, *x.shape, x, *arguments, *out)
        return out


def is_packed(matrix: Matrix) -> bool:
    """Whether a matrix is in the layout of products.c; others are [N, K]."""
    return matrix.weight.ndim > 2
