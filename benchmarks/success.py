"""What a policy achieves on the tabletop: `python benchmarks/success.py [CKPT]`.

Runs `pi0 eval` once for each row of each table, on the same seeds, and prints the tables of
docs/results.md. A row that was run before is read from --out, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERBS = ("lift", "put", "push")


@dataclass(frozen=True)
class Row:
    """One evaluation: what the table calls it, and the options of `pi0 eval` that make it."""

    label: str
    options: tuple[str, ...] = ()
    tasks: tuple[str, ...] = VERBS


ENGINES = ("reference", "reference:bfloat16", "cpu", "cpu:int8")
TABLES = {
    "tasks": [
        Row("as asked", tasks=(*VERBS, "unseen-pairs", "unseen-phrasings")),
        Row("another sentence for the same scene", ("--prompt-swap",)),
        Row("black cameras", ("--blank-cameras",)),
    ],
    "engines": [Row(engine, ("--engine", engine)) for engine in ENGINES],
    "steps": [Row(str(steps), ("--steps", str(steps))) for steps in (1, 2, 4, 10)],
    "execute": [Row(str(count), ("--execute", str(count))) for count in (1, 2, 4, 8)],
    "perturb": [
        Row(str(sigma), ("--perturb", str(sigma))) for sigma in (0, 0.03, 0.1, 0.2, 0.4, 0.8)
    ],
}


def evaluate(checkpoint: str, row: Row, options: Sequence[str], out: Path) -> dict[str, Any]:
    """The results of a row, from the file `out` if it is there."""
    if not out.is_file():
        pi0 = str(Path(sys.executable).with_name("pi0"))
        command = [pi0, "eval", checkpoint, "--tasks", ",".join(row.tasks)]
        # The row's own options come last, and override.
        subprocess.run([*command, *options, *row.options, "--out", str(out)], check=True)
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def print_table(rows: Sequence[tuple[Row, dict[str, Any]]]) -> None:
    """One line for each row and one column for each task, as Markdown."""
    tasks = rows[0][0].tasks
    print("| | " + " | ".join([*tasks, "wrong", "ms"]) + " |")
    print("|---" * (len(tasks) + 3) + "|")
    for row, results in rows:
        found = [results["tasks"].get(task) for task in tasks]
        cells = [f"{r['success']} of {r['episodes']}" if r else "" for r in found]
        wrong, latency = results["wrong"], results["latency"]["median_ms"]
        print(f"| {row.label} | {' | '.join(cells)} | {wrong} | {latency:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="tabletop")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--episodes", type=int, default=200, help="of each task and row")
    parser.add_argument("--seed-start", type=int, default=9_000_000)
    parser.add_argument("--execute", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/success"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = ("episodes", "seed_start", "execute", "workers")
    options = [
        word
        for name in names
        for word in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))
    ]
    for name in arguments.tables:
        rows = [
            (
                row,
                evaluate(
                    arguments.checkpoint, row, options, arguments.out / f"{name}-{number}.json"
                ),
            )
            for number, row in enumerate(TABLES[name])
        ]
        print(f"\n{name}\n")
        print_table(rows)


if __name__ == "__main__":
    main()
