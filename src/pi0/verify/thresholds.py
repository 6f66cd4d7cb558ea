"""How far a stage may be from the reference, and why.

Limits are on the relative L2 error, which sees scale and offset, on the gain, which sees a small
wrong scale under rounding, and on PCC, which people quote. Of stages that were measured
(`pi0.verify.clean`) the first two are `MULTIPLE` times the largest clean figure; where errors add
up, the figure grows with the square root of the depth.

Both engines bring limits with their precision, and for each stage the looser of the two counts.
An engine with a precision that is not listed here declares its limits (`Engine.thresholds`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pi0.engines.base import Engine
from pi0.engines.threshold import Threshold
from pi0.errors import EngineError
from pi0.verify.clean import CLEAN

# Tables of limits by stage, of which the loosest counts; "*" is every stage without its own row.
# A key may name the part as well (`isolated:vlm_transformer`).
Limits = tuple[Mapping[str, Threshold], ...]

# The parts of a verification, in the order in which they are judged.
STRUCTURE, OPERATIONS = "structure", "operations"
ISOLATED, CHAINED, ORACLE = "isolated", "chained", "oracle"
BLOCK = re.compile(r"(\w+)\.block\.(\d+)(?:\.(\w+))?")  # stage, block, and keys or values of it

MULTIPLE = 3
# Isolated, these stages are a tower's last norm alone, whose error depends on formats, hardly on
# weights: from 2.7e-3 to 3.1e-3 in bfloat16.
LAST_NORMS = ("vision_tower", "vlm_transformer", "expert_transformer")
MULTIPLE_OF_NORMS = 1.5
FLOOR = 1e-6  # a few roundings of float32: exact on one machine is not exact on each
FLOOR_WIDTH = 512  # up to which the floor suffices: keys at width 2048 are off by 8.6e-7
GAIN_SHARE = 0.1  # of an error in all directions that may lie along the values themselves
SAME_LIMITS = {"exact": "float32"}  # the TTNN network on the host with nothing rounded
CLEAN_DEPTH = 2  # blocks of each tower that clean figures are for: those of size tiny
ADDING_UP = ("velocity", "actions", "sample")  # through all blocks, whatever they are fed with

# Whatever the precision.
EXACT: Mapping[str, Threshold] = {
    "sequence": Threshold(0.999999, 0.0, "no arithmetic: a mask is the same or it is wrong"),
    "masked_content": Threshold(
        0.999999, 0.0, "what is masked has weight 0 and moves nothing, not even a bit"
    ),
}
ROUNDED_ONCE = Threshold(0.9999, 0.006, "one product, rounded to bfloat16")
AT_THE_END = Threshold(
    0.999999, 1e-5, "at t = 0 angles of time are 0 everywhere: only the order of sums differs"
)
PEER = {
    "end": AT_THE_END,
    "*": Threshold(
        0.999999, 2e-4, "transformers has angles of time in float32: 2e-5 at small sizes"
    ),
}
# By precision, of stages that were not measured; "*" is every stage without a row of its own.
GENERAL: Mapping[str, Mapping[str, Threshold]] = {
    "float32": {
        "*": Threshold(0.999999, 2e-5, "only the order of sums differs: 1e-6 through a tower"),
        "end": AT_THE_END,
    },
    "bfloat16": {
        "*": Threshold(0.999, 0.03, "8 bits, rounded at every matrix through a tower"),
        "token_embedding": ROUNDED_ONCE,
        "suffix": Threshold(0.9999, 0.006, "computed in float32, rounded once at the end"),
    },
    "accurate": {
        "token_embedding": ROUNDED_ONCE,
        "*": Threshold(0.999, 0.03, "bfloat16 inside all blocks, and rotary tables in it"),
    },
    "int8": {
        "*": Threshold(0.999, 0.05, "7 bits and a sign; one scale per row of a matrix"),
    },
    "fast": {
        "token_embedding": ROUNDED_ONCE,
        "*": Threshold(0.99, 0.1, "7 bits and an exponent shared by 16 values in every matrix"),
    },
    "fp8": {
        "*": Threshold(0.999, 0.03, "as bfloat16, which all is but the VLM's MLP"),
        "vlm_transformer": Threshold(0.998, 0.06, "e4m3 in the MLP has 3 bits of mantissa"),
        "token_embedding": ROUNDED_ONCE,
        "suffix": Threshold(0.9999, 0.006, "computed in float32, rounded once to bfloat16"),
    },
}


def growth(part: str, key: str, depth: int) -> float:
    """How many times larger errors are through `depth` blocks than through `CLEAN_DEPTH`."""
    adds_up = part == CHAINED or key in ADDING_UP
    return max(1.0, depth / CLEAN_DEPTH) ** 0.5 if adds_up else 1.0


def _measured(precision: str, depth: int, width: int) -> dict[str, Threshold]:
    """Limits from clean figures, and the general ones for the rest."""
    general = GENERAL[precision]
    # The rounding of a sum grows with the square root of its terms.
    floor = FLOOR * max(1.0, width / FLOOR_WIDTH) ** 0.5
    limits = dict(general)
    for (of, part, key), figures in CLEAN.items():
        if of == precision:
            rel_l2, gain = (growth(part, key, depth) * figure for figure in figures)
            gain = max(gain, rel_l2 * GAIN_SHARE)
            one_norm = part == ISOLATED and key in LAST_NORMS
            multiple = MULTIPLE_OF_NORMS if one_norm else MULTIPLE
            why = (
                f"{multiple} × the largest clean error, {rel_l2:.1e} (gain {gain:.0e}): "
                f"{general['*'].why}"
            )
            most = max(multiple * rel_l2, floor)
            limits[f"{part}:{key}"] = Threshold(
                min(general["*"].min_pcc, 1 - most**2),  # PCC falls by half the square of the error
                most,
                why,
                max(MULTIPLE * gain, FLOOR),
            )
    return limits


def limits_of(
    engine: type[Engine], precision: str, depth: int = CLEAN_DEPTH, width: int = FLOOR_WIDTH
) -> Limits:
    """The limits of an engine in a precision, for towers of `depth` blocks and `width`.

    Raises:
        EngineError: neither this module nor the engine has limits for the precision.
    """
    precision = SAME_LIMITS.get(precision, precision)
    measured = _measured(precision, depth, width) if precision in GENERAL else None
    table = engine.thresholds.get(precision, measured)
    declared = table if isinstance(table, Mapping) else {}
    if "*" not in declared or not all(isinstance(t, Threshold) for t in declared.values()):
        raise EngineError(
            f"precision {precision}: expected limits for `pi0 verify`, found "
            f"{'none' if table is None else f'{table!r:.80}'}. Declare them on "
            f"{engine.__qualname__}: thresholds = {{{precision!r}: {{'*': Threshold(min_pcc, "
            "max_rel_l2, why)}}."
        )
    return (declared, PEER) if engine.capabilities.peer else (declared,)


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
