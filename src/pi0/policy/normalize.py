"""Robot units to the model's units and back, by the statistics that a checkpoint was trained with.

Formulas: openpi `transforms.py` (Normalize, Unnormalize), LeRobot `normalize_processor.py`. They
differ in their small constants; each is kept as it is, one-sided ones too, because weights were
trained with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pi0.errors import ObservationError, Pi0Error

Floats = NDArray[np.float64]
Statistics = Mapping[str, Floats]  # "mean", "std", "q01", "q99", "min", "max"

OPENPI_EPS, LEROBOT_EPS = 1e-6, 1e-8
OPENPI_MODES = {False: "MEAN_STD", True: "QUANTILES"}  # by adaptive_norm, as LeRobot names them
NEAR = 2 * OPENPI_EPS  # of a spread of 0 or 1, to which an eps may have been added
NEEDED = {
    "mean_std": ("mean", "std"),
    "quantiles": ("q01", "q99"),
    "min_max": ("min", "max"),
}
GREATEST = 1e30  # of a statistic: no robot has such units, and normalised values leave float32
# Normalised values beyond this were not in anybody's training data.
OUTLIER_SIGMA = 100.0


@dataclass(frozen=True)
class Normalizer:
    """x → (x - offset) / scale - shift, and back as (y + shift) · inverse_scale + offset.

    A range's end is met exactly, for a gripper that is closed must not be just outside: in π0.5 the
    state is cut into bins.

    Attributes:
        what: "state" or "actions", for messages.
        offset, scale, inverse_scale: [D] float64; the last two differ where LeRobot's do.
        shift: 1 if a range becomes [-1, 1], else 0.
    """

    what: str
    offset: Floats
    scale: Floats
    inverse_scale: Floats
    shift: float = 0.0

    @property
    def width(self) -> int:
        return len(self.offset)

    @property
    def unchanged(self) -> NDArray[np.bool_]:
        """[D]: which values it leaves as they are."""
        middle = self.offset + self.shift * self.scale
        return (np.abs(self.scale - 1) <= NEAR) & (np.abs(middle) <= NEAR)

    def flat(self, width: int) -> list[int]:
        """The first `width` dimensions that have no spread: a deviation there becomes huge."""
        found: list[int] = np.flatnonzero(np.abs(self.scale[:width]) < NEAR).tolist()
        return found

    def padded(self, width: int) -> bool:
        """Whether the dimensions beyond the first `width` are of no data: each has no spread, or
        leaves values as they are."""
        flat = np.abs(self.scale) < NEAR
        return bool((flat | self.unchanged)[width:].all())

    def normalize(self, x: Floats) -> Floats:
        """x [..., D] in robot units → model units; D may be less than the statistics are wide.

        Raises:
            ObservationError: x is wider than the statistics.
        """
        n = x.shape[-1]
        if n > self.width:
            raise ObservationError(
                f"{self.what}: expected at most {self.width} values, for which the checkpoint has "
                f"statistics, found {n}."
            )
        out: Floats = (x - self.offset[:n]) / self.scale[:n] - self.shift
        return out

    def unnormalize(self, y: Floats) -> Floats:
        """y [..., D] in the model's units, cut to the width of the statistics."""
        n = min(y.shape[-1], self.width)
        out: Floats = (y[..., :n] + self.shift) * self.inverse_scale[:n] + self.offset[:n]
        return out


def make_normalizer(what: str, mode: str, convention: str, stats: Statistics) -> Normalizer:
    """A normaliser.

    Args:
        mode: "mean_std", "quantiles" or "min_max".
        convention: "openpi" or "lerobot".
        stats: must hold what the mode needs.

    Raises:
        Pi0Error: a statistic is missing, not finite or of another length than its partner.
    """
    missing = [name for name in NEEDED[mode] if name not in stats]
    if missing:
        raise Pi0Error(
            f"statistics of {what}: expected {' and '.join(NEEDED[mode])} for mode {mode}, found "
            f"no {' and no '.join(missing)}."
        )
    low, high = (np.asarray(stats[name], np.float64).reshape(-1) for name in NEEDED[mode])
    if low.shape != high.shape:
        raise Pi0Error(
            f"statistics of {what}: expected vectors of one length, found {NEEDED[mode][0]} "
            f"{list(low.shape)} and {NEEDED[mode][1]} {list(high.shape)}."
        )
    for name, values in zip(NEEDED[mode], (low, high), strict=True):
        require_finite(what, name, values)
    spread = high if mode == "mean_std" else high - low
    require_spread(what, NEEDED[mode], low, spread)
    if mode == "mean_std":
        eps = OPENPI_EPS if convention == "openpi" else LEROBOT_EPS
        return Normalizer(what, low, high + eps, high + eps if convention == "openpi" else high)
    # [low, high] → [-1, 1]: (x - low) / range · 2 - 1.
    if convention == "openpi":
        spread = spread + OPENPI_EPS
    else:
        spread = np.where(spread == 0, LEROBOT_EPS, spread)
    return Normalizer(what, low, spread / 2, spread / 2, shift=1.0)


def require_finite(what: str, name: str, values: Floats) -> None:
    """Raises Pi0Error if a statistic [D] is not finite."""
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise Pi0Error(
            f"statistics of {what}: expected finite values of {name}, found {values[bad[0]]} "
            f"in dimension {bad[0]}. Compute them again, or copy the file again."
        )


def require_spread(what: str, names: tuple[str, ...], low: Floats, spread: Floats) -> None:
    """Raises Pi0Error if a standard deviation or a range is negative, or that or a mean absurdly
    large."""
    bad = np.flatnonzero((spread < 0) | (spread > GREATEST))
    if bad.size:
        raise Pi0Error(
            f"statistics of {what}: expected {' and '.join(names)} with a spread of 0 or more, "
            f"found {spread[bad[0]]:.6g} in dimension {bad[0]}. The file is damaged, or another's."
        )
    bad = np.flatnonzero(np.abs(low) > GREATEST)
    if bad.size:
        raise Pi0Error(
            f"statistics of {what}: expected {names[0]} below {GREATEST:g}, found "
            f"{low[bad[0]]:.6g} in dimension {bad[0]}. The file is damaged, or another's."
        )


def identity(what: str, width: int) -> Normalizer:
    """A normaliser that changes nothing."""
    return Normalizer(what, np.zeros(width), np.ones(width), np.ones(width))
