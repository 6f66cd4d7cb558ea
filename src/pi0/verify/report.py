"""The result of a verification as plain data, and as an HTML page that needs nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi0.errors import Pi0Error, install_hint
from pi0.verify import plots
from pi0.verify.action_plots import plot_differences, plot_largest_deviations
from pi0.verify.error_axis import case_styles
from pi0.verify.rows import Row
from pi0.verify.run import VerifyResult
from pi0.verify.thresholds import CHAINED, ISOLATED, OPERATIONS, ORACLE, STRUCTURE

SECTIONS = (
    (
        "Same computation",
        "The candidate's code in a precision that rounds nothing: each stage and block on the "
        "reference's input, its own loop, and operations that only its own precision has.",
        (STRUCTURE, OPERATIONS),
    ),
    (
        "Rounding of each stage",
        "The candidate, each stage and block on the reference's input.",
        (ISOLATED,),
    ),
    (
        "Rounding from end to end",
        "The candidate on its own results, so that errors add up; actions and sample relative to "
        "what the model moved, actions less noise.",
        (CHAINED, ORACLE),
    ),
)
SIGNS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚"}  # of matplotlib's markers


@dataclass(frozen=True)
class Header:
    """What was compared: the lines above a report."""

    checkpoint: str
    reference: str
    candidate: str
    mode: str
    sizes: str
    oracle: str  # the independent implementation, or why there is none
    note: str  # what the numbers are not; may be empty
    judged: bool  # whether an implementation that we did not write is among those compared

    @property
    def time_columns(self) -> tuple[str, str]:
        """Names of the columns of milliseconds, which differ even if an engine meets itself."""
        if self.reference == self.candidate:
            return f"ms {self.reference} (reference)", f"ms {self.candidate} (candidate)"
        return f"ms {self.reference}", f"ms {self.candidate}"


def outcome(row: Row) -> str:
    """One word or a few: within its limits, or which of them it exceeds."""
    if row.passed:
        return "ok"
    c = row.comparison
    if c.fault is not None:
        return "FAILS"
    exceeded = [
        ("PCC", c.pcc >= row.limit.min_pcc),
        ("L2", c.rel_l2 <= row.limit.max_rel_l2),
        ("gain", abs(c.gain_error) <= row.limit.max_gain_error),
    ]
    return f"FAILS {' and '.join(name for name, within in exceeded if not within)}"


def verdict(header: Header, result: VerifyResult) -> str:
    """The outcome in one sentence, with the numbers of the first failure."""
    failure = result.first_failure
    judge = "" if header.judged else "; no independent implementation was compared"
    if failure is None:
        return f"agree: all {len(result.rows)} comparisons are within their limits{judge}"
    sentence = f"{_first_failure(failure)}{judge}"
    if (failure.comparison.fault or "").startswith("reference has"):
        return f"{sentence}. The reference itself is not finite: the checkpoint is damaged."
    return sentence


def part_verdicts(header: Header, result: VerifyResult) -> list[str]:
    """Whether the computation is the same, and whether rounding is within its limits; of both, a
    sentence each."""
    tested = result.structure
    sentences = [
        "same computation: not tested apart from rounding, because "
        f"{header.candidate} names no engine that runs its code without"
    ]
    if tested is not None:
        found = _part(result, (STRUCTURE, OPERATIONS))
        sentences = [f"same computation ({tested}, each stage on the reference's input): {found}"]
    return [*sentences, f"rounding of {header.candidate}: {_part(result, (ISOLATED, CHAINED))}"]


def worst_of_blocks(rows: Sequence[Row]) -> list[Row]:
    """Of rows that differ in the number of a block only, the one nearest to its limit, in the place
    of the first; of the part that tests the computation, the worst of all cases."""
    worst: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        name = re.sub(r"\.block\.\d+", ".block", row.name)
        key = row.part, "" if row.part in (STRUCTURE, OPERATIONS) else row.case, name
        if key not in worst or row.share_of_limit > worst[key].share_of_limit:
            worst[key] = row
    return list(worst.values())


def _part(result: VerifyResult, parts: tuple[str, ...]) -> str:
    rows = [row for row in result.rows if row.part in parts]
    failure = next((row for row in rows if not row.passed), None)
    if failure is None:
        return f"all {len(rows)} comparisons are within their limits"
    return _first_failure(failure)


def _first_failure(row: Row) -> str:
    return f"FAILS first at {row.name} ({row.case}): {' and '.join(row.exceeded)}"


def to_data(header: Header, result: VerifyResult) -> dict[str, Any]:
    """Everything but the actions, as plain data."""
    failure = result.first_failure
    return {
        **asdict(header),
        "passed": failure is None,
        "verdict": verdict(header, result),
        "verdicts": part_verdicts(header, result),
        "not_shown": result.missing,
        "first_failure": None if failure is None else f"{failure.name} ({failure.case})",
        "rows": [
            {
                "part": row.part,
                "case": row.case,
                "stage": row.name,
                **asdict(row.comparison),
                "min_pcc": row.limit.min_pcc,
                "max_rel_l2": _finite(row.limit.max_rel_l2),
                "max_gain_error": _finite(row.limit.max_gain_error),
                "why": row.limit.why,
                "reference_ms": row.reference_ms,
                "candidate_ms": row.candidate_ms,
                "passed": row.passed,
                "outcome": outcome(row),
            }
            for row in result.rows
        ],
        "rms_of_reference_actions": {
            case: float(a.double().square().mean().sqrt())
            for case, (a, _) in result.actions.items()
        },
        "largest_deviation_per_joint": {
            case: (a - b).abs().amax(dim=(0, 1)).tolist() for case, (a, b) in result.actions.items()
        },
    }


def _finite(limit: float) -> float | None:
    """None for no limit, which JSON has no number for."""
    return limit if math.isfinite(limit) else None


def require_report_libraries() -> None:
    """Raises Pi0Error if what a report needs is not installed: before the work, not after it."""
    import importlib.util

    if not all(importlib.util.find_spec(name) for name in ("jinja2", "matplotlib")):
        raise Pi0Error(
            "--report: expected jinja2 and matplotlib, found one of them missing. "
            + install_hint("report")
        )


@dataclass(frozen=True)
class PartFigures:
    """A section of the page: its figures as SVG, None where there is nothing to draw."""

    title: str
    note: str
    stages: str
    blocks: str | None
    velocities: str | None

    @classmethod
    def of(cls, title: str, note: str, rows: Sequence[Row], name: str) -> PartFigures:
        from pi0.figures import to_svg

        figures = (
            plots.plot_stages(worst_of_blocks(rows)),
            plots.plot_blocks(rows),
            plots.plot_velocities(rows),
        )
        kinds = ("stages", "blocks", "velocities")
        first, *others = (
            to_svg(figure, f"{name}-{kind}") if figure else None
            for figure, kind in zip(figures, kinds, strict=True)
        )
        return cls(title, note, first or "", *others)


def to_html(header: Header, result: VerifyResult) -> str:
    """A self-contained page: verdict, figures as inline SVG, and every row."""
    from jinja2 import Environment

    from pi0.figures import to_svg

    styles = case_styles(result.rows)
    sections = []
    for title, note, keys in SECTIONS:
        rows = [row for row in result.rows if row.part in keys]
        if rows:
            sections.append(PartFigures.of(title, note, rows, keys[0]))
    template = (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            data=to_data(header, result),
            times=header.time_columns,
            cases=[(case, style.colour, SIGNS[style.marker]) for case, style in styles.items()],
            sections=sections,
            differences=to_svg(plot_differences(result.actions, styles), "differences"),
            deviations=to_svg(plot_largest_deviations(result.actions, styles), "deviations"),
        )
    )
