"""`pi0 verify`: do two engines agree?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pi0.cli import options

JOINTS = 4  # how many of the joints that deviate most are printed

if TYPE_CHECKING:
    from pi0.checkpoint.load import Checkpoint
    from pi0.config import Pi0Config
    from pi0.engines.spec import EngineSpec
    from pi0.verify.report import Header
    from pi0.verify.run import VerifyResult


def verify(
    checkpoint: options.Checkpoint,
    engines: Annotated[
        tuple[str, str],
        typer.Option(
            metavar="REFERENCE CANDIDATE",
            help="Two engines, such as reference and cpu:int8.",
            callback=options.check_engines,
        ),
    ] = ("reference:float32", "reference:bfloat16"),
    mode: Annotated[
        str,
        typer.Option(
            help="Which of the candidate's passes are compared. chained: it computes with its own "
            "results, so that errors add up; isolated: every stage gets the reference's input."
        ),
    ] = "both",
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="Print every block, and compare the blocks of the chained pass, too."
        ),
    ] = False,
    inputs: options.Inputs = None,
    image_size: options.ImageSize = None,
    cameras: options.Cameras = 3,
    tokens: options.Tokens = None,
    steps: options.PolicySteps = None,
    min_pcc: Annotated[
        float | None,
        typer.Option(help="Require this PCC of every stage, too.", show_default=False),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a page of HTML.", show_default=False)
    ] = None,
    oracle: Annotated[
        str,
        typer.Option(
            help="Compare the reference with an implementation that we did not write: the name of "
            "a peer such as transformers or lerobot, auto (the first that is installed) or none."
        ),
    ] = "auto",
    seed: options.Seed = 0,
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
    base: options.Base = None,
    as_json: options.Json = False,
) -> None:
    """Test whether two engines compute the same, stage by stage.

    The same random inputs and noise go through both, once with everything valid and once with a
    camera and text masked, and the results must agree. The candidate's code is tested in a
    precision that rounds nothing, its rounding by limits for each stage; then inputs change one at
    a time. An independent implementation is compared with the reference. Exit code 1 if a limit
    does not hold. The limits, and what this test cannot see, such as a wrong checkpoint:
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
    from pi0.cli.forward import array_sizes, image_side, read_npz
    from pi0.cli.show import step_progress
    from pi0.engines.base import make_engine
    from pi0.engines.memory import require_memory
    from pi0.engines.registry import find_engine
    from pi0.engines.spec import EngineSpec
    from pi0.inputs import from_npz
    from pi0.verify.cases import Case, default_cases
    from pi0.verify.report import Header
    from pi0.verify.run import unrounded_engine
    from pi0.verify.run import verify as run

    _check_options(mode, min_pcc, report, (checkpoint, base, inputs))
    a, b = (EngineSpec.parse(text) for text in engines)
    arrays = read_npz(inputs) if inputs else None
    opened = open_checkpoint(checkpoint, horizon, max_tokens, base)
    steps = steps or opened.steps
    size = image_side(arrays) or image_size or opened.config.vision.image_size
    config = opened.config.with_image_size(size)
    asked = 1, cameras, tokens or config.max_tokens
    batch, views, length = array_sizes(arrays) or asked
    for spec in (a, b):
        _check_engine(spec, mode, opened.config, size)
        require_memory(opened, spec, views, length, size, batch)
    cases = (
        [Case(str(inputs), *from_npz(config, arrays), given=True)]
        if arrays
        else default_cases(config, views, length, seed)
    )
    judge, why = _choose_oracle(oracle, (a, b), opened.config, size)
    exact = unrounded_engine(a, b)
    runs = 2 + (judge is not None) + (exact is not None)
    with step_progress("verifying", runs * len(cases)) as on_case, _named_damage(opened):
        result = run(
            lambda: make_engine(a, opened, image_size=size),
            lambda: make_engine(b, opened, image_size=size),
            cases,
            mode=mode,
            layers=layers,
            steps=steps,
            min_pcc=min_pcc,
            on_case=on_case,
            oracle=None if judge is None else lambda: make_engine(judge, opened),
            unrounded=None
            if exact is None
            else lambda: make_engine(exact, opened, image_size=size),
        )
    sizes = f"{views} cameras of {size} px, {length} text tokens, {steps} steps"
    note = " ".join(result.notes)
    judged = judge is not None or any(find_engine(s.name).capabilities.peer for s in (a, b))
    header = Header(str(checkpoint), a.label, b.label, mode, sizes, why, note, judged)
    _show(header, result, report, as_json, layers)
    if result.first_failure:
        raise typer.Exit(1)


def _check_options(
    mode: str, min_pcc: float | None, report: Path | None, reads: tuple[Path | None, ...]
) -> None:
    from pi0.checkpoint.outputs import require_writable
    from pi0.errors import ConfigError, EngineError
    from pi0.verify.report import require_report_libraries
    from pi0.verify.run import MODES

    if min_pcc is not None and not 0 <= min_pcc <= 1:
        raise ConfigError(f"min-pcc: expected a number from 0 to 1, found {min_pcc}.")
    require_writable(report, reads=reads)
    if report:
        require_report_libraries()
    if mode not in MODES:
        raise EngineError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}.")


def _check_engine(spec: EngineSpec, mode: str, config: Pi0Config, size: int) -> None:
    """Raises EngineError before the work if an engine cannot be verified here."""
    from pi0.engines.base import EngineOptions
    from pi0.engines.registry import find_engine
    from pi0.errors import EngineError
    from pi0.verify.thresholds import limits_of

    engine = find_engine(spec.name)
    can = engine.capabilities
    if mode == "isolated" and not (can.shows_stages and can.feedable):
        raise EngineError(
            f"mode: expected chained for engine {spec.name}, whose stages are not shown and cannot "
            "be replaced."
        )
    limits_of(engine, spec.precision)
    engine.check_available(config, EngineOptions(spec.precision, spec.device, size))


@contextmanager
def _named_damage(checkpoint: Checkpoint) -> Iterator[None]:
    """Adds what is wrong with its weights to what verify says of a checkpoint that is damaged."""
    from pi0.checkpoint.health import weight_findings
    from pi0.errors import CheckpointError
    from pi0.verify.run import DamagedCheckpointError

    try:
        yield
    except DamagedCheckpointError as error:
        found = " ".join(finding.sentence for finding in weight_findings(checkpoint))
        named = found or "All weights are finite and none is unusually large."
        raise CheckpointError(f"{error} {named}") from error


def _choose_oracle(
    choice: str, specs: tuple[EngineSpec, EngineSpec], config: Pi0Config, size: int
) -> tuple[str | None, str]:
    """The engine to compare the reference with, or None; and its name, or why there is none."""
    from pi0.engines.base import EngineOptions
    from pi0.engines.registry import find_engine, find_peers
    from pi0.errors import EngineError

    if choice == "none":
        return None, "none, as requested"
    peers = find_peers()
    if choice not in ("auto", *peers):
        raise EngineError(
            f"oracle: expected auto, none or one of {', '.join(peers)}, found {choice!r}."
        )
    if choice == "auto" and any(spec.name in peers for spec in specs):
        return None, "none besides the engines compared"
    missing = []
    for name in peers if choice == "auto" else [choice]:
        engine = find_engine(name)
        options = EngineOptions(engine.capabilities.precisions[0], image_size=size)
        try:
            engine.check_available(config, options)
        except EngineError as error:
            if choice != "auto":
                raise
            missing.append(str(error))
        else:
            return name, name
    return None, f"none is available: {' '.join(missing)}"


def _show(
    header: Header, result: VerifyResult, report: Path | None, as_json: bool, layers: bool
) -> None:
    from pi0.checkpoint.outputs import replacing
    from pi0.cli.show import print_json, print_line
    from pi0.verify.report import to_data, to_html

    # Printed first: a page that cannot be written must not take the numbers with it.
    if as_json:
        print_json(to_data(header, result))
    else:
        _print(header, result, layers)
    if report:
        with replacing(report) as temporary:
            temporary.write_text(to_html(header, result), encoding="utf-8")
        if not as_json:
            print_line(f"wrote {report}")


def _print(header: Header, result: VerifyResult, layers: bool) -> None:
    from pi0.cli.forward import print_hidden
    from pi0.cli.show import print_line
    from pi0.verify.report import part_verdicts, verdict

    print_line(f"{header.candidate} against {header.reference}: {header.sizes}, mode {header.mode}")
    _print_rows(header, result, layers)
    print_line(f"independent implementation: {header.oracle}")
    if header.note:
        print_line(header.note)
    print_hidden("not compared", result.missing)
    for case, (a, b) in result.actions.items():
        joints = (a - b).abs().amax(dim=(0, 1))
        worst = joints.argsort(descending=True)[:JOINTS].tolist()
        deviations = ", ".join(f"action {j}: {joints[j]:.1e}" for j in worst)
        print_line(f"largest deviation of actions ({case}): {deviations}")
    failure = result.first_failure
    if failure and not failure.comparison.fault:
        print_line(f"reason for the limits of {failure.name}: {failure.limit.why}")
    for sentence in part_verdicts(header, result):
        print_line(sentence)
    print_line(verdict(header, result))


def _print_rows(header: Header, result: VerifyResult, layers: bool) -> None:
    """Comparisons with their limits, and which of them they exceed; of blocks the worst, unless
    all were asked for."""
    from pi0.cli.show import print_line, table
    from pi0.verify.report import outcome, worst_of_blocks

    rows = []
    for row in result.rows if layers else worst_of_blocks(result.rows):
        c, limit = row.comparison, row.limit
        cells = ["—"] * 7
        if not c.fault:
            cells = [
                f"{c.pcc:.7f}",
                f"{limit.min_pcc:g}" if limit.min_pcc > 0 else "",
                f"{c.rel_l2:.1e}",
                f"{limit.max_rel_l2:.0e}" if math.isfinite(limit.max_rel_l2) else "",
                f"{c.gain_error:+.0e}",
                f"{limit.max_gain_error:.0e}" if math.isfinite(limit.max_gain_error) else "",
                f"{c.max_abs:.1e}",
            ]
        times = [f"{ms:.1f}" if ms else "" for ms in (row.reference_ms, row.candidate_ms)]
        rows.append([row.part, row.case, row.name, *cells, *times, outcome(row)])
    columns = ["part", "case", "stage", "PCC", "at least", "rel. L2", "at most", "gain − 1"]
    columns += ["at most", "max abs", "reference\nms", "candidate\nms", "outcome"]
    table("", columns, rows, left=3)
    for fault in dict.fromkeys(row.comparison.fault for row in result.rows if not row.passed):
        places = [
            f"{row.name} ({row.case})" for row in result.rows if row.comparison.fault == fault
        ]
        if fault is not None:
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            print_line(f"{fault}: {places[0]}{more}")
