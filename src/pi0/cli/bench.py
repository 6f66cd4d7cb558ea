"""`pi0 bench`: how fast are engines, and how accurate?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi0.cli import options

if TYPE_CHECKING:
    from pi0.bench.run import BenchPlan
    from pi0.config import Pi0Config


def bench(
    ctx: typer.Context,
    checkpoint: options.Checkpoint,
    engines: Annotated[
        list[str],
        typer.Option(
            metavar=options.GRAMMAR,
            help="An engine to measure; repeat the option for several. Accuracy is relative to the "
            "first.",
            callback=options.check_engines,
        ),
    ] = ["reference"],  # noqa: B006 - typer reads it
    against: Annotated[
        list[str],
        typer.Option(
            metavar=options.GRAMMAR,
            help="An engine to compare with, such as lerobot or transformers; may be repeated. "
            "Ratios are to the first, or without any to the slowest engine.",
            show_default=False,
            callback=options.check_engines,
        ),
    ] = [],  # noqa: B006
    cameras: options.Cameras = 3,
    masked: Annotated[
        int, typer.Option(min=0, help="How many of the cameras are masked, from the last.")
    ] = 0,
    tokens: options.Tokens = None,
    valid: Annotated[
        int | None,
        typer.Option(
            min=0, help="How many of the text tokens are valid, from the first.", show_default="all"
        ),
    ] = None,
    steps: options.PolicySteps = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed calls of each engine.")] = 7,
    rounds: Annotated[int, typer.Option(min=1, help="Visits to each engine, in turn.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of noise for accuracy.")] = 10,
    seed: options.Seed = 0,
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
    base: options.Base = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="OUT.json", help="Write everything as JSON.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.png",
            help="Draw the times; with --scaling the scaling, too, into OUT-scaling.png.",
            show_default=False,
        ),
    ] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Also vary cameras, text, steps and batch.")
    ] = False,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve", help="Measure engines behind `pi0 serve` instead: chunks/s, and robots."
        ),
    ] = False,
    clients: Annotated[
        list[int],
        typer.Option(min=1, metavar="N", help="With --serve: clients at once; may be repeated."),
    ] = [1, 8],  # noqa: B006
    batch: Annotated[
        int, typer.Option(min=1, help="With --serve: robots that are computed together, at most.")
    ] = 1,
    seconds: Annotated[
        float,
        typer.Option(min=0.1, help="With --serve: how long each number of clients is measured."),
    ] = 20.0,
    robot: options.RobotName = None,
    control_hz: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="With --serve: actions a second of a robot; default: its table's.",
            show_default=False,
        ),
    ] = None,
    execute: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --serve: actions of a chunk that a robot executes before it asks again; "
            "default: the checkpoint's, else half of the chunk.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure engines in turn, on the same random inputs and noise.

    Each is visited --rounds times in a process of its own: load, first action, a warm-up call,
    timed calls, a pass in parts; in the first visit also actions for --seeds noises. Exit code 1
    if one fails; the others are still measured. What the numbers mean: docs/bench.md.

    **Examples**

        pi0 bench demo --engines reference:float32 --engines reference:bfloat16
        pi0 bench pi0_base --engines cpu:int8 --engines cpu:float32 \\
            --against lerobot --against transformers \\
            --masked 1 --valid 9 --out results.json --plot bench.png
        pi0 bench demo --scaling --plot bench.png
        pi0 bench pi0_libero --serve --engines cpu:int8 --robot libero --execute 10
    """
    from pi0.bench.run import BenchPlan
    from pi0.bench.task import Workload
    from pi0.checkpoint.load import check, open_checkpoint, require_flow
    from pi0.checkpoint.outputs import require_writable
    from pi0.cli.plot import require_matplotlib
    from pi0.engines.spec import EngineSpec
    from pi0.errors import ConfigError

    if ctx.args:
        raise ConfigError(
            "bench: expected one checkpoint and one engine after each --engines or --against, "
            f"found also {' '.join(ctx.args)}. Repeat the option: --engines cpu --engines lerobot."
        )
    require_writable(out, plot, reads=(checkpoint, base))
    if plot:
        require_matplotlib()
    specs = [EngineSpec.parse(text) for text in [*engines, *against]]
    opened = open_checkpoint(checkpoint, horizon, max_tokens, base)
    check(opened)
    require_flow(opened)
    if serve:
        from pi0.cli.bench_serve import bench_serve, print_rows

        said = {"--steps": steps, "--horizon": horizon, "--max-tokens": max_tokens, "--base": base}
        words = [str(word) for pair in said.items() if pair[1] is not None for word in pair]
        given = robot, clients, batch, seconds, control_hz, execute
        print_rows(bench_serve(opened, engines, words, *given), as_json, out)
        return
    tokens = tokens or opened.config.max_tokens
    point = Workload(
        cameras, masked, tokens, tokens if valid is None else valid, steps or opened.steps
    )
    measured = len(against), point, repeat, rounds, seeds, seed, scaling
    plan = BenchPlan(checkpoint, specs, *measured, base, horizon, max_tokens)
    _run(plan, opened.config, out, plot, as_json)


def _run(
    plan: BenchPlan, config: Pi0Config, out: Path | None, plot: Path | None, as_json: bool
) -> None:
    import shlex
    import sys

    from pi0.bench.machine import describe
    from pi0.bench.report import to_data
    from pi0.bench.run import bench as measure
    from pi0.checkpoint.outputs import replacing
    from pi0.cli.show import print_json, print_line, step_progress, to_json

    visits = len(plan.specs) * (plan.rounds + plan.scaling)
    with step_progress("measuring", visits) as on_visit:
        result = measure(plan, on_visit)
    command = shlex.join(["pi0", *sys.argv[1:]])
    data = to_data(plan, config, result, describe(), command)
    # Printed first: a file that cannot be written must not take the numbers with it.
    if as_json:
        print_json(data)
    else:
        _print(data)
    wrote = []
    if out:
        with replacing(out) as temporary:
            temporary.write_text(to_json(data) + "\n", encoding="utf-8")
        wrote.append(out)
    if plot:
        wrote += _plot(plot, plan, data)
    if not as_json:
        for path in wrote:
            print_line(f"wrote {path}")
    if any(engine.failure for engine in result.engines):
        raise typer.Exit(1)


def _plot(path: Path, plan: BenchPlan, data: dict[str, Any]) -> list[Path]:
    """Draws what was measured; returns the files."""
    from pi0.bench.plot import plot_scaling, plot_times
    from pi0.checkpoint.outputs import replacing

    title = f"π0 on {plan.checkpoint.name}: {_point(data)}"
    with replacing(path) as temporary:
        plot_times(temporary, data, title, _machine(data["machine"]))
    if not plan.scaling:
        return [path]
    scaling = path.with_name(f"{path.stem}-scaling{path.suffix}")
    with replacing(scaling) as temporary:
        plot_scaling(temporary, data["scaling"], f"Latency scaling around {_point(data)}")
    return [path, scaling]


def _print(data: dict[str, Any]) -> None:
    from pi0.cli.show import print_line

    print_line(data["command"])
    print_line(_machine(data["machine"]))
    print_line(f"{data['checkpoint']}: {_point(data)}")
    _print_times(data)
    _print_stages(data)
    if data["scaling"]:
        _print_scaling(data["scaling"])
    print_line(
        f"error: ‖a − a_ref‖ / ‖a_ref − noise‖, relative to what the model moved, against "
        f"{data['baseline']}; error and PCC are the worst of {data['seeds']} seeds of noise"
    )
    own = f"pi0 {data['machine']['pi0']}"
    for engine in data["engines"]:
        if engine["implementation"] not in (None, own):
            print_line(f"{engine['engine']}: {engine['implementation']}, torch {engine['torch']}")
        if engine["fault"]:
            print_line(f"{engine['engine']}: no accuracy, {engine['fault']}")
        for note in engine["notes"]:
            print_line(f"{engine['engine']}: {note}")
        if engine["failure"]:
            print_line(f"FAILED: {engine['failure']}")


def _print_times(data: dict[str, Any]) -> None:
    from pi0.bench.report import accuracy_cells
    from pi0.cli.show import human_bytes, table

    rows = []
    for e in data["engines"]:
        if e["ms"] is None:
            rows.append([e["engine"], "failed", *["—"] * 11])
            continue
        memory = human_bytes(e["peak_bytes"])
        if e["cuda_bytes"]:
            memory += f" + {human_bytes(e['cuda_bytes'])} GPU"
        rows.append(
            [
                e["engine"],
                _number(e["ms"], ".1f"),
                f"{e['min_ms']:.1f}–{e['max_ms']:.1f}",
                f"{e['ratio']:.2f}",
                *(_number(e[name], ".1f") for name in ("vision_ms", "prefill_ms", "step_ms")),
                *(f"{e[name]:.2f} s" for name in ("first_action_s", "load_s")),
                memory,
                str(e["threads"] or ""),
                *accuracy_cells(e, data["baseline"]),
            ]
        )
    columns = ["engine", "ms", "min–max", f"× {data['ratio_to']}", "vision", "prefill", "step"]
    columns += ["first action", "load", "peak memory", "threads", "error", "PCC"]
    table("Times (ms, medians; vision is part of prefill)", columns, rows)


def _print_stages(data: dict[str, Any]) -> None:
    from pi0.cli.show import print_line, table

    rows = [
        [
            engine["engine"],
            stage["stage"],
            f"{stage['gflop']:.3g}",
            f"{stage['ms']:.1f}",
            _number(stage["gflops"], ".3g"),
            _number(stage["roofline_ms"], ".3g"),
            _number(stage["times_roofline"], ".2f"),
        ]
        for engine in data["engines"]
        for stage in engine["stages"]
    ]
    columns = ["engine", "part", "GFLOP needed", "ms", "GFLOP/s", "roofline ms", "× roofline"]
    table("Arithmetic", columns, rows, left=2)
    for rate in data["rates"]:
        print_line(
            f"roofline, {rate['precision']} on {rate['device']}: {rate['flops'] / 1e9:.0f} GFLOP/s "
            f"in a plain large product, {rate['bandwidth'] / 1e9:.1f} GB/s of memory"
        )


def _print_scaling(scaling: list[dict[str, Any]]) -> None:
    from pi0.cli.show import table

    names = list(scaling[0]["ms"])
    rows = [
        [
            point["varied"],
            str(point["value"]),
            f"{point['gflop']:.3g}",
            *(_number(point["ms"][name], ".1f") for name in names),
        ]
        for point in scaling
    ]
    table("Latency scaling (ms)", ["varied", "value", "GFLOP needed", *names], rows)


def _point(data: dict[str, Any]) -> str:
    p = data["point"]
    return (
        f"{p['cameras']} cameras of {data['image_size']} px ({p['masked']} masked), {p['tokens']} "
        f"text tokens ({p['valid']} valid), {p['steps']} steps"
    )


def _machine(machine: dict[str, Any]) -> str:
    from pi0.cli.show import human_bytes

    parts = [
        f"{machine['cpu']} ({', '.join(machine['flags'])})",
        f"{machine['cores']} cores, {machine['threads']} threads",
        human_bytes(machine["memory_bytes"]),
        *([machine["gpu"]] if machine["gpu"] else []),
        f"Python {machine['python']}, torch {machine['torch']}, pi0 {machine['pi0']}",
    ]
    return "; ".join(parts)


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)
