"""Statistics and normalisation as LeRobot 0.6.1 does it, in all its modes.

Formulas: `processor/normalize_processor.py`. MEAN_STD is (x - mean) / (std + eps) and back
y · std + mean, without eps. The others map [low, high] to [-1, 1]; eps replaces a range of 0 only.
Statistics are rounded to float32, as LeRobot reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from pi0.checkpoint.files import read_headers
from pi0.errors import Pi0Error
from pi0.policy.normalize import Normalizer, require_finite, require_spread

Floats = NDArray[np.float64]

NEEDED = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
NO_SPREAD = 1e-6


def read_statistics(path: Path) -> dict[str, dict[str, Floats]]:
    """The statistics of a LeRobot state file by feature key and name, in the shapes of the file.

    Raises:
        CheckpointError: not a safetensors file.
    """
    read_headers([path])  # its errors are ours
    statistics: dict[str, dict[str, Floats]] = {}
    for name, values in load_file(path).items():
        key, _, statistic = name.rpartition(".")
        statistics.setdefault(key, {})[statistic] = values.float().double().numpy()
    return statistics


def lerobot_normalizer(
    what: str, mode: str, eps: float, statistics: Mapping[str, Floats], width: int | None = None
) -> Normalizer:
    """A normaliser that computes what LeRobot does.

    Args:
        what: for messages.
        mode: MEAN_STD, MIN_MAX, QUANTILES or QUANTILE10.
        statistics: by name, each [D], or [D, 1, 1] for images.
        width: for which statistics of one value hold, unless another is longer; None: for one.

    Raises:
        Pi0Error: a statistic is missing, not a finite vector of the other's length, or without
            spread where eps is 0.
    """
    names = NEEDED[mode]
    missing = [name for name in names if name not in statistics]
    if missing:
        raise Pi0Error(
            f"statistics of {what}: expected {' and '.join(names)} for mode {mode}, found no "
            f"{' and no '.join(missing)}."
        )
    vectors = [_vector(what, name, statistics[name]) for name in names]
    if width:
        longest = max(map(len, vectors))
        width = width if longest == 1 else longest
        vectors = [np.broadcast_to(v, width) if len(v) == 1 else v for v in vectors]
    low, high = vectors
    if low.shape != high.shape:
        raise Pi0Error(
            f"statistics of {what}: expected vectors of one length, found {names[0]} "
            f"[{len(low)}] and {names[1]} [{len(high)}]."
        )
    require_spread(what, names, low, high if mode == "MEAN_STD" else high - low)
    if mode == "MEAN_STD":
        normalizer = Normalizer(what, low, high + eps, high)
    else:
        span = np.where(high == low, eps, high - low)
        normalizer = Normalizer(what, low, span / 2, span / 2, shift=1.0)
    if not normalizer.scale.all():
        at = int(np.flatnonzero(normalizer.scale == 0)[0])
        raise Pi0Error(
            f"statistics of {what}: expected a spread or an eps above 0, found neither at index "
            f"{at}."
        )
    return normalizer


def without_spread(normalizer: Normalizer) -> list[int]:
    """The dimensions in which any deviation is blown up a millionfold."""
    return [int(i) for i in np.flatnonzero(np.abs(normalizer.scale) < NO_SPREAD)]


def _vector(what: str, name: str, values: Floats) -> Floats:
    values = np.asarray(values, np.float64)
    # [D]; images' [D, 1, 1]; [1, D], which LeRobot broadcasts to the same.
    length = max(values.shape, default=0)
    if values.ndim == 0 or values.size != length or length == 0:
        raise Pi0Error(
            f"statistics of {what}: expected {name} to be a vector, found shape "
            f"{list(values.shape)}."
        )
    values = values.reshape(-1)
    require_finite(what, name, values)
    return values
