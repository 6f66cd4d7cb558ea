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
UNSEEN = ("unseen-pairs", "unseen-phrasings")


@dataclass(frozen=True)
class Row:
    """One evaluation: what the table calls it, and the options of `pi0 eval` that make it."""

    label: str
    options: tuple[str, ...] = ()
    tasks: tuple[str, ...] = VERBS

    @property
    def file(self) -> str:
        """Where its results are kept; the same for the same options in all tables."""
        words = [option.lstrip("-").replace(":", "-") for option in self.options]
        return "_".join([*self.tasks, *words]) + ".json"


def rows(option: str, values: Sequence[object], default: object) -> list[Row]:
    """One row for each value of an option; the default's has none, and is shared with others."""
    return [
        Row(str(value), () if value == default else (f"--{option}", str(value))) for value in values
    ]


TABLES = {
    "tasks": [
        Row("as asked"),
        Row("what demonstrations never show", tasks=UNSEEN),
        Row("another sentence for the same scene", ("--prompt-swap",)),
        Row("black cameras", ("--blank-cameras",)),
    ],
    "engines": rows("engine", ("reference", "reference:bfloat16", "cpu", "cpu:int8"), "cpu"),
    "cuda": rows("engine", ("cuda:float32", "cuda:bfloat16", "cuda:fp8"), None),
    "steps": rows("steps", (1, 2, 4, 10), 10),
    "midpoint": [
        Row(f"midpoint, {n}", ("--sampler", "midpoint", "--steps", str(n))) for n in (1, 2, 5)
    ],
    "execute": rows("execute", (1, 2, 4, 8), 2),
    "perturb": rows("perturb", (0, 0.03, 0.1, 0.2, 0.4, 0.8), 0),
}


def add_options(parser: argparse.ArgumentParser, episodes: int, out: str) -> None:
    """Which episodes each row has, and where results go."""
    parser.add_argument("--episodes", type=int, default=episodes, help="of each task and row")
    parser.add_argument("--seed-start", type=int, default=9_000_000)
    parser.add_argument("--execute", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(out))


def evaluate(
    policy: Sequence[str], row: Row, arguments: argparse.Namespace, out: Path
) -> dict[str, Any]:
    """The results of a row, from its file in the folder `out` if it is there.

    Args:
        policy: what `pi0 eval` is told of it: a checkpoint, or --server and an address.
        arguments: of `add_options`.
    """
    file = out / row.file
    if not file.is_file():
        pi0 = str(Path(sys.executable).with_name("pi0"))
        command = [pi0, "eval", *policy, "--tasks", ",".join(row.tasks)]
        for name in ("episodes", "seed_start", "execute", "workers"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        # The row's own options come last, and override.
        subprocess.run([*command, *row.options, "--out", str(file)], check=True)
    results: dict[str, Any] = json.loads(file.read_text())
    found = results["episodes_per_task"], results["seed_start"]
    if found != (arguments.episodes, arguments.seed_start):
        raise SystemExit(
            f"{file}: expected {arguments.episodes} episodes from seed {arguments.seed_start}, "
            f"found {found[0]} from {found[1]}. Remove it, or name another --out."
        )
    return results


def print_table(found: Sequence[tuple[Row, dict[str, Any]]]) -> None:
    """One line for each row and one column for each task, as Markdown."""
    tasks = list(dict.fromkeys(task for row, _ in found for task in row.tasks))
    print("| | " + " | ".join([*tasks, "wrong", "ms"]) + " |")
    print("|---" * (len(tasks) + 3) + "|")
    for row, results in found:
        counts = [results["tasks"].get(task) for task in tasks]
        cells = [f"{r['success']} of {r['episodes']}" if r else "" for r in counts]
        wrong, latency = results["wrong"], results["latency"]["median_ms"]
        print(f"| {row.label} | {' | '.join(cells)} | {wrong} | {latency:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="tabletop")
    without_gpu = [name for name in TABLES if name != "cuda"]
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=without_gpu)
    add_options(parser, 200, "out/success")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.tables:
        found = [
            (row, evaluate([arguments.checkpoint], row, arguments, arguments.out))
            for row in TABLES[name]
        ]
        print(f"\n{name}\n")
        print_table(found)


if __name__ == "__main__":
    main()
