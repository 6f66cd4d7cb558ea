"""Limits that engines declare for `pi0 verify`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    """How far `pi0 verify` lets a stage be from the reference.

    Attributes:
        min_pcc: least Pearson correlation.
        max_rel_l2: largest norm of the difference as a fraction of the reference's norm.
        why: the reason for these numbers, as a phrase.
        max_gain_error: how far the least-squares factor between the two may be from 1.
    """

    min_pcc: float
    max_rel_l2: float
    why: str
    max_gain_error: float = float("inf")
