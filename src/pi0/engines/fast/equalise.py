"""Scales moved from a norm's outlier channels into the matrices that read it, before these become
int8.

In trained models a few channels of a norm are tens of times as large as the others. One scale per
token then leaves the others few of its 127 steps. The product of a norm and a matrix stays the same
if a channel of the norm is divided by s and the matrix's column multiplied by s; with s =
√(activation / weight) both are equally uneven, as in SmoothQuant (arXiv 2211.10438, with its
exponent of 1/2). There activations are measured on data; here they are what the norm's own weights
make of a channel of unit size, so that the decision depends on the checkpoint alone.

It does not know outliers of the residual stream, which the weights do not state. Left as they are:
what is read behind a nonlinearity, and the vision tower's last norm, whose output is a stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint, empty_model
from pi0.config import Pi0Config
from pi0.engines.fast.network import expert_norms, modulations
from pi0.engines.fast.weights import PackedWeights, Scheme, norm_before, targets

NORM = re.compile(r"(?:vision_tower|vlm|expert)\.blocks\.\d+\.norm[12]")
TIMES = 11  # of a conditioned norm, from 1 to 0
UNEVEN = 4.0  # largest square of a norm's channels by their mean, above which its readers are read
SAMPLED = 8  # every 8th row of a matrix is looked at
GAIN = 3.0  # least factor by which the square of the expected error has to fall
SMALLEST = 1e-3  # of a typical size: what is less is not made larger any more


class Equaliser(NamedTuple):
    """scale [E] float32: channels of the norm are divided by it, and its readers' columns are
    multiplied. largest: the norm's largest channel by its median. before, after: `expected_error`.
    """

    scale: Tensor
    largest: float
    before: float
    after: float


@torch.inference_mode()
def find_equalisers(checkpoint: Checkpoint, scheme: Scheme) -> dict[str, Equaliser]:
    """By the norm's name, for norms with outliers whose readers all become int8.

    Reads the norms, and some rows of the matrices behind uneven ones.
    """
    config = checkpoint.config
    readers = _readers(config, scheme)
    uneven = {
        norm: square
        for norm, square in _norm_squares(checkpoint, scheme).items()
        if norm in readers and square.max() > UNEVEN * square.mean()
    }
    if not uneven:
        return {}
    columns = _column_squares(checkpoint, {norm: readers[norm] for norm in uneven})
    found = {norm: equaliser(square, columns[norm]) for norm, square in uneven.items()}
    return {norm: chosen for norm, chosen in found.items() if chosen.before > GAIN * chosen.after}


def equaliser(activations: Tensor, weights: Tensor) -> Equaliser:
    """Of the mean squares of a norm's channels and of its readers' columns, both [E].

    Where no channel is held at `SMALLEST`, the expected error does not grow: with squares a and w,
    2 · max √(a w) · Σ √(a w) ≤ 2 · √(max a · Σ w · max w · Σ a) ≤ max a · Σ w + max w · Σ a.
    """
    sizes = [
        square.clamp(min=SMALLEST**2 * float(square.median())) for square in (activations, weights)
    ]
    scale = (sizes[0] / sizes[1]) ** 0.25
    scale /= scale.log().mean().exp()
    after = expected_error(activations / scale.square(), weights * scale.square())
    largest = float((activations.max() / activations.median()).sqrt())
    return Equaliser(scale, largest, expected_error(activations, weights), after)


def expected_error(activations: Tensor, weights: Tensor) -> float:
    """Mean square error of a product in int8, by that of its result, in units that all matrices
    share: 2 where all channels [E], given as mean squares, are alike.

    A step is as large as the largest channel, for activations and for weights; every channel gets
    the error of a step, times the other factor.
    """
    error = activations.max() * weights.sum() + weights.max() * activations.sum()
    return float(error / (activations @ weights))


def _readers(config: Pi0Config, scheme: Scheme) -> dict[str, list[str]]:
    """The matrices' names, as the model has them, that read each norm, if all become int8."""
    readers: dict[str, list[str]] = {}
    finer = set()
    for name in empty_model(config, torch.float32).state_dict():
        norm = norm_before(name)
        found = targets(config, scheme, name)
        if norm and found and name.endswith("weight"):
            readers.setdefault(norm, []).append(name)
            if any(scheme.dtype_of(target.matrix) != torch.int8 for target in found):
                finer.add(norm)
    return {norm: names for norm, names in readers.items() if norm not in finer}


def _norm_squares(checkpoint: Checkpoint, scheme: Scheme) -> dict[str, Tensor]:
    """Mean squares [E] of a norm's channels where what it normalises has unit size; of conditioned
    ones the largest at any time."""
    config = checkpoint.config
    shapes = {
        name: value.shape
        for name, value in empty_model(config, torch.float32).state_dict().items()
        if NORM.match(name) or name.startswith(("time_mlp", "expert.norm"))
    }
    weights = PackedWeights(config, scheme)
    for name, rows, values in checkpoint.stream(shapes, check_finite=False):
        if name not in weights.tensors:
            weights.tensors[name] = torch.empty(shapes[name], dtype=values.dtype)
        weights.tensors[name][rows] = values
    squares = {}
    for name, tensor in weights.tensors.items():
        norm = name.removesuffix(".weight")
        if NORM.fullmatch(norm):
            bias = weights.tensors.get(f"{norm}.bias")
            squares[norm] = (
                (1 + tensor.float()).square()  # as Gemma's are stored
                if bias is None
                else tensor.float().square() + bias.float().square()
            )
    if config.adaptive_norm:
        scale, shift, _ = modulations(weights, torch.linspace(1, 0, TIMES)).unbind(2)
        largest = (scale.square() + shift.square()).amax(0)  # [norms, E]
        squares |= dict(zip(expert_norms(config.expert.depth), largest, strict=True))
    return squares


def _column_squares(checkpoint: Checkpoint, readers: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """Mean squares [E] of the columns of the matrices that read a norm, of some of their rows."""
    norm_of = {name: norm for norm, names in readers.items() for name in names}
    squares: dict[str, Tensor] = {}
    for name, rows, values in checkpoint.stream(norm_of.keys(), check_finite=False):
        sampled = values[-rows.start % SAMPLED :: SAMPLED].float()
        norm = norm_of[name]
        squares[norm] = squares.get(norm, torch.zeros(values.shape[1])) + sampled.square().sum(0)
    return squares
