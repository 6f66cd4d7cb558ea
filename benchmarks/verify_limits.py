"""The clean figures of `pi0 verify`: how far engines without a mistake are from the reference.

    python benchmarks/verify_limits.py --presets tiny small --seeds 3

For each precision: a synthetic checkpoint of each preset and seed, the largest relative L2 error
and the largest gain error of each kind of row, divided by the growth with depth that limits assume.
Names that are no preset are checkpoints, of which only the inputs depend on the seed. What exceeds
its limit as it stands is said on the way, on standard error. --python prints the lines of
`pi0.verify.clean`, --docs the tables of docs/verify.md, without a measurement.
The full size (--presets pi0_base) takes 14 GB of memory and half an hour per precision;
--cameras 1, --image-size 56, --tokens 16 and --depth 2 take less.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.checkpoint.synth import TRAINED_LIKE, synthesise
from pi0.config import PRESETS
from pi0.engines.base import Engine, make_engine
from pi0.engines.reference import ReferenceEngine
from pi0.engines.spec import EngineSpec
from pi0.errors import EngineError
from pi0.verify.cases import Case, default_cases
from pi0.verify.clean import CLEAN
from pi0.verify.record import EngineRun
from pi0.verify.run import VerifyResult, record_reference, unrounded_engine, verify
from pi0.verify.thresholds import (
    CHAINED,
    EXACT,
    ISOLATED,
    OPERATIONS,
    STRUCTURE,
    growth,
    limit_keys,
    limits_of,
    threshold,
)

REFERENCE = "reference:float32"
ENGINES = ("cpu:float32", "cpu:int8", "reference:bfloat16", "ttnn-host:accurate", "ttnn-host:fast")
ITSELF = ("sample.again", "velocity.kept")  # an engine beside itself
ROUNDED = ("bfloat16", "accurate", "fast")
COLUMNS = {
    "same computation": ("float32", STRUCTURE),
    **{
        f"{precision}, {part}": (precision, part)
        for precision in ("int8", "accurate", "fast")
        for part in (ISOLATED, CHAINED)
    },
}
Figures = dict[tuple[str, str, str], tuple[float, float]]  # (precision, part, key) → rel. L2, gain


def verified(
    make: Callable[[str | EngineSpec], Engine],
    reference: EngineRun,
    cases: list[Case],
    spec: EngineSpec,
) -> VerifyResult:
    unrounded = unrounded_engine(EngineSpec.parse(REFERENCE), spec)
    return verify(
        reference,
        lambda: make(spec),
        cases,
        layers=True,
        unrounded=None if unrounded is None else lambda: make(unrounded),
    )


def measure(result: VerifyResult, spec: EngineSpec, depth: int, found: Figures) -> None:
    """Adds the largest errors of one engine on one checkpoint."""
    for row in result.rows:
        key = "*" if row.part == OPERATIONS else limit_keys(row.name)[0]
        if key in EXACT or key == "response" or row.name in ITSELF:
            continue
        precision = "float32" if row.part in (STRUCTURE, OPERATIONS) else spec.precision
        place = precision, row.part, key
        rel_l2, gain = found.get(place, (0.0, 0.0))
        c = row.comparison
        if c.fault:
            raise SystemExit(f"{spec.label}: {row.name} ({row.case}): {c.fault}")
        if c.rel_l2 == 0 and precision in ROUNDED:
            continue  # exact at sizes whose factors are powers of two, not at others
        grown = growth(row.part, key, depth)
        found[place] = max(rel_l2, c.rel_l2 / grown), max(gain, abs(c.gain_error) / grown)


def say_alarms(result: VerifyResult, what: str) -> None:
    """How near the nearest row is to its limit, and all that exceed one."""
    worst = max(result.rows, key=lambda row: row.share_of_limit)
    failed = [row for row in result.rows if not row.passed]
    print(
        f"{what}: {len(failed)} of {len(result.rows)} beyond; nearest: {worst.share_of_limit:.2f} "
        f"of its limit, {worst.part} {worst.name} ({worst.case})",
        file=sys.stderr,
    )
    for row in failed:
        why = " and ".join(row.exceeded)
        print(f"    {row.part} {row.name} ({row.case}): {why}", file=sys.stderr)


@contextmanager
def made(name: str, seed: int, depth: int | None) -> Iterator[Checkpoint]:
    """A synthetic checkpoint of a preset and seed, of its depth or another, or the one of that
    name."""
    if name not in PRESETS:
        yield open_checkpoint(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        config, layout = PRESETS[name], LAYOUTS["openpi"]
        if depth is not None:
            trunks = {trunk: getattr(config, trunk) for trunk in ("vision", "vlm", "expert")}
            config = replace(config, **{k: replace(v, depth=depth) for k, v in trunks.items()})
        synthesise(Path(folder), config, layout, seed, torch.bfloat16, statistics=TRAINED_LIKE)
        yield open_checkpoint(Path(folder))


def rounded_up(value: float) -> float:
    """Two digits, never less than the value."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.1e}")


def print_python(tables: dict[str, Figures]) -> None:
    for place in dict.fromkeys(place for found in tables.values() for place in found):
        figures = [found[place] for found in tables.values() if place in found]
        rel_l2, gain = (rounded_up(max(values)) for values in zip(*figures, strict=True))
        print(f"    ({', '.join(map(repr, place))}): ({rel_l2:g}, {gain:g}),".replace("'", '"'))


def print_figures(tables: dict[str, Figures]) -> None:
    print("| precision | part | stage |" + "".join(f" {name} |" for name in tables))
    print("|---|---|---|" + "---|" * len(tables))
    for place in dict.fromkeys(place for found in tables.values() for place in found):
        cells = [
            f"{found[place][0]:.1e}, {found[place][1]:.0e}" if place in found else ""
            for found in tables.values()
        ]
        print(f"| {' | '.join([*place, *cells])} |")


def docs_tables() -> Iterator[str]:
    """Clean figure and limit of each stage: of the relative L2 error, then of the gain."""
    stages = dict.fromkeys(
        key for precision, part, key in CLEAN if (precision, part) in COLUMNS.values()
    )
    for number in (0, 1):
        yield "| stage | " + " | ".join(COLUMNS) + " |"
        yield "|---|" + "---|" * len(COLUMNS)
        for stage in stages:
            cells = [docs_cell(*place, stage, number) for place in COLUMNS.values()]
            yield f"| {stage} | " + " | ".join(cells) + " |"
        yield ""


def docs_cell(precision: str, part: str, stage: str, number: int) -> str:
    if (precision, part, stage) not in CLEAN:
        return ""
    name = stage if "." not in stage else stage.replace(".", ".block.0.").removesuffix(".block")
    limit = threshold(name, limits_of(ReferenceEngine, precision), part)
    most = (limit.max_rel_l2, limit.max_gain_error)[number]
    return f"{CLEAN[precision, part, stage][number]:.1e} < {most:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"])
    parser.add_argument("--engines", nargs="+", default=ENGINES)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--cameras", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="of the prompt, if not the checkpoint's most")
    parser.add_argument("--image-size", type=int, help="pixels, if not the checkpoint's")
    parser.add_argument("--depth", type=int, help="blocks of each trunk of a preset")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--python", action="store_true")
    kind.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    if options.docs:
        print("\n".join(docs_tables()))
        return
    tables: dict[str, Figures] = {name: {} for name in options.presets}
    for name, found in tables.items():
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            with made(name, seed, options.depth) as checkpoint:
                config = checkpoint.config.with_image_size(
                    options.image_size or checkpoint.config.vision.image_size
                )
                make = functools.partial(
                    make_engine, checkpoint=checkpoint, image_size=options.image_size
                )
                depth = max(config.vision.depth, config.vlm.depth)
                tokens = options.tokens or config.max_tokens
                cases = default_cases(config, options.cameras, tokens, seed)
                reference = record_reference(lambda make=make: make(REFERENCE), cases)
                for engine in options.engines:
                    spec = EngineSpec.parse(engine)
                    try:
                        result = verified(make, reference, cases, spec)
                    except EngineError as error:
                        print(f"{engine}: not measured: {error}")
                        continue
                    say_alarms(result, f"{name}, seed {seed}, {spec.label}")
                    measure(result, spec, depth, found)
    if options.python:
        print_python(tables)
    else:
        print_figures(tables)


if __name__ == "__main__":
    main()
