"""Limits that engines declare for `pi0 verify`."""

from __future__ import annotations

from dataclasses import dataclass

from pi0.errors import EngineError


@dataclass(frozen=True)
class Threshold:
    """How far `pi0 verify` lets a stage be from the reference.

    Attributes:
        min_pcc: least Pearson correlation.
        max_rel_l2: largest norm of the difference as a fraction of the reference's norm.
        why: the reason for these numbers, as a phrase.
        max_gain_error: how far the least-squares factor between the two may be from 1.

    Raises:
        EngineError: a number is NaN, which nothing would be beyond.
    """

    min_pcc: float
    max_rel_l2: float
    why: str
    max_gain_error: float = float("inf")

    def __post_init__(self) -> None:
        if not self.min_pcc <= 1 or not self.max_rel_l2 >= 0 or not self.max_gain_error >= 0:
            raise EngineError(
                "threshold: expected min_pcc up to 1, max_rel_l2 and max_gain_error from 0, found "
                f"{self.min_pcc}, {self.max_rel_l2} and {self.max_gain_error}."
            )
