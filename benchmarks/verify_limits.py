"""The clean figures of `pi0 verify`: how far engines without a mistake are from the reference.

    python benchmarks/verify_limits.py --presets tiny small --seeds 3

For each precision: a synthetic checkpoint of each preset and seed, the largest relative L2 error
and the largest gain error of each kind of row. --python prints the table of `pi0.verify.clean`.
The full size (--presets pi0_base) takes 14 GB of memory and half an hour per precision.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.checkpoint.synth import TRAINED_LIKE, synthesise
from pi0.config import PRESETS
from pi0.engines.base import make_engine
from pi0.engines.registry import find_engine
from pi0.engines.spec import EngineSpec
from pi0.errors import EngineError
from pi0.verify.cases import default_cases
from pi0.verify.run import verify
from pi0.verify.thresholds import EXACT, OPERATIONS, STRUCTURE, limit_keys

ENGINES = ("cpu:float32", "cpu:int8", "reference:bfloat16", "ttnn-host:accurate", "ttnn-host:fast")
ROUNDED = ("bfloat16", "accurate", "fast")
Figures = dict[tuple[str, str, str], tuple[float, float]]  # (precision, part, key) → rel. L2, gain


def measure(checkpoint: Checkpoint, engine: str, seed: int, found: Figures) -> None:
    """Adds the largest errors of one engine on one checkpoint."""
    spec = EngineSpec.parse(engine)
    unrounded = find_engine(spec.name).unrounded[spec.precision]
    result = verify(
        lambda: make_engine("reference:float32", checkpoint),
        lambda: make_engine(spec, checkpoint),
        default_cases(checkpoint.config, cameras=3, tokens=checkpoint.config.max_tokens, seed=seed),
        layers=True,
        unrounded=None if unrounded == spec.label else lambda: make_engine(unrounded, checkpoint),
    )
    for row in result.rows:
        key = "*" if row.part == OPERATIONS else limit_keys(row.name)[0]
        if key in EXACT or key == "response" or row.name == "sample.again":
            continue
        precision = "float32" if row.part in (STRUCTURE, OPERATIONS) else spec.precision
        place = precision, row.part, key
        rel_l2, gain = found.get(place, (0.0, 0.0))
        c = row.comparison
        if c.fault:
            raise SystemExit(f"{engine}: {row.name} ({row.case}): {c.fault}")
        if c.rel_l2 == 0 and precision in ROUNDED:
            continue  # exact at sizes whose factors are powers of two, not at others
        found[place] = max(rel_l2, c.rel_l2), max(gain, abs(c.gain_error))


def rounded_up(value: float) -> float:
    """Two digits, never less than the value."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"])
    parser.add_argument("--engines", nargs="+", default=ENGINES)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--python", action="store_true")
    options = parser.parse_args()
    tables: dict[str, Figures] = {}
    for preset in options.presets:
        found: Figures = {}
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                layout, dtype = LAYOUTS["openpi"], torch.bfloat16
                config = PRESETS[preset]
                synthesise(Path(folder), config, layout, seed, dtype, statistics=TRAINED_LIKE)
                checkpoint = open_checkpoint(Path(folder))
                for engine in options.engines:
                    try:
                        measure(checkpoint, engine, seed, found)
                    except EngineError as error:
                        print(f"{engine}: not measured: {error}")
        tables[preset] = found
    places = list(dict.fromkeys(place for found in tables.values() for place in found))
    if options.python:
        for place in places:
            figures = [found[place] for found in tables.values() if place in found]
            rel_l2, gain = (rounded_up(max(values)) for values in zip(*figures, strict=True))
            print(f"    ({', '.join(map(repr, place))}): ({rel_l2:g}, {gain:g}),".replace("'", '"'))
        return
    print("| precision | part | stage |" + "".join(f" {preset} |" for preset in tables))
    print("|---|---|---|" + "---|" * len(tables))
    for place in places:
        cells = [
            f"{found[place][0]:.1e}, {found[place][1]:.0e}" if place in found else ""
            for found in tables.values()
        ]
        print(f"| {' | '.join([*place, *cells])} |")


if __name__ == "__main__":
    main()
