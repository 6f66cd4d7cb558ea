"""`pi0 verify`: do two engines agree?"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pi0.cli import options

JOINTS = 4  # how many of the joints that deviate most are told
HOST_NOTE = "ttnn-host: a card's arithmetic and rounding computed on the host; no card was used."

if TYPE_CHECKING:
    from pi0.config import Pi0Config
    from pi0.verify.report import Header
    from pi0.verify.run import VerifyResult


def verify(
    checkpoint: options.Checkpoint,
    engines: Annotated[
        tuple[str, str],
        typer.Option(metavar="REFERENCE CANDIDATE", help="Two of ENGINE:DTYPE."),
    ] = ("reference:float32", "reference:bfloat16"),
    mode: Annotated[
        str,
        typer.Option(
            help="chained: each lives with its own errors; isolated: every stage is fed with the "
            "reference's input."
        ),
    ] = "chained",
    layers: Annotated[bool, typer.Option("--layers", help="Compare every block, too.")] = False,
    inputs: options.Inputs = None,
    image_size: options.ImageSize = None,
    cameras: options.Cameras = 3,
    tokens: options.Tokens = None,
    steps: options.Steps = 10,
    min_pcc: Annotated[
        float | None,
        typer.Option(help="Ask this PCC of every stage, too.", show_default=False),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a page of HTML.", show_default=False)
    ] = None,
    oracle: Annotated[
        str,
        typer.Option(
            help="Compare the reference with an implementation that we did not write: "
            "transformers, lerobot, auto (the first that is installed) or none."
        ),
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="The candidate's device.", show_default=False)
    ] = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Prove that two engines compute the same, stage by stage.

    The same inputs and noise go through both, once with everything valid and once with a camera and
    text masked; an outside implementation is compared with the reference beside them. Exit code 1
    and the first stage beyond its limits, if there is one; the limits and their reasons are in
    docs/verify.md.

    **Examples**

        pi0 verify demo
        pi0 verify pi0_base --mode isolated --layers --report report.html
        pi0 verify demo --engines reference:float32 reference:bfloat16 \\
            --min-pcc 0.999 --json
        pi0 verify demo --engines reference ttnn-host:fast --oracle none
        pi0 verify demo --engines reference transformers
    """
    from pi0.checkpoint.load import open_checkpoint
    from pi0.cli.forward import image_side, read_npz
    from pi0.cli.show import step_progress
    from pi0.engines.base import check_engine_available, make_engine
    from pi0.inputs import from_npz
    from pi0.verify.report import Header
    from pi0.verify.run import Case, default_cases
    from pi0.verify.run import verify as run

    _check_options(mode, min_pcc, report)
    (a, a_dtype), (b, b_dtype) = (parse_engine(spec) for spec in engines)
    arrays = read_npz(inputs) if inputs else None
    opened = open_checkpoint(checkpoint)
    size = image_side(arrays) or image_size or opened.config.vision.image_size
    config = opened.config.with_image_size(size)
    cases = (
        [Case(str(inputs), *from_npz(config, arrays))]
        if arrays
        else default_cases(config, cameras, tokens or config.max_tokens, seed)
    )
    for name, where in ((a, None), (b, device)):
        _check_mode(mode, name)
        check_engine_available(name, opened.config, where, size)
    judge, told = _choose_oracle(oracle, (a, b), opened.config, size)
    with step_progress("verifying", (3 if judge else 2) * len(cases)) as on_case:
        result = run(
            lambda: make_engine(a, opened, None, a_dtype, size),
            lambda: make_engine(b, opened, device, b_dtype, size),
            cases,
            precisions=(a_dtype, b_dtype),
            mode=mode,
            layers=layers,
            steps=steps,
            min_pcc=min_pcc,
            on_case=on_case,
            oracle=None if judge is None else lambda: make_engine(judge, opened),
        )
    views, length = cases[0].inputs.image_mask.shape[1], cases[0].inputs.tokens.shape[1]
    sizes = f"{views} cameras of {size} px, {length} text tokens, {steps} steps"
    names, note = (f"{a}:{a_dtype}", f"{b}:{b_dtype}"), HOST_NOTE if "ttnn-host" in (a, b) else ""
    header = Header(str(checkpoint), *names, mode, sizes, told, note)
    _tell(header, result, report, as_json)
    if result.first_failure:
        raise typer.Exit(1)


def _check_options(mode: str, min_pcc: float | None, report: Path | None) -> None:
    from pi0.checkpoint.files import require_writable
    from pi0.errors import ConfigError, EngineError
    from pi0.verify.report import require_report_libraries
    from pi0.verify.run import MODES

    if min_pcc is not None and not 0 <= min_pcc <= 1:
        raise ConfigError(f"min-pcc: expected a number from 0 to 1, found {min_pcc}.")
    require_writable(report)
    if report:
        require_report_libraries()
    if mode not in MODES:
        raise EngineError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}.")


def _check_mode(mode: str, engine: str) -> None:
    from pi0.errors import EngineError
    from pi0.peers.engine import PEERS

    if mode == "isolated" and engine in PEERS:
        raise EngineError(
            f"mode: expected chained for engine {engine}, which neither feeds nor can be fed."
        )


def parse_engine(spec: str) -> tuple[str, str]:
    """The engine and the precision of ENGINE or ENGINE:DTYPE."""
    from pi0.engines.base import choose_precision

    name, _, dtype = spec.partition(":")
    return name, choose_precision(name, dtype or None)


def _choose_oracle(
    choice: str, engines: tuple[str, str], config: Pi0Config, size: int
) -> tuple[str | None, str]:
    """The engine to compare the reference with, or None; and its name, or why there is none."""
    from pi0.engines.base import check_engine_available
    from pi0.errors import EngineError
    from pi0.peers.engine import PEERS

    native = config.vision.image_size
    if choice not in ("auto", "none", *PEERS):
        raise EngineError(
            f"oracle: expected auto, none or one of {', '.join(PEERS)}, found {choice!r}."
        )
    if choice in PEERS:
        check_engine_available(choice, config, None, size)
        return choice, choice
    if choice == "none":
        return None, "none, as asked"
    if set(engines) & set(PEERS):
        return None, "none beside the engines compared"
    if size != native:
        return None, f"none: they run at the checkpoint's image size of {native} only"
    for name, engine in PEERS.items():
        with contextlib.suppress(EngineError):
            engine.python()
            return name, name
    return None, "none is installed: pip install 'transformers>=5.5' would give one"


def _tell(header: Header, result: VerifyResult, report: Path | None, as_json: bool) -> None:
    from pi0.checkpoint.files import replacing
    from pi0.cli.show import print_json, print_line
    from pi0.verify.report import to_data, to_html

    if report:
        with replacing(report) as temporary:
            temporary.write_text(to_html(header, result), encoding="utf-8")
    if as_json:
        print_json(to_data(header, result))
    else:
        _print(header, result)
        if report:
            print_line(f"wrote {report}")


def _print(header: Header, result: VerifyResult) -> None:
    from pi0.cli.show import print_line, table

    print_line(f"{header.candidate} against {header.reference}: {header.sizes}, mode {header.mode}")
    rows = []
    for row in result.rows:
        c = row.comparison
        numbers = (
            [c.fault, "", "", ""]
            if c.fault
            else [f"{c.pcc:.7f}", f"{c.cosine:.7f}", f"{c.rel_l2:.1e}", f"{c.max_abs:.1e}"]
        )
        times = [f"{ms:.1f}" if ms else "" for ms in (row.reference_ms, row.candidate_ms)]
        verdict = "ok" if row.passed else "FAILS"
        rows.append([row.case, row.name, *numbers, f"{row.limit.max_rel_l2:.0e}", *times, verdict])
    columns = ["case", "stage", "PCC", "cosine", "rel. L2", "max abs", "limit", "ms", "ms", ""]
    table("", columns, rows, left=2)
    print_line(f"oracle implementation: {header.oracle}")
    if header.note:
        print_line(header.note)
    if result.missing:
        print_line(f"not shown by both engines: {', '.join(result.missing)}")
    for case, (a, b) in result.actions.items():
        joints = (a - b).abs().amax(dim=(0, 1))
        worst = joints.argsort(descending=True)[:JOINTS].tolist()
        told = ", ".join(f"action {j}: {joints[j]:.1e}" for j in worst)
        print_line(f"largest deviation of actions ({case}): {told}")
    failure = result.first_failure
    if failure:
        why = failure.comparison.fault or failure.limit.why
        print_line(f"FAILS first at {failure.name} ({failure.case}); expected: {why}")
    else:
        print_line(f"agree: all {len(result.rows)} comparisons are within their limits")
