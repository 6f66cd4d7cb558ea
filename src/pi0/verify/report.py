"""The result of a verification as plain data, and as an HTML page that needs nothing else."""

from __future__ import annotations

import io
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi0.errors import Pi0Error
from pi0.verify.run import Row, VerifyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCE, CANDIDATE, LIMIT = "#4a5568", "#2b6cb0", "#c53030"
JOINTS_SHOWN = 8
LEAST = 1e-9  # where an error of 0 stands on a logarithmic axis


@dataclass(frozen=True)
class Header:
    """What was compared: the words above a report."""

    checkpoint: str
    reference: str
    candidate: str
    mode: str
    sizes: str
    oracle: str  # the third engine, or why there is none
    note: str  # what the numbers are not; may be empty


def to_data(header: Header, result: VerifyResult) -> dict[str, Any]:
    """Everything but the actions, as plain data."""
    failure = result.first_failure
    return {
        **asdict(header),
        "passed": failure is None,
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
            }
            for row in result.rows
        ],
        "largest_deviation_per_joint": {
            case: (a - b).abs().amax(dim=(0, 1)).tolist() for case, (a, b) in result.actions.items()
        },
    }


def require_report_libraries() -> None:
    """Raises Pi0Error if what a report needs is not installed: before the work, not after it."""
    import importlib.util

    if not all(importlib.util.find_spec(name) for name in ("jinja2", "matplotlib")):
        raise Pi0Error(
            "--report: expected jinja2 and matplotlib, found one of them missing. Install them: "
            "pip install 'pi0[report]'."
        )


def to_html(header: Header, result: VerifyResult) -> str:
    """A self-contained page: verdict, plots as inline SVG, and every row."""
    from jinja2 import Environment

    template = (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            data=to_data(header, result),
            stages=_svg(_plot_rows("error of each stage", _stage_rows(result))),
            blocks=_svg(_plot_blocks(result)) if _block_rows(result) else None,
            actions=_svg(_plot_actions(result)),
            joints=_svg(_plot_joints(result)),
        )
    )


def _stage_rows(result: VerifyResult) -> list[Row]:
    return [row for row in result.rows if "." not in row.name]


def _block_rows(result: VerifyResult) -> list[Row]:
    return [row for row in result.rows if re.search(r"\.block\.\d+$", row.name)]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plot_rows(title: str, rows: list[Row]) -> Figure:
    """Relative L2 error by stage, one mark a case, with the limit of each stage."""
    figure = _figure(9, 3.4)
    axes = figure.subplots()
    names = list(dict.fromkeys(row.name for row in rows))
    for case, marker in zip(dict.fromkeys(row.case for row in rows), "osD^v", strict=False):
        mine = [row for row in rows if row.case == case]
        places = [names.index(row.name) for row in mine]
        axes.plot(places, [_shown(row) for row in mine], marker, color=CANDIDATE, label=case)
        axes.plot(
            places, [max(row.limit.max_rel_l2, LEAST) for row in mine], "_", color=LIMIT, ms=18
        )
    _label(axes, title)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.legend()
    return figure


def _plot_blocks(result: VerifyResult) -> Figure:
    """Growth of the error through the depth of the three towers."""
    rows = _block_rows(result)
    towers = list(dict.fromkeys(row.name.partition(".")[0] for row in rows))
    figure = _figure(3.2 * len(towers), 3)
    panels = figure.subplots(1, len(towers), sharey=True, squeeze=False)[0]
    for tower, axes in zip(towers, panels, strict=True):
        for case, style in zip(
            dict.fromkeys(row.case for row in rows), ("-", "--", ":"), strict=False
        ):
            mine = [r for r in rows if r.case == case and r.name.startswith(tower)]
            axes.plot([_shown(row) for row in mine], style, color=CANDIDATE, label=case)
            axes.plot([max(1 - row.comparison.pcc, LEAST) for row in mine], style, color=REFERENCE)
        _label(axes, tower)
        axes.set_xlabel("block")
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].legend()
    figure.suptitle("relative L2 error (blue) and 1 - PCC (grey) by block", fontsize=10)
    return figure


def _plot_actions(result: VerifyResult) -> Figure:
    """The chunks of both engines, joint by joint, of the first case."""
    a, b = next(iter(result.actions.values()))
    figure = _figure(9, 4)
    panels = figure.subplots(2, JOINTS_SHOWN // 2, sharex=True).flat
    for joint, axes in zip(range(min(JOINTS_SHOWN, a.shape[-1])), panels, strict=False):
        axes.plot(a[0, :, joint], color=REFERENCE, linewidth=2.4, alpha=0.5)
        axes.plot(b[0, :, joint], color=CANDIDATE, linewidth=1, linestyle="--")
        axes.set_title(f"action {joint}", fontsize=9)
        axes.tick_params(labelsize=8)
    return figure


def _plot_joints(result: VerifyResult) -> Figure:
    """Bars side by side, one colour a case."""
    figure = _figure(9, 2)
    axes = figure.subplots()
    width = 0.8 / len(result.actions)
    for i, (case, (a, b)) in enumerate(result.actions.items()):
        deviations = (a - b).abs().amax(dim=(0, 1)).tolist()
        places = [joint + (i + 0.5) * width - 0.4 for joint in range(len(deviations))]
        colour = (CANDIDATE, REFERENCE, LIMIT)[i % 3]
        axes.bar(places, deviations, width, color=colour, label=case)
    axes.set_xlabel("action")
    axes.grid(axis="y", alpha=0.25)
    axes.margins(x=0.01)
    figure.legend(loc="outside right upper")
    return figure


def _shown(row: Row) -> float:
    error = row.comparison.rel_l2
    return max(error, LEAST) if math.isfinite(error) else 1.0


def _label(axes: Axes, title: str) -> None:
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_ylabel("relative L2 error")
    axes.grid(alpha=0.25)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    # Neither a date nor random ids: the same result gives the same page.
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "pi0"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
