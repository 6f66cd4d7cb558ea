"""How far a stage may be from the reference, and why.

Limits are on the relative L2 error, which sees scale and offset, and on PCC, which people quote.
They depend on the coarser of the two precisions. Measured on synthetic checkpoints, full size and
small; a limit is a few times what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    """The least PCC and the largest relative L2 error, and the reason."""

    min_pcc: float
    max_rel_l2: float
    why: str


EXACT = Threshold(0.999999, 0.0, "no arithmetic: a mask is the same or it is wrong")
UNSEEN = Threshold(0.999999, 0.0, "what is masked has weight 0 and moves nothing, not even a bit")
# By precision, from fine to coarse.
THRESHOLDS: dict[str, dict[str, Threshold]] = {
    "float32": {
        "*": Threshold(0.999999, 2e-5, "only the order of sums differs: 1e-6 through a tower"),
        "oracle": Threshold(
            0.999999, 2e-4, "transformers has angles of time in float32: 2e-5 at small sizes"
        ),
        "sequence": EXACT,
        "masked_content": UNSEEN,
    },
    "bfloat16": {
        "*": Threshold(0.999, 0.03, "8 bits, rounded at every matrix through a tower"),
        "token_embedding": Threshold(0.9999, 0.006, "one rounded product"),
        "projector": Threshold(0.999, 0.03, "one matrix after the tower's rounding"),
        "suffix": Threshold(0.9999, 0.006, "computed in float32, rounded once at the end"),
        "sequence": EXACT,
        "masked_content": UNSEEN,
    },
    "accurate": {
        "*": Threshold(0.999, 0.03, "bfloat16 between all operations, and rotary tables in it"),
        "sequence": EXACT,
        "masked_content": UNSEEN,
    },
    "int8": {
        "*": Threshold(0.999, 0.05, "7 bits and a sign, a scale shared by a row of a matrix"),
        "sequence": EXACT,
        "masked_content": UNSEEN,
    },
    "fast": {
        "*": Threshold(0.99, 0.1, "7 bits and an exponent shared by 16 values in every matrix"),
        "sequence": EXACT,
        "masked_content": UNSEEN,
    },
    "fp8": {
        "*": Threshold(
            0.99, 0.15, "e4m3 has 3 bits of mantissa: 0.05 to 0.07 through three towers"
        ),
        "token_embedding": Threshold(0.9999, 0.006, "one product, rounded to bfloat16"),
        "suffix": Threshold(0.9999, 0.006, "computed in float32, rounded once to bfloat16"),
        "actions": Threshold(0.998, 0.05, "noise, which is exact, is most of them: 0.01 to 0.02"),
        "sample": Threshold(0.998, 0.05, "as actions"),
        "sequence": EXACT,
        "masked_content": UNSEEN,
    },
}


def coarser(a: str, b: str) -> str:
    """The precision that decides how far two engines may be apart."""
    return max(a, b, key=list(THRESHOLDS).index)


def threshold(stage: str, precision: str) -> Threshold:
    """The limits of a stage, or of a block by its stage."""
    table = THRESHOLDS[precision]
    return table.get(stage, table["*"])
