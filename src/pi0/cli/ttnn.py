"""`pi0 ttnn`: does a model fit a Tenstorrent board, and what is missing for a card?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pi0.cli import options

if TYPE_CHECKING:
    from pi0.engines.tenstorrent.dryrun import DryRun

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Tenstorrent, with and without a card."
)


@app.callback()
def _group() -> None:
    pass


@app.command("dry-run")
def dry_run(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="[CKPT]", help="Checkpoint; only its sizes are read."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Sizes of a preset, without a checkpoint: pi0_base, small, tiny, or π0.5's "
            "pi05_base, pi05_small, pi05_tiny.",
            show_default=False,
        ),
    ] = None,
    board: Annotated[
        str,
        typer.Option(
            help="n150 (8×8 cores), p150 (11×10; p150-13x10: with firmware before 19.5), "
            "n300-8x8 (one chip) or n300 (8×7: a row of its cores dispatches)."
        ),
    ] = "n150",
    dtype: Annotated[str, typer.Option(help="accurate or fast.")] = "accurate",
    image_size: options.ImageSize = None,
    cameras: options.Cameras = 2,
    tokens: options.Tokens = None,
    steps: options.Steps = 1,
    batch: Annotated[int, typer.Option(help="Observations at once, 1 to 4.")] = 1,
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
    base: options.Base = None,
    as_json: options.Json = False,
) -> None:
    """Run the whole model on TTNN's mock device, where nothing is computed.

    TTNN validates every operation, builds its programs and lays them out in the memory of the
    board's cores and its DRAM; an operation that it rejects is an error that names the stage.
    Kernels are not compiled and nothing is computed: of numbers it says nothing, `pi0 verify
    --engines reference ttnn-host` does.

    The second table is arithmetic, no measurement: of each stage the programs, bytes over DRAM and
    operations, and the least time that these take at the chip's peaks.

    Needs `pip install '.[ttnn]'` and, as a stand-in for Tenstorrent's compiler,
    `apt install gcc-riscv64-unknown-elf`.

    **Examples**

        pi0 ttnn dry-run --preset pi05_base --board n150 --cameras 3 --steps 10
        pi0 ttnn dry-run pi0_base --board p150 --dtype fast --json
    """
    from dataclasses import asdict

    from pi0.checkpoint.load import check, open_checkpoint
    from pi0.cli.show import print_json, stage_progress
    from pi0.config import PRESETS
    from pi0.errors import ConfigError

    if (checkpoint is None) == (preset is None):
        raise ConfigError("dry-run: expected a checkpoint or --preset, found both or neither.")
    if preset and (horizon or max_tokens or base):
        raise ConfigError(
            "--horizon, --max-tokens, --base: expected with a checkpoint, found --preset, whose "
            "sizes are known. Leave them out."
        )
    if checkpoint:
        opened = open_checkpoint(checkpoint, horizon, max_tokens, base)
        check(opened)
        config = opened.config
    elif preset in PRESETS:
        config = PRESETS[preset]
    else:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, found {preset!r}.")
    if image_size is not None:
        config = config.with_image_size(image_size)
    from pi0.engines.tenstorrent.dryrun import dry_run as run

    with stage_progress("dry run") as on_stage:
        done = run(config, board, dtype, cameras, tokens, steps, on_stage, batch)
    if as_json:
        print_json(asdict(done))
    else:
        _print(done)


def _print(done: DryRun) -> None:
    from pi0.cli.show import human_bytes, print_line, table

    x, y = done.grid
    table(
        f"Dry run on {done.board}, {done.dtype}",
        ["", ""],
        [
            ["cores", f"{x} × {y}"],
            ["observations", str(done.batch)],
            ["tokens with padding", f"prefix {done.prefix}, suffix {done.suffix}"],
            ["programs built", str(done.programs)],
            ["peak L1 of a core", f"{human_bytes(done.peak_l1)} of {human_bytes(done.l1)}"],
            ["weights in DRAM", human_bytes(done.weights)],
            ["peak DRAM", f"{human_bytes(done.peak_dram)} of {human_bytes(done.dram)}"],
            ["this host: first pass, second", " s, ".join(f"{t:.2f}" for t in done.host_seconds)],
        ],
    )
    _print_times(done)
    print_line("every operation was accepted and fits; nothing was computed")


def _print_times(done: DryRun) -> None:
    from pi0.cli.show import print_line, table

    columns = "stage, programs, on < 8 cores, cores, DRAM MB, GFLOP, DRAM ms, math ms, bound ms"
    table(
        "Arithmetic, not measured",
        [*columns.split(", "), "launches ms", "limit"],
        [
            [
                row.stage,
                str(row.programs),
                str(row.on_few_cores),
                str(row.cores),
                f"{row.dram / 1e6:.1f}",
                f"{row.flop / 1e9:.1f}",
                *(f"{ms:.2f}" for ms in (row.dram_ms, row.math_ms, row.bound_ms, row.launch_ms)),
                row.limit,
            ]
            for row in done.times
        ],
    )
    peaks = done.peaks
    print_line(
        f"peaks: {peaks.dram / 1e9:.0f} GB/s, {peaks.clock / 1e9:.2f} GHz ({peaks.source}); "
        f"{done.launch_us:.0f} µs a launch (assumed)"
    )


@app.command("doctor")
def doctor(
    no_open: Annotated[
        bool, typer.Option("--no-open", help="Look at files only; leave the card alone.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Look for what stands between this machine and its Tenstorrent card.

    Driver, card, firmware, hugepages, library and compiler; then card 0 is opened, and its cores
    and DRAM are named. Each finding says how to mend it. Exit code 1 if one is an error.

    **Examples**

        pi0 ttnn doctor
        pi0 ttnn doctor --no-open --json
    """
    from dataclasses import asdict

    from rich.text import Text

    from pi0.cli.doctor import COLOURS
    from pi0.cli.show import print_json, table
    from pi0.engines.tenstorrent.card_doctor import examine

    checks = examine(open_device=not no_open)
    if as_json:
        print_json({"checks": [asdict(check) for check in checks]})
    else:
        rows: list[list[str | Text]] = [
            [
                Text(check.status, COLOURS.get(check.status, "")),
                check.name,
                ". ".join(filter(None, (check.found, check.remedy))),
            ]
            for check in checks
        ]
        table("", ["", "", "found, and how to mend it"], rows, left=3)
    if any(check.status == "error" for check in checks):
        raise typer.Exit(1)
