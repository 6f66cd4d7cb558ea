"""Robot units to the model's units and back, by the statistics that a checkpoint was trained with.

Formulas: openpi `transforms.py` (Normalize, Unnormalize), LeRobot `normalize_processor.py`. They
differ in their small constants; each is kept as it is, one-sided ones too, because weights were
trained with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pi0.checkpoint.files import read_json
from pi0.errors import ObservationError, Pi0Error

Floats = NDArray[np.float64]
Statistics = Mapping[str, Floats]  # "mean", "std", "q01", "q99", "min", "max"

OPENPI_EPS, LEROBOT_EPS = 1e-6, 1e-8
NEEDED = {
    "mean_std": ("mean", "std"),
    "quantiles": ("q01", "q99"),
    "min_max": ("min", "max"),
}
OUTLIER_SIGMA = 100.0  # normalised values beyond this were not in anybody's training data


@dataclass(frozen=True)
class Normalizer:
    """x → (x - offset) / scale, and back as y · inverse_scale + offset.

    Attributes:
        what: "state" or "actions", for messages.
        offset, scale, inverse_scale: [D] float64; `inverse_scale` differs from `scale` where
            LeRobot's way back does.
    """

    what: str
    offset: Floats
    scale: Floats
    inverse_scale: Floats

    @property
    def width(self) -> int:
        return len(self.offset)

    def normalize(self, x: Floats) -> Floats:
        """x [D] in robot units; D may be less than the statistics are wide.

        Raises:
            ObservationError: x is wider than the statistics.
        """
        n = len(x)
        if n > self.width:
            raise ObservationError(
                f"{self.what}: expected at most {self.width} values, for which the checkpoint has "
                f"statistics, found {n}."
            )
        out: Floats = (x - self.offset[:n]) / self.scale[:n]
        for i in np.flatnonzero(np.abs(out) > OUTLIER_SIGMA):
            warnings.warn(
                f"{self.what}[{i}] = {x[i]:.6g} is {abs(out[i]):.0f} standard deviations or half "
                "ranges from what the checkpoint was trained on.",
                stacklevel=3,
            )
        return out

    def unnormalize(self, y: Floats) -> Floats:
        """y [..., D] in the model's units, cut to the width of the statistics."""
        n = min(y.shape[-1], self.width)
        out: Floats = y[..., :n] * self.inverse_scale[:n] + self.offset[:n]
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
    if low.shape != high.shape or not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise Pi0Error(
            f"statistics of {what}: expected finite vectors of one length, found "
            f"{NEEDED[mode][0]} {list(low.shape)} and {NEEDED[mode][1]} {list(high.shape)}."
        )
    spread = high if mode == "mean_std" else high - low
    flat = np.flatnonzero(np.abs(spread) < OPENPI_EPS)
    if flat.size:
        warnings.warn(
            f"statistics of {what}: no spread in {', '.join(map(str, flat))}: any deviation there "
            "is blown up a millionfold. Were these joints still in the training data?",
            stacklevel=2,
        )
    if mode == "mean_std":
        eps = OPENPI_EPS if convention == "openpi" else LEROBOT_EPS
        return Normalizer(what, low, high + eps, high + eps if convention == "openpi" else high)
    # [low, high] → [-1, 1]: (x - low) / range · 2 - 1, about the middle of the range.
    if convention == "openpi":
        spread = spread + OPENPI_EPS
    else:
        spread = np.where(spread == 0, LEROBOT_EPS, spread)
    return Normalizer(what, low + spread / 2, spread / 2, spread / 2)


def identity(what: str, width: int) -> Normalizer:
    """A normaliser that changes nothing."""
    return Normalizer(what, np.zeros(width), np.ones(width), np.ones(width))


def find_norm_stats(folder: Path) -> Path:
    """The only norm_stats.json under a checkpoint's assets/.

    Raises:
        Pi0Error: there is none, or more than one.
    """
    found = sorted((folder / "assets").rglob("norm_stats.json"))
    if len(found) == 1:
        return found[0]
    expected = f"statistics: expected one assets/<robot>/norm_stats.json in {folder}, found "
    if not found:
        raise Pi0Error(
            expected + "none. Name the file with --norm-stats, or pass --norm-stats none to hand "
            "over states and actions in the model's own normalised units."
        )
    names = ", ".join(str(path.parent.relative_to(folder / "assets")) for path in found)
    raise Pi0Error(f"{expected}{len(found)} ({names}). Name one with --norm-stats.")


def read_norm_stats(path: Path) -> dict[str, Statistics]:
    """State and action statistics of openpi's norm_stats.json.

    Raises:
        Pi0Error: not a file of that form.
    """
    if not path.is_file():
        raise Pi0Error(f"statistics {path}: expected a norm_stats.json, found no file.")
    stats = read_json(path).get("norm_stats")
    if not isinstance(stats, dict) or not all(
        isinstance(stats.get(what), dict) for what in ("state", "actions")
    ):
        raise Pi0Error(
            f'statistics {path}: expected {{"norm_stats": {{"state": {{"mean": …}}, "actions": '
            "{…}}}, found something else."
        )
    try:
        return {
            what: {
                name: np.asarray(values, np.float64)
                for name, values in stats[what].items()
                if values is not None
            }
            for what in ("state", "actions")
        }
    except (TypeError, ValueError) as error:
        raise Pi0Error(f"statistics {path}: expected lists of numbers, found {error}.") from error
