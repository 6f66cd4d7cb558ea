"""How far two tensors are apart, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """One tensor beside its reference.

    Attributes:
        pcc: Pearson's correlation; it does not see scale or offset, so it never stands alone.
        cosine: of the two as vectors.
        rel_l2: norm of the difference by norm of the reference.
        max_abs: largest absolute difference.
        fault: why the numbers cannot be trusted (NaN, a constant, another shape); else None.
        gain_error: the factor that fits the candidate to the reference best in least squares, less
            1. Rounding moves values in all directions and cancels here, a wrong scale does not.
    """

    pcc: float
    cosine: float
    rel_l2: float
    max_abs: float
    fault: str | None
    gain_error: float = 0.0


def compare(reference: Tensor, candidate: Tensor) -> Comparison:
    """Compares two tensors of one shape.

    A constant or non-finite tensor has no correlation: that is a fault, not 1 or NaN. Both moments
    of PCC have the same divisor, so that a tensor correlates with itself at 1 up to rounding.
    """
    if reference.shape != candidate.shape:
        return _faulty(f"shape {list(candidate.shape)} instead of {list(reference.shape)}")
    if not reference.numel():
        return _faulty("no values")
    a, b = reference.double().flatten(), candidate.double().flatten()
    for name, x in (("reference", a), ("candidate", b)):
        if not torch.isfinite(x).all():
            return _faulty(f"{name} has {int((~torch.isfinite(x)).sum())} NaN or infinite values")
        if (x == x[0]).all():
            return _faulty(f"{name} is constant ({float(x[0]):g})")
    a0, b0 = a - a.mean(), b - b.mean()
    return Comparison(
        pcc=float((a0 @ b0) / (a0.norm() * b0.norm())),
        cosine=float((a @ b) / (a.norm() * b.norm())),
        rel_l2=float((a - b).norm() / a.norm()),
        max_abs=float((a - b).abs().max()),
        fault=None,
        gain_error=float(((b - a) @ a) / (a @ a)),
    )


def displacement_error(reference: Tensor, candidate: Tensor, noise: Tensor) -> float:
    """Error of sampled actions relative to what the model moved: ‖a − a_ref‖ / ‖a_ref − noise‖.

    Actions are the noise that was put in plus what the model adds to it. The noise is the same in
    both, so an error relative to the actions looks smaller than it is. NaN where the reference
    moved nothing.
    """
    a, b, start = (tensor.double() for tensor in (reference, candidate, noise))
    moved = float((a - start).norm())
    return float((b - a).norm()) / moved if moved > 0 else float("nan")


def _faulty(why: str) -> Comparison:
    nan = float("nan")
    return Comparison(nan, nan, nan, nan, why, nan)
