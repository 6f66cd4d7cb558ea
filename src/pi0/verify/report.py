"""The result of a verification as plain data, and as an HTML page that needs nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi0.errors import Pi0Error, install_hint
from pi0.verify import plots
from pi0.verify.run import Row, VerifyResult

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
    exceeded = [("PCC", c.pcc >= row.limit.min_pcc), ("L2", c.rel_l2 <= row.limit.max_rel_l2)]
    return f"FAILS {' and '.join(name for name, within in exceeded if not within)}"


def verdict(header: Header, result: VerifyResult) -> str:
    """The outcome in one sentence, with the numbers of the first failure."""
    failure = result.first_failure
    if failure is None:
        judge = "" if header.judged else "; no independent implementation was compared"
        return f"agree: all {len(result.rows)} comparisons are within their limits{judge}"
    sentence = f"FAILS first at {failure.name} ({failure.case}): {' and '.join(failure.exceeded)}"
    if (failure.comparison.fault or "").startswith("reference has"):
        return f"{sentence}. The reference itself is not finite: the checkpoint is damaged."
    return sentence


def to_data(header: Header, result: VerifyResult) -> dict[str, Any]:
    """Everything but the actions, as plain data."""
    failure = result.first_failure
    return {
        **asdict(header),
        "passed": failure is None,
        "verdict": verdict(header, result),
        "not_shown": result.missing,
        "first_failure": None if failure is None else f"{failure.name} ({failure.case})",
        "rows": [
            {
                "case": row.case,
                "stage": row.name,
                **asdict(row.comparison),
                "min_pcc": row.limit.min_pcc,
                "max_rel_l2": row.limit.max_rel_l2,
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


def require_report_libraries() -> None:
    """Raises Pi0Error if what a report needs is not installed: before the work, not after it."""
    import importlib.util

    if not all(importlib.util.find_spec(name) for name in ("jinja2", "matplotlib")):
        raise Pi0Error(
            "--report: expected jinja2 and matplotlib, found one of them missing. "
            + install_hint("report")
        )


def to_html(header: Header, result: VerifyResult) -> str:
    """A self-contained page: verdict, figures as inline SVG, and every row."""
    from jinja2 import Environment

    from pi0.figures import to_svg

    styles = plots.case_styles(result.rows)
    blocks = plots.plot_blocks(result.rows)
    template = (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            data=to_data(header, result),
            times=header.time_columns,
            cases=[(case, style.colour, SIGNS[style.marker]) for case, style in styles.items()],
            stages=to_svg(plots.plot_stages(result.rows), "stages"),
            blocks=to_svg(blocks, "blocks") if blocks else None,
            velocities=to_svg(plots.plot_velocities(result.rows), "velocities"),
            differences=to_svg(plots.plot_differences(result.actions, styles), "differences"),
            deviations=to_svg(plots.plot_largest_deviations(result.actions, styles), "deviations"),
        )
    )
