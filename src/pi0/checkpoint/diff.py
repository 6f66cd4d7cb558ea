"""Two checkpoints, tensor by tensor: whatever their layouts, dtypes and orders.

Tensors meet by our names and are read piece by piece from both, so that memory stays small. Where
one is stored in a narrower dtype, both are rounded to that before they are compared: the other had
to be, to become it. Knows nothing of what the tensors are for, nor of statistics and processors
(`pi0.policy.diff`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint, Progress

PIECE = 1 << 20  # values at a time, which become float64


@dataclass(frozen=True)
class TensorDifference:
    """A tensor, by our name, that is not the same in A and B.

    Attributes:
        what: "only in A", "only in B", "shape [..] and [..]", or "values".
        rel_l2: norm of the difference by A's norm; pcc: Pearson's correlation; max_abs: largest
            absolute difference. NaN where it is not defined; None: values were not compared.
    """

    name: str
    what: str
    rel_l2: float | None = None
    pcc: float | None = None
    max_abs: float | None = None


@dataclass
class WeightsDiff:
    """What two checkpoints have in common.

    Attributes:
        compared: how many tensors had their values compared; `within`: how many of these differ by
            no more than is tolerated.
        rounded: of these, the number that was rounded first, by the dtype.
        differences: the largest relative ones first.
    """

    compared: int = 0
    within: int = 0
    rounded: dict[str, int] = field(default_factory=dict)
    differences: list[TensorDifference] = field(default_factory=list)


def diff_weights(
    a: Checkpoint, b: Checkpoint, tolerance: float = 0.0, progress: Progress = lambda _: None
) -> WeightsDiff:
    """Compares every tensor that the model reads.

    Args:
        tolerance: largest relative L2 of a tensor that counts as the same.
        progress: called with the bytes read of both.

    Raises:
        CheckpointError: a tensor holds NaN or infinite values.
    """
    result = WeightsDiff()
    shapes = [{ours: c.tensors[name].shape for name, ours in c.names.ours.items()} for c in (a, b)]
    for name in dict.fromkeys([*shapes[0], *shapes[1]]):
        x, y = (of.get(name) for of in shapes)
        if x is None or y is None:
            what = f"only in {'B' if x is None else 'A'}"
            result.differences.append(TensorDifference(name, what))
        elif x != y:
            what = f"shape {list(x)} and {list(y)}"
            result.differences.append(TensorDifference(name, what))
        else:
            found = _Comparison()
            for left, right in _pieces(_flat(a, name, progress), _flat(b, name, progress)):
                found.add(left, right)
            result.compared += 1
            if found.rounded:
                result.rounded[found.rounded] = result.rounded.get(found.rounded, 0) + 1
            if found.max_abs > 0:
                difference = found.difference(name)
                if _size(difference) <= tolerance:
                    result.within += 1
                else:
                    result.differences.append(difference)
    result.differences.sort(key=_size, reverse=True)
    return result


def _size(difference: TensorDifference) -> float:
    size = difference.rel_l2
    return math.inf if size is None or math.isnan(size) else size


class _Comparison:
    """Sums over two tensors of one shape, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = torch.zeros(6, dtype=torch.float64)  # a, b, aa, bb, ab, (a-b)²
        self.max_abs = 0.0
        self.rounded: str | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        """Takes flat pieces of both."""
        if a.dtype != b.dtype:
            narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
            self.rounded = str(narrow).removeprefix("torch.")
            a, b = a.to(narrow), b.to(narrow)
        x, y = a.double(), b.double()
        d = x - y
        self.sums += torch.stack([x.sum(), y.sum(), x @ x, y @ y, x @ y, d @ d])
        self.count += len(x)
        self.max_abs = max(self.max_abs, float(d.abs().max()) if len(d) else 0.0)

    def difference(self, name: str) -> TensorDifference:
        a, b, aa, bb, ab, dd = self.sums.tolist()
        n, nan = self.count, math.nan
        spread = (aa - a * a / n) * (bb - b * b / n)
        return TensorDifference(
            name,
            "values",
            rel_l2=math.sqrt(dd / aa) if aa > 0 else nan,
            pcc=(ab - a * b / n) / math.sqrt(spread) if spread > 0 else nan,
            max_abs=self.max_abs,
        )


def _flat(checkpoint: Checkpoint, name: str, progress: Progress) -> Iterator[Tensor]:
    """A tensor in flat slabs, in the order of its elements."""
    for _, _, values in checkpoint.stream({name}):
        progress(values.nbytes)
        yield values.reshape(-1)


def _pieces(a: Iterator[Tensor], b: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of two flat tensors of one length, whose slabs are of different lengths."""
    x = y = torch.empty(0)
    while True:
        x, y = (x if len(x) else next(a, x)), (y if len(y) else next(b, y))
        n = min(len(x), len(y), PIECE)
        if n == 0:
            return
        yield x[:n], y[:n]
        x, y = x[n:], y[n:]
