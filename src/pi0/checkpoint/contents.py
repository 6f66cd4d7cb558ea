"""What is in the tensors: moments, extremes and a hash of the values, in one pass over the files.

The hash is that of our name's values as float32 and of the shape, so that it is the same in every
layout, and in bfloat16 and float32 where the values are equal: a bfloat16 number is a float32
number. Weights that were rounded to bfloat16 have another hash than before, since their values are
others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint, Progress

PIECE = 1 << 20  # values at a time, which become float64


@dataclass(frozen=True)
class TensorContents:
    """One tensor, by our name.

    Attributes:
        dtype: of the values as they are read, "float32" or "bfloat16".
        mean, std, max_abs: of all values; std of the population. NaN if a value is not finite.
        constant: whether all values are the same.
        not_finite: how many values are NaN or infinite.
        hash: SHA-256 of shape and values as float32, in hexadecimal digits.
    """

    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float
    max_abs: float
    constant: bool
    not_finite: int
    hash: str


def read_contents(
    checkpoint: Checkpoint, progress: Progress = lambda _: None, check_finite: bool = True
) -> dict[str, TensorContents]:
    """Reads every tensor that the model reads, by our names in alphabetical order.

    Raises:
        CheckpointError: a tensor holds NaN or infinite values, unless `check_finite` is False.
    """
    shapes = {ours: checkpoint.tensors[name].shape for name, ours in checkpoint.names.ours.items()}
    sums: dict[str, _Sums] = {}
    for name, _, values in checkpoint.stream(check_finite=check_finite):
        if name not in sums:
            sums[name] = _Sums(shapes[name], str(values.dtype).removeprefix("torch."))
        for piece in torch.split(values.reshape(-1), PIECE):
            sums[name].add(piece)
        progress(values.nbytes)
    return {name: sums[name].result() for name in sorted(sums)}


def total_hash(contents: Mapping[str, TensorContents]) -> str:
    """One hash for all: SHA-256 of the lines "NAME HASH", in the order of the names."""
    lines = "".join(f"{name} {contents[name].hash}\n" for name in sorted(contents))
    return hashlib.sha256(lines.encode()).hexdigest()


@dataclass
class _Sums:
    """A tensor that is being read, piece by piece."""

    shape: tuple[int, ...]
    dtype: str
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # of deviations from the mean
    least: float = math.inf
    greatest: float = -math.inf
    not_finite: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def __post_init__(self) -> None:
        self.digest.update(f"{list(self.shape)}".encode())

    def add(self, piece: Tensor) -> None:
        """Takes flat values, in the order of the elements."""
        if not len(piece):
            return
        self.digest.update(piece.float().contiguous().numpy().astype("<f4", copy=False).data)
        x = piece.double()
        variance, mean = (float(v) for v in torch.var_mean(x, correction=0))
        # Moments of both parts from those of each: Chan, Golub and LeVeque (1983).
        total, delta = self.count + len(x), mean - self.mean
        self.squares += variance * len(x) + delta**2 * self.count * len(x) / total
        self.mean += delta * len(x) / total
        self.count = total
        least, greatest = (float(v) for v in torch.aminmax(x))
        self.least, self.greatest = min(self.least, least), max(self.greatest, greatest)
        if not (math.isfinite(least) and math.isfinite(greatest)):
            self.not_finite += int((~torch.isfinite(x)).sum())

    def result(self) -> TensorContents:
        return TensorContents(
            self.shape,
            self.dtype,
            self.mean,
            math.sqrt(self.squares / self.count) if self.count else math.nan,
            math.nan if self.not_finite else max(abs(self.least), abs(self.greatest)),
            self.least == self.greatest and not self.not_finite,
            self.not_finite,
            self.digest.hexdigest(),
        )
