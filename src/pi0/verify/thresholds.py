"""How far a stage may be from the reference, and why.

Limits are on the relative L2 error, which sees scale and offset, and on PCC, which people quote.
Both engines bring limits with their precision, and for each stage the looser of the two counts.
Measured on synthetic checkpoints, full size and small; a limit is a few times what was measured.

An engine with a precision that is not listed here declares its limits (`Engine.thresholds`).
"""

from __future__ import annotations

from collections.abc import Mapping

from pi0.engines.base import Engine, Threshold
from pi0.errors import EngineError

Limits = Mapping[str, Threshold]

# Whatever the precision.
EXACT = {
    "sequence": Threshold(0.999999, 0.0, "no arithmetic: a mask is the same or it is wrong"),
    "masked_content": Threshold(
        0.999999, 0.0, "what is masked has weight 0 and moves nothing, not even a bit"
    ),
}
PEER = Threshold(0.999999, 2e-4, "transformers has angles of time in float32: 2e-5 at small sizes")
# By precision; "*" is every stage without a row of its own.
THRESHOLDS: Mapping[str, Limits] = {
    "float32": {
        "*": Threshold(0.999999, 2e-5, "only the order of sums differs: 1e-6 through a tower"),
    },
    "bfloat16": {
        "*": Threshold(0.999, 0.03, "8 bits, rounded at every matrix through a tower"),
        "token_embedding": Threshold(0.9999, 0.006, "one rounded product"),
        "projector": Threshold(0.999, 0.03, "one matrix after the tower's rounding"),
        "suffix": Threshold(0.9999, 0.006, "computed in float32, rounded once at the end"),
    },
    "accurate": {
        "*": Threshold(0.999, 0.03, "bfloat16 between all operations, and rotary tables in it"),
    },
    "int8": {
        "*": Threshold(0.999, 0.05, "7 bits and a sign; one scale per row of a matrix"),
    },
    "fast": {
        "*": Threshold(0.99, 0.1, "7 bits and an exponent shared by 16 values in every matrix"),
    },
    "fp8": {
        "*": Threshold(
            0.99, 0.15, "e4m3 has 3 bits of mantissa: 0.05 to 0.07 through three towers"
        ),
        "token_embedding": Threshold(0.9999, 0.006, "one product, rounded to bfloat16"),
        "suffix": Threshold(0.9999, 0.006, "computed in float32, rounded once to bfloat16"),
        "actions": Threshold(0.998, 0.05, "noise, which is exact, is most of them: 0.01 to 0.02"),
        "sample": Threshold(0.998, 0.05, "as actions"),
    },
}


def limits_of(engine: type[Engine], precision: str) -> Limits:
    """The limits of an engine's stages in a precision.

    Raises:
        EngineError: neither this module nor the engine has limits for the precision.
    """
    limits = engine.thresholds.get(precision, THRESHOLDS.get(precision))
    if limits is None or "*" not in limits:
        raise EngineError(
            f"precision {precision}: expected limits for `pi0 verify`, found none. Declare them on "
            f"{engine.__qualname__}: thresholds = {{{precision!r}: {{'*': Threshold(min_pcc, "
            "max_rel_l2, why)}}."
        )
    return looser(limits, {"*": PEER}) if engine.capabilities.peer else limits


def looser(a: Limits, b: Limits) -> Limits:
    """For each stage the looser of two limits."""
    return {
        stage: max(
            a.get(stage, a["*"]),
            b.get(stage, b["*"]),
            key=lambda limit: (limit.max_rel_l2, -limit.min_pcc),
        )
        for stage in [*a, *(stage for stage in b if stage not in a)]
    }


def threshold(stage: str, limits: Limits) -> Threshold:
    """The limit of a stage, which is also that of its blocks."""
    return EXACT.get(stage) or limits.get(stage, limits["*"])
