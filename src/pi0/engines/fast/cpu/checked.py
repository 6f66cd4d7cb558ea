"""The kernels of int8, shown one by one: what an operation should compute, and what it does.

Int8 has code of its own for norms, activations and products, which float32 does not run, and what
they compute is rounded to eight bits, behind which a small mistake can hide. But rounding to a
known step is no noise: a value may be half a step from what it should be, and the step itself, the
largest magnitude of its row / 127, is as exact as float32. So steps are shown, and values less the
half step that rounding explains, of activations and of the packed weights. Products of rounded
values are exact, and shown as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint
from pi0.engines.base import SeeOperation
from pi0.engines.fast.cpu.int8 import Int8Kernels, Quantised
from pi0.engines.fast.equalise import find_equalisers
from pi0.engines.fast.kernels import Kernels, Norm, Rotation
from pi0.engines.fast.matrix import INT8_MAX, Matrix
from pi0.engines.fast.weights import EMBEDDING, PackedWeights, allocated, fill

STAGES = {"vlm": "vlm_transformer", "expert": "expert_transformer"}
PLAIN = Kernels()


class CheckedKernels(Kernels):
    """Hands everything to other kernels and shows it beside plain PyTorch in float32."""

    def __init__(self, kernels: Int8Kernels, weights: PackedWeights, see: SeeOperation) -> None:
        self.kernels, self.see = kernels, see
        self.names = {id(matrix): name for name, matrix in weights.matrices.items()}
        self.place = ""

    def operand(self, x: Tensor, into: Matrix) -> Any:
        return self._operand("operand", into, x, self.kernels.operand(x, into))

    def rms_norm(self, x: Tensor, norm: Norm, into: Matrix) -> Any:
        expected = PLAIN.rms_norm(x, norm, into)
        return self._operand("rms_norm", into, expected, self.kernels.rms_norm(x, norm, into))

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, into: Matrix) -> Any:
        expected = PLAIN.layer_norm(x, weight, bias, into)
        found = self.kernels.layer_norm(x, weight, bias, into)
        return self._operand("layer_norm", into, expected, found)

    def gelu(self, a: Any, first: Matrix, into: Matrix) -> Any:
        expected = PLAIN.gelu(*self._plain(a, first), into)
        return self._operand("gelu", first, expected, self.kernels.gelu(a, first, into))

    def geglu(self, a: Any, gate_up: Matrix, into: Matrix) -> Any:
        expected = PLAIN.geglu(*self._plain(a, gate_up), into)
        return self._operand("geglu", gate_up, expected, self.kernels.geglu(a, gate_up, into))

    def project(
        self, a: Any, matrix: Matrix, residual: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        expected = PLAIN.project(*self._plain(a, matrix), residual, gate)
        found = self.kernels.project(a, matrix, residual, gate)
        self._show("project", matrix, expected, found)
        return found

    def split(self, qkv: Tensor, rotation: Rotation, k: Tensor, v: Tensor) -> Tensor:
        keys, values = torch.empty_like(k), torch.empty_like(v)
        expected = PLAIN.split(qkv, rotation, keys, values)
        found = self.kernels.split(qkv, rotation, k, v)
        for name, a, b in (("q", expected, found), ("k", keys, k), ("v", values, v)):
            if a.numel():
                self.see(f"{self.place}.split_{name}", a, b)
        return found

    def attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
        expected, found = (kernels.attend(q, k, v, valid) for kernels in (PLAIN, self.kernels))
        if found.numel():
            self.see(f"{self.place}.attend", expected, found)
        return found

    def _plain(self, a: Any, matrix: Matrix) -> tuple[Tensor, Matrix]:
        return self.kernels.dequantised(a), self.kernels.plain(matrix)

    def _operand(self, name: str, matrix: Matrix, expected: Tensor, found: Any) -> Any:
        if isinstance(found, Quantised):
            self._show(f"{name}_step", matrix, step_of(expected), found.scale)
            value = self.kernels.dequantised(found)
            self._show(name, matrix, expected, less_half_a_step(expected, value, found.scale))
        else:
            self._show(name, matrix, expected, found)
        return found

    def _show(self, name: str, matrix: Matrix, expected: Tensor, found: Tensor) -> None:
        self.place = place_of(self.names[id(matrix)])
        self.see(f"{self.place}.{name}", expected, found)


class CheckedMatrix(Matrix):
    """Shows the rows that it is given beside those of a quantised matrix."""

    def __init__(self, name: str, matrix: Matrix, kernels: Int8Kernels, see: SeeOperation) -> None:
        super().__init__(matrix.weight, matrix.bias, matrix.scale, matrix.offset)
        self.place, self.kernels, self.see = place_of(name), kernels, see

    def write_rows(self, at: int, values: Tensor) -> None:
        assert self.scale is not None
        rows, values = slice(at, at + len(values)), values.float()
        found, step = self.kernels.plain(self).weight[rows], self.scale[rows]
        for name, a, b in (
            ("weight_step", step_of(values), step),
            ("weight", values, less_half_a_step(values, found, step)),
        ):
            show_weight(self.see, f"{self.place}.{name}", a, b)


@torch.inference_mode()
def show_weights(
    checkpoint: Checkpoint, weights: PackedWeights, kernels: Int8Kernels, see: SeeOperation
) -> None:
    """Shows matrices, biases and all else but the tokens' table, which is a stage of its own,
    beside the checkpoint's parameters."""
    scales = {
        norm: found.scale for norm, found in find_equalisers(checkpoint, weights.scheme).items()
    }
    shown = allocated(checkpoint, PackedWeights(weights.config, weights.scheme))
    for name, matrix in weights.matrices.items():
        bias = shown.matrices[name].bias
        shown.matrices[name] = CheckedMatrix(name, replace(matrix, bias=bias), kernels, see)
    del shown.tensors[EMBEDDING]
    fill(shown, checkpoint, scales=scales)
    for name, matrix in weights.matrices.items():
        bias = shown.matrices[name].bias
        if bias is not None:
            found = torch.zeros_like(bias) if matrix.bias is None else matrix.bias
            show_weight(see, f"{place_of(name)}.bias", bias, found)
    for name, expected in shown.tensors.items():
        show_weight(see, f"{place_of(name)}.parameters", expected, weights[name])


def show_weight(see: SeeOperation, name: str, expected: Tensor, found: Tensor) -> None:
    """Shows two tensors, unless both are the same of one value throughout."""
    if not torch.equal(expected, found) or (expected != expected.flatten()[0]).any():
        see(name, expected, found)


def step_of(rows: Tensor) -> Tensor:
    """Of values [R, E] in eight bits: [R]."""
    return rows.float().abs().amax(dim=1) / INT8_MAX


def less_half_a_step(expected: Tensor, found: Tensor, step: Tensor) -> Tensor:
    """What is found [R, E], less what rounding to steps [R] explains of its distance."""
    half = step[:, None] / 2
    return expected + (found - torch.clamp(found, expected - half, expected + half))


def place_of(matrix: str) -> str:
    """Stage and block of a matrix, or of another tensor, by its name among packed weights."""
    tower, *rest = matrix.split(".")
    stage = STAGES.get(tower, tower)
    return f"{stage}.block.{rest[1]}" if rest[:1] == ["blocks"] else stage
