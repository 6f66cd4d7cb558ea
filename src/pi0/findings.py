"""Findings: what does not fit or had to be assumed between checkpoint, robot and engine.

There is one form for all of them: `Policy` raises the errors and warns of the rest, `pi0 inspect`
prints both. Codes are stable, so that scripts can look for them; sentences may change.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pi0.errors import Pi0Error

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that a user should know before a robot moves.

    Attributes:
        severity: "error": the policy cannot be used so; "warning": it can, on an assumption.
        code: a stable name in kebab-case, such as "horizon-assumed".
        sentence: what was expected, what was found, and how to mend it.
    """

    severity: Severity
    code: str
    sentence: str


def error(code: str, sentence: str) -> Finding:
    """A finding with which the policy cannot be used."""
    return Finding("error", code, sentence)


def warning(code: str, sentence: str) -> Finding:
    """A finding that a user should see, with which the policy can be used."""
    return Finding("warning", code, sentence)


def enforce(findings: Iterable[Finding]) -> None:
    """Warns of every warning, then raises all errors as one.

    Raises:
        Pi0Error: at least one finding is an error.
    """
    findings = list(findings)
    for finding in findings:
        if finding.severity == "warning":
            warnings.warn(finding.sentence, stacklevel=3)
    errors = [finding.sentence for finding in findings if finding.severity == "error"]
    if errors:
        raise Pi0Error("\n".join(errors))
