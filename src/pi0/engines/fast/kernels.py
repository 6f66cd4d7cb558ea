"""The operations that the network is made of, in plain PyTorch, for any device and dtype.

Engines replace what they can do faster; a replacement equals these in the tests.

Axes: R rows (tokens of all observations), E width, N outputs, H heads, K key/value heads, D head
dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0.engines.fast.matrix import Matrix
from pi0.model.gemma import EPS as RMS_EPS
from pi0.model.gemma import logit_bound, rotate
from pi0.model.siglip import EPS as LAYER_EPS

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [B, T, 1, D/2] float32


class Norm(NamedTuple):
    """What a norm of Gemma does besides dividing by rms(x): scale, with the 1 of 1 + w in it, shift
    and gate of the branch that follows, each [E] float32 or [R, E] where rows differ."""

    scale: Tensor
    shift: Tensor | None = None
    gate: Tensor | None = None


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x [R, E] / rms(x) · scale + shift, in the dtype of x."""
    rows = norm.scale.ndim > 1
    normed = F.rms_norm(x.float(), x.shape[-1:], None if rows else norm.scale, RMS_EPS)
    if rows:
        normed = normed * norm.scale
    if norm.shift is not None:
        normed = normed + norm.shift
    return normed.to(x.dtype)


class Kernels:
    """Plain PyTorch. What matrices are multiplied with (an operand) is engine-specific;
    `into` is the matrix that an operand is meant for."""

    def lay_out(self, matrix: Matrix) -> Matrix:
        """A matrix that has not been filled, in the layout that these kernels want.

        The layout is kept in files (`weight_cache.py`): it depends on the class, not the processor.
        """
        return matrix

    def operand(self, x: Tensor, into: Matrix) -> Any:
        """x [R, E] as an operand."""
        return x

    def rms_norm(self, x: Tensor, norm: Norm, into: Matrix) -> Any:
        """x [R, E] / rms(x) · scale + shift, as an operand."""
        return self.operand(rms_norm(x, norm), into)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, into: Matrix) -> Any:
        """Layer normalisation of x [R, E], as an operand."""
        normed = F.layer_norm(x.float(), x.shape[-1:], weight, bias, LAYER_EPS)
        return self.operand(normed.to(x.dtype), into)

    def project(
        self, a: Any, matrix: Matrix, residual: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """(a · matrixᵀ + bias) · gate + residual: [R, N]; a gate comes with a residual."""
        return self._add(F.linear(a, matrix.weight, matrix.bias), residual, gate)

    def _add(self, out: Tensor, residual: Tensor | None, gate: Tensor | None) -> Tensor:
        """A fresh product [R, N], gated and with its residual."""
        if residual is None:
            return out
        if gate is None:
            return out.add_(residual)
        return torch.addcmul(residual.float(), out, gate).to(out.dtype)

    def gelu(self, a: Any, first: Matrix, into: Matrix) -> Any:
        """Hidden units of SigLIP's MLP, as an operand: GELU of a · firstᵀ, in its tanh form."""
        return self.operand(F.gelu(self.project(a, first), approximate="tanh"), into)

    def geglu(self, a: Any, gate_up: Matrix, into: Matrix) -> Any:
        """Hidden units of Gemma's MLP, as an operand: GELU of their gates times ups."""
        gate, up = self.project(a, gate_up).chunk(2, dim=-1)
        return self.operand(F.gelu(gate, approximate="tanh").mul_(up), into)

    def project_heads(
        self, a: Any, matrix: Matrix, rotation: Rotation, k: Tensor, v: Tensor
    ) -> Tensor:
        """A product of the rows of k and v, split as `split` does: queries [B, T, H, D]."""
        return self.split(self.project(a, matrix).view(*k.shape[:2], -1), rotation, k, v)

    def split(self, qkv: Tensor, rotation: Rotation, k: Tensor, v: Tensor) -> Tensor:
        """Writes the keys and values of qkv [B, T, (H + 2K)·D] into k and v [B, T, K, D] and
        returns its queries [B, T, H, D], of which there may be none; queries and keys are rotated.
        """
        kv_heads, width = k.shape[2:]
        heads = qkv.view(*qkv.shape[:2], -1, width)
        sizes = [heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads]
        q, keys, values = torch.split(heads, sizes, dim=2)
        k.copy_(rotate(keys.float(), *rotation))
        v.copy_(values)
        return rotate(q.float(), *rotation).to(q.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
        """Attention: q [B, T, H, D], k and v [B, S, K, D], valid [B, S] bool → [B·T, H·D].

        All queries of a row see the same keys, so heads that share a key/value head count as more
        queries. PyTorch's kernels for CPUs may turn a logit of NaN into a weight of 0, so there
        the result is NaN where logits could leave float32.
        """
        batch, t, heads, width = q.shape
        kv_heads = k.shape[2]
        check = 0 * logit_bound(q, k) if q.numel() and q.device.type == "cpu" else None
        q = q.view(batch, t, kv_heads, heads // kv_heads, width).transpose(1, 2).flatten(2, 3)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        mask = None if valid is None else valid[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, mask)
        out = out.view(batch, kv_heads, t, heads // kv_heads, width).transpose(1, 2)
        out = out.reshape(batch * t, heads * width)
        return out if check is None else out.add_(check)
