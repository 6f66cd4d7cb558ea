"""The policy in closed loop through the wire: `python benchmarks/wire.py [CKPT]`.

Runs `pi0 eval` on the same seeds in process, and through a `pi0 serve` with one robot, with four at
a time, and with four that the server computes together; each with latencies of 0, 100 and 300 ms,
with and without real-time chunking. Prints the table of docs/reliability.md and writes it as JSON.
A cell that was run before is read from --out, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from success import Row, add_options, evaluate

from pi0.serve.load import server

ROBOTS = 4


@dataclass(frozen=True)
class Way:
    """From a robot to the policy.

    Attributes:
        robots: at a time, None: as many as --workers says; the episodes are the same.
        serve: options of the server; None: the policy is in the robot's process.
    """

    robots: int | None
    serve: tuple[str, ...] | None


WAYS = {
    "in process": Way(None, None),
    "server, 1 robot": Way(1, ()),
    f"server, {ROBOTS} robots": Way(ROBOTS, ()),
    f"server, {ROBOTS} robots together": Way(ROBOTS, ("--batch", str(ROBOTS))),
}
IN_PROCESS = next(iter(WAYS))


@dataclass(frozen=True)
class Cell:
    """One evaluation."""

    way: str
    latency: int  # ms
    real_time: bool


def run(
    way: str, cells: Sequence[Cell], arguments: argparse.Namespace
) -> dict[Cell, dict[str, Any]]:
    """The results of the cells of one way, with a server for them if one is needed."""
    engine, real_time = ["--engine", arguments.engine], ["--real-time", arguments.real_time]
    folder = arguments.out / way.replace(",", "").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        cell: Row(way, ("--latency", str(cell.latency), *(real_time if cell.real_time else ())))
        for cell in cells
    }
    workers = WAYS[way].robots or arguments.workers
    given = argparse.Namespace(**{**vars(arguments), "workers": workers})
    with contextlib.ExitStack() as stack:
        policy, serve = [arguments.checkpoint, *engine], WAYS[way].serve
        if serve is not None and not all((folder / row.file).is_file() for row in rows.values()):
            served = server(arguments.checkpoint, *engine, *serve, *real_time)
            policy = ["--server", stack.enter_context(served)[0]]
        return {cell: evaluate(policy, row, given, folder) for cell, row in rows.items()}


def summary(cell: Cell, results: dict[str, Any], local: dict[str, Any] | None) -> dict[str, Any]:
    """What the table says of a cell; `local` is the one in process with the same options."""
    names = ("success", "episodes", "rate", "interval", "border_jump", "delay", "engine")
    same = None
    if local is not None and cell.way != IN_PROCESS:
        pairs = zip(results["rollouts"], local["rollouts"], strict=True)
        same = sum(mine == theirs for mine, theirs in pairs)
    return {**vars(cell), **{name: results[name] for name in names}, "as_in_process": same}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """One line for each cell, as Markdown."""
    print(
        "| | latency, ms | real-time | success | 95 % interval | as in process | jump | largest |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for row in rows:
        low, high = (f"{100 * bound:.1f}" for bound in row["interval"])
        jump = row["border_jump"]
        lengths = (f"{jump[name]:.4f}" if jump["borders"] else "" for name in ("rms", "max"))
        same = "" if row["as_in_process"] is None else row["as_in_process"]
        print(
            f"| {row['way']} | {row['latency']} | {'yes' if row['real_time'] else 'no'} | "
            f"{row['success']} of {row['episodes']} | {low} to {high} % | {same} | "
            f"{' | '.join(lengths)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="tabletop")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--latencies", nargs="+", type=int, default=[0, 100, 300], metavar="MS")
    parser.add_argument("--real-time", default="identity", help="as for pi0 eval")
    parser.add_argument("--engine", default="cpu", help="as for pi0 eval")
    add_options(parser, 50, "out/wire")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of servers, as of eval's workers: threads split sums
    results: dict[Cell, dict[str, Any]] = {}
    for way in arguments.ways:
        cells = [Cell(way, ms, rtc) for ms in arguments.latencies for rtc in (False, True)]
        results |= run(way, cells, arguments)
    rows = [
        summary(cell, found, results.get(replace(cell, way=IN_PROCESS)))
        for cell, found in results.items()
    ]
    (arguments.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    print()
    print_table(rows)


if __name__ == "__main__":
    main()
