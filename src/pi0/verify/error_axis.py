"""The axis on which errors stand beside their limits, and the marks on it.

Cases differ in colour, marker and place; what is beyond its limit is red and has both numbers. An
error of 0 and a comparison without a number (NaN, a constant) have rows of their own below and
above the logarithmic axis, so that they neither stretch it nor look like errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pi0.figures import INK, MUTED, RED, SERIES, bare
from pi0.verify.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "D", "^", "v", "P")
NO_NUMBER = "no number"


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str


@dataclass(frozen=True)
class Metric:
    """A measure of error that has a limit: what both are, and how both are written.

    `rounding`: errors up to it are drawn as 0.
    """

    label: str
    rounding: float
    error: Callable[[Row], float]
    limit: Callable[[Row], float]
    exceeded: Callable[[Row], bool]
    numbers: Callable[[Row], str]


REL_L2 = Metric(
    "relative L2 error",
    0.0,  # a single bit counts
    error=lambda row: row.comparison.rel_l2,
    limit=lambda row: row.limit.max_rel_l2,
    exceeded=lambda row: not row.comparison.rel_l2 <= row.limit.max_rel_l2,
    numbers=lambda row: f"{row.comparison.rel_l2:.1e}\n> {row.limit.max_rel_l2:.0e}",
)
PCC = Metric(
    "1 − PCC",
    1e-9,  # far below every limit; PCC of equal tensors is not exactly 1
    error=lambda row: 1 - row.comparison.pcc,
    limit=lambda row: 1 - row.limit.min_pcc,
    exceeded=lambda row: not row.comparison.pcc >= row.limit.min_pcc,
    numbers=lambda row: f"{row.comparison.pcc:.6f}\n< {row.limit.min_pcc:g}",
)
GAIN = Metric(
    "|gain − 1|",
    1e-12,  # of sums in float64
    error=lambda row: abs(row.comparison.gain_error),
    limit=lambda row: row.limit.max_gain_error,
    exceeded=lambda row: not abs(row.comparison.gain_error) <= row.limit.max_gain_error,
    numbers=lambda row: f"{abs(row.comparison.gain_error):.1e}\n> {row.limit.max_gain_error:.0e}",
)
METRICS = (REL_L2, PCC, GAIN)


@dataclass(frozen=True)
class ErrorAxis:
    """A logarithmic y axis from `low` to `high`, with a row for 0 below and one for what has no
    number above, where they are needed."""

    rounding: float
    low: float
    high: float
    has_zero: bool
    has_fault: bool

    @classmethod
    def of(cls, values: Sequence[float], rounding: float = 0.0) -> ErrorAxis:
        shown = [value for value in values if math.isfinite(value) and value > rounding]
        low = 10.0 ** math.floor(math.log10(min(shown, default=1e-6)))
        high = 10.0 ** math.ceil(math.log10(max(shown, default=1e-6)) + 0.4)
        zero = any(value <= rounding for value in values)
        return cls(rounding, low, high, zero, not all(map(math.isfinite, values)))

    def place(self, value: float) -> float:
        """Where a value is drawn."""
        step = 1.5 * math.exp(0.12 * math.log(self.high / self.low))
        if not math.isfinite(value):
            return self.high * step
        return value if value > self.rounding else self.low / step

    def apply(self, axes: Axes) -> None:
        """Scale, ticks, and a line where the axis is broken."""
        axes.set_yscale("log")
        bottom, top = (self.place(0.0) if self.has_zero else self.low), self.high
        top = self.place(math.nan) if self.has_fault else top
        margin = (top / bottom) ** 0.06
        axes.set_ylim(bottom / margin, top * margin)
        decades = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
        ticks = [10.0**n for n in decades[:: -(-len(decades) // 7)]]
        labels = [f"{tick:.0e}" for tick in ticks]
        for wanted, value, label in (
            (self.has_zero, 0.0, "0"),
            (self.has_fault, math.nan, NO_NUMBER),
        ):
            if wanted:
                place = self.place(value)
                ticks.append(place)
                labels.append(label)
                axes.axhline(
                    math.sqrt(place * (self.high if place > self.high else self.low)),
                    color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)),
                )  # fmt: skip
        axes.set_yticks(ticks, labels)
        axes.minorticks_off()


def case_styles(rows: Sequence[Row]) -> dict[str, Style]:
    """Colour and marker of each case."""
    cases = dict.fromkeys(row.case for row in rows)
    n = len(MARKERS)
    return {
        case: Style(SERIES[(i + i // n) % len(SERIES)], MARKERS[i % n])
        for i, case in enumerate(cases)
    }


def error_axis(rows: Sequence[Row], metric: Metric) -> ErrorAxis:
    """The axis that holds errors and limits of these rows."""
    values = [metric.error(row) for row in rows]
    values += [limit for row in rows if math.isfinite(limit := metric.limit(row))]
    return ErrorAxis.of(values, metric.rounding)


def offset(index: int, count: int) -> float:
    """How far a case is drawn beside the middle."""
    return 0.5 * ((index + 0.5) / count - 0.5)


def draw_marks(
    axes: Axes,
    axis: ErrorAxis,
    metric: Metric,
    points: Sequence[tuple[float, Row]],
    style: Style,
    size: float = 5,
) -> None:
    """Marks of one case at (x, row): red beyond the limit, a cross for no number."""
    kinds = {(metric.exceeded(row), math.isfinite(metric.error(row))) for _, row in points}
    for failed, finite in sorted(kinds):
        mine = [
            (x, axis.place(metric.error(row)))
            for x, row in points
            if (metric.exceeded(row), math.isfinite(metric.error(row))) == (failed, finite)
        ]
        axes.plot(
            *zip(*mine, strict=True),
            style.marker if finite else "X",
            color=RED if failed else style.colour,
            markeredgecolor=INK if failed else style.colour,
            markersize=size + failed,
            linestyle="none",
            zorder=3,
        )


def draw_lines(
    axes: Axes,
    axis: ErrorAxis,
    metric: Metric,
    rows: Sequence[Row],
    x: Callable[[Row], int],
    styles: dict[str, Style],
    dashes: str,
    label: str,
) -> None:
    """A line for each case, its marks, and the limits."""
    from matplotlib.ticker import MaxNLocator

    for i, (case, style) in enumerate(styles.items()):
        mine = sorted((row for row in rows if row.case == case), key=x)
        shift = 0.3 * offset(i, len(styles))
        places = [x(row) + shift for row in mine]
        errors = [axis.place(metric.error(row)) for row in mine]
        axes.plot(places, errors, dashes, color=style.colour, linewidth=1.1, alpha=0.7)
        draw_marks(axes, axis, metric, list(zip(places, mine, strict=True)), style, 3.5)
    if rows:
        ends = sorted({x(row) for row in rows})
        for limit in {metric.limit(row) for row in rows if math.isfinite(metric.limit(row))}:
            y = axis.place(limit)
            axes.hlines(
                y, ends[0] - 0.4, ends[-1] + 0.4, color=RED, linewidth=1.2, linestyle=dashes
            )
        axes.plot([], [], dashes, color=INK, linewidth=1.1, label=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def annotate_worst(
    axes: Axes,
    axis: ErrorAxis,
    metric: Metric,
    place: float | None,
    rows: Sequence[Row],
    x: Callable[[Row], float] = lambda row: 0.0,
) -> None:
    """Error and limit of the worst of these rows that failed, at a place or at its own."""
    failed = [row for row in rows if metric.exceeded(row)]
    numbers = [row for row in failed if math.isfinite(metric.error(row))]
    if not failed or not numbers:
        return
    worst = max(numbers, key=metric.error)
    axes.annotate(
        metric.numbers(worst),
        (x(worst) if place is None else place, axis.place(metric.error(worst))),
        (0, 6),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=7,
        color=RED,
        zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
    )


def finish_axes(axes: Axes, axis: ErrorAxis, metric: Metric) -> None:
    axis.apply(axes)
    axes.set_ylabel(metric.label, fontsize=9)
    bare(axes)


def line_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    limit: Any = axes.plot([], [], "-", color=RED, linewidth=1.2)[0]
    figure.legend(
        [*handles, limit], [*labels, "limit"],
        loc="outside lower center", ncols=4, frameon=False, fontsize=8,
    )  # fmt: skip
