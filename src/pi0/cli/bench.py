"""`pi0 bench`: how fast are engines, and how exact?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from pi0.cli import options

if TYPE_CHECKING:
    from pi0.bench.run import BenchPlan
    from pi0.config import Pi0Config


class ManyValues(TyperCommand):
    """A command whose repeatable options take several values after one flag: --engines A B C."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {flag for p in self.params if getattr(p, "multiple", False) for flag in p.opts}
        words: list[str] = []
        flag = None
        for word in args:
            if word.startswith("-"):
                flag = word if word in repeatable else None
            elif flag and words[-1] != flag:
                words.append(flag)
            words.append(word)
        return super().parse_args(ctx, words)


def bench(
    checkpoint: options.Checkpoint,
    engines: Annotated[
        list[str],
        typer.Option(
            metavar="ENGINE...",
            help="Engines, each ENGINE, ENGINE:DTYPE or ENGINE:DTYPE@DEVICE; accuracy is beside "
            "the first.",
        ),
    ] = ["reference"],  # noqa: B006 - typer reads it
    against: Annotated[
        list[str],
        typer.Option(
            metavar="ENGINE...",
            help="Engines that are peers, such as lerobot and transformers; ratios are to the "
            "first, or without peers to the slowest engine.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    cameras: options.Cameras = 3,
    masked: Annotated[int, typer.Option(min=0, help="Cameras, the last, that are masked.")] = 0,
    tokens: options.Tokens = None,
    valid: Annotated[
        int | None,
        typer.Option(min=0, help="Text tokens, the first, that are valid.", show_default="all"),
    ] = None,
    steps: options.Steps = 10,
    repeat: Annotated[int, typer.Option(min=1, help="Timed calls of each engine.")] = 7,
    rounds: Annotated[int, typer.Option(min=1, help="Visits to each engine, in turn.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of noise for accuracy.")] = 10,
    seed: options.Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="OUT.json", help="Write everything as JSON.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.png",
            help="Draw the times; with --scaling the growth, too, into OUT-scaling.png.",
            show_default=False,
        ),
    ] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Also vary cameras, text, steps and batch.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Measure engines in turn, on the same random inputs and noise.

    Each is visited --rounds times in a process of its own: load, first action, a call that does
    not count, timed calls, a pass in parts; in the first visit also actions for --seeds noises.
    Exit code 1 if one fails; the others go on. What the numbers mean: docs/bench.md.

    **Examples**

        pi0 bench demo --engines reference:float32 reference:bfloat16
        pi0 bench pi0_base --engines reference --against lerobot transformers \\
            --masked 1 --valid 9 --out results.json --plot bench.png
        pi0 bench demo --scaling --plot bench.png
    """
    from pi0.bench.run import BenchPlan
    from pi0.bench.task import Workload, parse_spec
    from pi0.checkpoint.files import require_writable
    from pi0.checkpoint.load import check, open_checkpoint
    from pi0.cli.plot import require_matplotlib
    from pi0.peers.engine import PEERS

    require_writable(out, plot)
    if plot:
        require_matplotlib()
    specs = [parse_spec(text) for text in [*engines, *against]]
    for name in {spec.name for spec in specs} & set(PEERS):
        PEERS[name].python()  # says what to install
    opened = open_checkpoint(checkpoint)
    check(opened)
    tokens = tokens or opened.config.max_tokens
    point = Workload(cameras, masked, tokens, tokens if valid is None else valid, steps)
    plan = BenchPlan(checkpoint, specs, len(against), point, repeat, rounds, seeds, seed, scaling)
    _run(plan, opened.config, out, plot, as_json)


def _run(
    plan: BenchPlan, config: Pi0Config, out: Path | None, plot: Path | None, as_json: bool
) -> None:
    import shlex
    import sys

    from pi0.bench.machine import describe
    from pi0.bench.report import to_data
    from pi0.bench.run import bench as measure
    from pi0.checkpoint.files import replacing
    from pi0.cli.show import print_json, print_line, step_progress, to_json

    visits = len(plan.specs) * (plan.rounds + plan.scaling)
    with step_progress("measuring", visits) as on_visit:
        result = measure(plan, on_visit)
    command = shlex.join(["pi0", *sys.argv[1:]])
    data = to_data(plan, config, result, describe(), command)
    if out:
        with replacing(out) as temporary:
            temporary.write_text(to_json(data) + "\n", encoding="utf-8")
    wrote = [out] if out else []
    if plot:
        wrote += _plot(plot, plan, data)
    if as_json:
        print_json(data)
    else:
        _print(data)
        for path in wrote:
            print_line(f"wrote {path}")
    if any(engine.failure for engine in result.engines):
        raise typer.Exit(1)


def _plot(path: Path, plan: BenchPlan, data: dict[str, Any]) -> list[Path]:
    """Draws what was measured; returns the files."""
    from pi0.bench.plot import plot_scaling, plot_times
    from pi0.checkpoint.files import replacing

    title = f"π0 on {plan.checkpoint.name}: {_point(data)}"
    with replacing(path) as temporary:
        plot_times(temporary, data, title, _machine(data["machine"]))
    if not plan.scaling:
        return [path]
    growth = path.with_name(f"{path.stem}-scaling{path.suffix}")
    with replacing(growth) as temporary:
        plot_scaling(temporary, data["scaling"], f"Growth of time around {_point(data)}")
    return [path, growth]


def _print(data: dict[str, Any]) -> None:
    from pi0.cli.show import print_line

    print_line(data["command"])
    print_line(_machine(data["machine"]))
    print_line(f"{data['checkpoint']}: {_point(data)}")
    _print_times(data)
    _print_stages(data)
    if data["scaling"]:
        _print_scaling(data["scaling"])
    print_line(f"accuracy: the worst of {data['seeds']} seeds of noise, beside {data['baseline']}")
    for engine in data["engines"]:
        if engine["implementation"]:
            print_line(f"{engine['engine']}: {engine['implementation']}, torch {engine['torch']}")
        for note in engine["notes"]:
            print_line(f"{engine['engine']}: {note}")
        if engine["failure"]:
            print_line(f"FAILED: {engine['failure']}")


def _print_times(data: dict[str, Any]) -> None:
    from pi0.cli.show import human_bytes, table

    rows = []
    for e in data["engines"]:
        if e["ms"] is None:
            rows.append([e["engine"], "failed", *[""] * 11])
            continue
        memory = human_bytes(e["peak_bytes"])
        if e["cuda_bytes"]:
            memory += f" + {human_bytes(e['cuda_bytes'])} GPU"
        baseline = e is data["engines"][0]
        pcc = e["fault"] or ("baseline" if baseline else _number(e["pcc"], ".7f"))
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
                pcc,
                "" if baseline else _number(e["rel_l2"], ".1e"),
            ]
        )
    ratio = f"× {data['ratio_to'].partition(':')[0]}"
    columns = ["engine", "ms", "least–most", ratio, "vision", "prefill", "a step"]
    columns += ["first action", "load", "peak memory", "threads", "PCC", "rel. L2"]
    table("Times (ms, medians; vision is part of prefill)", columns, rows)


def _print_stages(data: dict[str, Any]) -> None:
    from pi0.cli.show import print_line, table

    rows = [
        [
            engine["engine"],
            stage["stage"],
            f"{stage['gflop']:.3g}",
            f"{stage['ms']:.1f}",
            f"{stage['gflops']:.3g}",
            _number(stage["roofline_ms"], ".3g"),
            _number(stage["times_roofline"], ".2f"),
        ]
        for engine in data["engines"]
        for stage in engine["stages"]
    ]
    columns = ["engine", "part", "GFLOP needed", "ms", "GFLOP/s", "floor, ms", "× floor"]
    table("Arithmetic", columns, rows, left=2)
    for rate in data["rates"]:
        print_line(
            f"floor, {rate['precision']} on {rate['device']}: {rate['flops'] / 1e9:.0f} GFLOP/s "
            f"in a plain large product, {rate['bandwidth'] / 1e9:.1f} GB/s of memory"
        )


def _print_scaling(growth: list[dict[str, Any]]) -> None:
    from pi0.cli.show import table

    names = list(growth[0]["ms"])
    rows = [
        [
            point["varied"],
            str(point["value"]),
            f"{point['gflop']:.3g}",
            *(_number(point["ms"][name], ".1f") for name in names),
        ]
        for point in growth
    ]
    table("Growth (ms)", ["varied", "to", "GFLOP needed", *names], rows)


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
