"""`pi0 bench --serve`: chunks per second of engines behind the server, in robots."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pi0.checkpoint.load import Checkpoint


def bench_serve(
    opened: Checkpoint,
    engines: Sequence[str],
    words: Sequence[str],
    robot: str | None,
    clients: Sequence[int],
    batch: int,
    seconds: float,
    control_hz: float | None,
    execute: int | None,
) -> list[dict[str, Any]]:
    """One row for each engine and number of clients, as plain data.

    Args:
        words: options of `pi0 serve` besides those that are named here.
        batch: robots whose observations are computed together, at most.
        seconds: of each measurement.
        control_hz: actions that a robot executes a second; None: the robot's table says.
        execute: actions of a chunk that are executed before the next is asked for; None: the
            checkpoint's, else half of the chunk.

    Raises:
        Pi0Error: a server does not start or answers with an error, or no rate is known.
    """
    from pi0.errors import ConfigError
    from pi0.policy import PolicyOptions, prepare
    from pi0.serve import require_packages

    require_packages()

    from pi0.serve.load import answer_times, server, summarize

    setup = prepare(opened, PolicyOptions(robot=robot))
    pipeline = setup.require()
    rate = control_hz or pipeline.robot.control_hz
    if rate is None:
        raise ConfigError(
            f"--control-hz: expected the rate of robot {pipeline.robot.name}, whose table states "
            "none, found none. Name it: --control-hz 15."
        )
    execute = execute or setup.n_action_steps or max(1, opened.config.horizon // 2)
    width = pipeline.robot.state_dim or pipeline.state_stats.width
    named = ["--robot", robot] if robot else []
    rows = []
    for engine in engines:
        most = ["--max-clients", str(max(clients)), "--batch", str(batch)]
        with server(str(opened.path), "--engine", engine, *named, *most, *words) as (address, _):
            for count in clients:
                times = answer_times(address, pipeline.robot, width, count, seconds)
                load = summarize(count, times, seconds)
                robots = load.robots(rate, execute)
                row = {"engine": engine, "batch": batch, **asdict(load), "control_hz": rate}
                rows.append({**row, "execute": execute, "robots": robots})
    return rows


def print_rows(rows: list[dict[str, Any]], as_json: bool, out: Path | None) -> None:
    """Shows what was measured, and writes it as JSON."""
    from pi0.checkpoint.outputs import replacing
    from pi0.cli.show import count, print_json, print_line, to_json

    if as_json:
        print_json(rows)
    else:
        for row in rows:
            batches = f" in batches of up to {row['batch']}" if row["batch"] > 1 else ""
            lasts = row["execute"] / row["control_hz"]
            late = f"; p99 is longer than these actions last, {lasts * 1e3:.0f} ms"
            print_line(
                f"{row['engine']}, {count(row['clients'], 'client')}{batches}: {row['rate']:.1f} "
                f"chunks/s, p50 {row['p50'] * 1e3:.0f} ms, p99 {row['p99'] * 1e3:.0f} ms: "
                f"enough for {count(row['robots'], 'robot')} at {row['control_hz']:g} "
                f"Hz, executing {count(row['execute'], 'action')} of each chunk"
                + (late if row["p99"] > lasts else "")
            )
    if out:
        with replacing(out) as temporary:
            temporary.write_text(to_json(rows) + "\n", encoding="utf-8")
