"""Statistics of columns and pictures in one pass, in the forms of openpi and of LeRobot.

Mean and standard deviation are exact (up to float64), batch by batch. Source: T. F. Chan,
G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances" (1979), formula 2.1. The standard deviation is the population's, as in both projects.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.data.schema import Picture
from pi0.errors import DataError

Floats = NDArray[np.float64]

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
OPENPI = ("mean", "std", "q01", "q99")  # what openpi's norm_stats.json holds
EXACT_VALUES = 1 << 24  # 128 MiB in float64
BINS = 1 << 14


class RunningStatistics:
    """Statistics of vectors [D] that come in batches.

    Quantiles are those of `numpy.quantile` (linear between neighbours): exact up to `exact_values`
    numbers, which are kept; beyond that each is off by at most (max - min) / 8192, because counts
    in bins are kept instead.
    """

    def __init__(self, exact_values: int = EXACT_VALUES) -> None:
        self.count = 0
        self._exact_values = exact_values
        self._kept: list[Floats] = []
        self._bins: list[_Bins] = []

    def update(self, batch: NDArray[Any]) -> None:
        """Takes in vectors [..., D]; D is that of the first call.

        Raises:
            DataError: another D, or values that are not finite.
        """
        batch = np.asarray(batch, np.float64)
        batch = batch.reshape(-1, batch.shape[-1])
        if not len(batch):
            return
        self._require(batch)
        mean = batch.mean(axis=0)
        squares = ((batch - mean) ** 2).sum(axis=0)
        if not self.count:
            self._mean, self._squares = mean, squares
            self._min, self._max = batch.min(axis=0), batch.max(axis=0)
        else:
            total = self.count + len(batch)
            delta = mean - self._mean
            self._mean = self._mean + delta * (len(batch) / total)
            self._squares += squares + delta**2 * (self.count * len(batch) / total)
            self._min = np.minimum(self._min, batch.min(axis=0))
            self._max = np.maximum(self._max, batch.max(axis=0))
        self.count += len(batch)
        self._keep(batch)

    def result(self) -> dict[str, Floats]:
        """mean, std, min, max, q01, q10, q50, q90, q99, each [D], and count [1].

        Raises:
            DataError: there was no vector.
        """
        if not self.count:
            raise DataError("statistics: expected at least one frame, found none.")
        out = {
            "min": self._min,
            "max": self._max,
            "mean": self._mean,
            "std": np.sqrt(self._squares / self.count),
            "count": np.array([self.count]),
        }
        levels = list(QUANTILES.values())
        if self._bins:
            found = np.stack([bins.quantiles(levels, self.count) for bins in self._bins], axis=1)
            found = found.clip(self._min, self._max)
        else:
            found = np.quantile(np.concatenate(self._kept), levels, axis=0)
        return out | dict(zip(QUANTILES, found, strict=True))

    def _require(self, batch: Floats) -> None:
        if self.count and batch.shape[1] != len(self._mean):
            raise DataError(
                f"statistics: expected vectors of {len(self._mean)} values, found {batch.shape[1]}."
            )
        if not np.isfinite(batch).all():
            row = int(np.flatnonzero(~np.isfinite(batch).all(axis=1))[0])
            raise DataError(
                f"statistics: expected finite numbers, found {batch[row].tolist()} in row {row}."
            )

    def _keep(self, batch: Floats) -> None:
        if not self._bins:
            self._kept.append(batch.copy())
            if self.count * batch.shape[1] <= self._exact_values:
                return
            batch = np.concatenate(self._kept)
            self._kept = []
            self._bins = [_Bins() for _ in range(batch.shape[1])]
        for bins, values in zip(self._bins, batch.T, strict=True):
            bins.add(values)


class _Bins:
    """Counts of numbers in bins [key · 2^e, (key + 1) · 2^e).

    A wider range makes e grow: pairs of bins become one, so that a count never moves to a bin
    that its number is not in.
    """

    def __init__(self) -> None:
        self._keys = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)
        self._exponent = -1074  # of the smallest float64
        self._low, self._high = math.inf, -math.inf

    def add(self, values: Floats) -> None:
        """Counts numbers [N]."""
        self._low = min(self._low, float(values.min()))
        self._high = max(self._high, float(values.max()))
        # Half the bins for the range; and keys are to be exact integers of float64.
        width = max(
            (self._high - self._low) * 2 / BINS, max(abs(self._low), abs(self._high)) * 2.0**-50
        )
        exponent = max(math.frexp(width)[1] - 1, self._exponent) if width else self._exponent
        keys = self._keys >> min(exponent - self._exponent, 63)
        self._exponent = exponent
        new = np.floor(np.ldexp(values, -exponent)).astype(np.int64)
        counts = np.concatenate([self._counts, np.ones(len(new), np.int64)])
        self._keys, place = np.unique(np.concatenate([keys, new]), return_inverse=True)
        self._counts = np.bincount(place, counts).astype(np.int64)

    def quantiles(self, levels: list[float], count: int) -> Floats:
        """Between the two neighbours of rank level · (count - 1), linear."""
        ranks = np.asarray(levels) * (count - 1)
        last = np.cumsum(self._counts) - 1  # rank of the last number in each bin
        below, above = (
            np.ldexp(self._keys[np.searchsorted(last, rank)] + 0.5, self._exponent)
            for rank in (np.floor(ranks), np.ceil(ranks))
        )
        out: Floats = below + (above - below) * (ranks - np.floor(ranks))
        return out


class PixelStatistics:
    """Statistics of 8-bit pictures by channel, exact: each value is counted."""

    def __init__(self) -> None:
        self.pictures = 0
        self.counts = np.zeros((3, 256), np.int64)

    def update(self, picture: Picture) -> None:
        """Takes in one picture [H, W, 3]."""
        self.pictures += 1
        for channel in range(3):
            self.counts[channel] += np.bincount(picture[..., channel].ravel(), minlength=256)

    def merge(self, pictures: int, counts: NDArray[np.int64]) -> None:
        """Takes in what another one has counted."""
        self.pictures += pictures
        self.counts += counts

    def result(self) -> dict[str, Floats]:
        """As `RunningStatistics.result`, of values in [0, 1], each [3]; count is of pictures."""
        values = np.arange(256) / 255
        total = self.counts[0].sum()
        mean = self.counts @ values / total
        variance = (self.counts * (values - mean[:, None]) ** 2).sum(axis=1) / total
        cumulative = self.counts.cumsum(axis=1)
        seen = self.counts > 0
        out = {
            "min": values[seen.argmax(axis=1)],
            "max": values[255 - seen[:, ::-1].argmax(axis=1)],
            "mean": mean,
            "std": np.sqrt(variance),
            "count": np.array([self.pictures]),
        }
        for name, level in QUANTILES.items():
            out[name] = values[(cumulative > level * (total - 1)).argmax(axis=1)]
        return out


def norm_stats_json(tables: Mapping[str, Mapping[str, Floats]]) -> bytes:
    """openpi's norm_stats.json.

    Args:
        tables: "state" and "actions" → what `RunningStatistics.result` gives.
    """
    content = {
        what: {name: table[name].tolist() for name in OPENPI} for what, table in tables.items()
    }
    return (json.dumps({"norm_stats": content}, indent=2) + "\n").encode()
