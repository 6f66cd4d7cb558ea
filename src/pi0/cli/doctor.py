"""`pi0 doctor`: what users get wrong, found without running the model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pi0.cli import options

if TYPE_CHECKING:
    from pi0.checkpoint.load import Checkpoint
    from pi0.findings import Finding
    from pi0.policy import PolicyOptions

COLOURS = {"error": "bold red", "warning": "yellow"}


@options.with_policy
def doctor(
    checkpoint: options.Checkpoint,
    wishes: options.PolicyOptions,
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
    base: options.Base = None,
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Read headers and small files only.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Look for what may be wrong with a checkpoint, without running the model.

    Statistics, tokenizer, cameras, horizon, conventions, dtypes, weights that are not finite or
    constant, adapters, files of another origin: each finding is a sentence with its remedy and a
    stable code. Takes what `pi0 act` takes for pre- and post-processing. Exit code 1 if a finding
    is an error.

    **Examples**

        pi0 doctor pi0_base
        pi0 doctor pi0_libero --robot libero --no-weights
        pi0 doctor my_adapter --base pi0_base --json
    """
    from pi0.checkpoint.load import open_checkpoint
    from pi0.errors import ConfigError
    from pi0.findings import error

    try:
        opened = open_checkpoint(checkpoint, horizon, max_tokens, base)
    except ConfigError as contradiction:
        if horizon or max_tokens or base:  # what was named may be what is wrong
            raise
        findings = [error("config-contradicts", str(contradiction))]
    else:
        findings = _examine(opened, wishes, no_weights)
    findings.sort(key=lambda finding: finding.severity)  # errors first
    _show(str(checkpoint), findings, as_json)
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(1)


def _examine(opened: Checkpoint, wishes: PolicyOptions, no_weights: bool) -> list[Finding]:
    from pi0.checkpoint.health import header_findings, weight_findings
    from pi0.cli.show import byte_progress
    from pi0.policy import prepare
    from pi0.policy.examine import placeholder_findings

    setup = prepare(opened, wishes)
    findings = [*header_findings(opened), *setup.findings, *placeholder_findings(setup)]
    if not no_weights:
        with byte_progress("reading", opened.read_bytes) as progress:
            findings += weight_findings(opened, progress)
    return findings


def _show(path: str, findings: list[Finding], as_json: bool) -> None:
    from rich.text import Text

    from pi0.cli.show import count, print_json, print_line, table

    errors = sum(finding.severity == "error" for finding in findings)
    warnings = len(findings) - errors
    if as_json:
        data = {"checkpoint": path, "errors": errors, "warnings": warnings}
        print_json(data | {"findings": [asdict(finding) for finding in findings]})
        return
    if findings:
        rows: list[list[str | Text]] = [
            [Text(f.severity, COLOURS[f.severity]), f.code, f.sentence] for f in findings
        ]
        table("", ["", "code", "finding"], rows, left=3)
    print_line(f"{path}: {count(errors, 'error')}, {count(warnings, 'warning')}")
