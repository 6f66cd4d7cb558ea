"""How far a stage may be from the reference, and why.

Limits are on the relative L2 error, which sees scale and offset, and on PCC, which people quote.
Both engines bring limits with their precision, and for each stage the looser of the two counts.
Measured on synthetic checkpoints, full size and small; a limit is a few times what was measured.

An engine with a precision that is not listed here declares its limits (`Engine.thresholds`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pi0.engines.base import Engine, Threshold
from pi0.errors import EngineError

# Tables of limits by stage, of which the loosest counts; "*" is every stage without a row of its own.
# A key may name the part as well (`isolated:vlm_transformer`).
Limits = tuple[Mapping[str, Threshold], ...]

# The parts of a verification, in the order in which they are judged.
STRUCTURE, ISOLATED, CHAINED, ORACLE = "structure", "isolated", "chained", "oracle"
BLOCK = re.compile(r"(\w+)\.block\.(\d+)(?:\.(\w+))?")  # stage, block, and keys or values of it

# Whatever the precision.
EXACT = {
    "sequence": Threshold(0.999999, 0.0, "no arithmetic: a mask is the same or it is wrong"),
    "masked_content": Threshold(
        0.999999, 0.0, "what is masked has weight 0 and moves nothing, not even a bit"
    ),
}
PEER = {
    "*": Threshold(
        0.999999, 2e-4, "transformers has angles of time in float32: 2e-5 at small sizes"
    )
}
# By precision; "*" is every stage without a row of its own.
THRESHOLDS: Mapping[str, Mapping[str, Threshold]] = {
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
    """The limits of an engine in a precision.

    Raises:
        EngineError: neither this module nor the engine has limits for the precision.
    """
    table = engine.thresholds.get(precision, THRESHOLDS.get(precision))
    if table is None or "*" not in table:
        raise EngineError(
            f"precision {precision}: expected limits for `pi0 verify`, found none. Declare them on "
            f"{engine.__qualname__}: thresholds = {{{precision!r}: {{'*': Threshold(min_pcc, "
            "max_rel_l2, why)}}."
        )
    return (table, PEER) if engine.capabilities.peer else (table,)


def looser(*limits: Limits) -> Limits:
    """Limits of which the loosest counts."""
    return tuple(table for tables in limits for table in tables)


def threshold(name: str, limits: Limits, part: str = CHAINED) -> Threshold:
    """The limit of a row of `pi0 verify`, by the row's name and part."""
    keys = limit_keys(name)
    if keys[-1] in EXACT:
        return EXACT[keys[-1]]
    found = (_find(table, keys, part) for table in limits)
    return max(found, key=lambda limit: (limit.max_rel_l2, -limit.min_pcc))


def limit_keys(name: str) -> list[str]:
    """Under what a row's limit may stand, the narrowest first: `vlm_transformer.keys`, then
    `vlm_transformer`; `velocity` for each step's."""
    stage = name.partition(".")[0]
    block = BLOCK.fullmatch(name)
    return [f"{stage}.{block[3] or 'block'}", stage] if block else [stage]


def _find(table: Mapping[str, Threshold], keys: list[str], part: str) -> Threshold:
    for key in [*(f"{part}:{key}" for key in keys), f"{part}:*", *keys]:
        if key in table:
            return table[key]
    return table["*"]
