"""The plot of an action chunk: one panel for each action, in the robot's names and units."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pi0.errors import Pi0Error, install_hint
from pi0.figures import BLUE, INK, MUTED, RED, VERBATIM, bare, lettering, new_figure, wrapped

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Limits = tuple[float | None, float | None]  # least and greatest; None: no limit

PANEL_WIDTH, PANEL_HEIGHT = 2.6, 1.8  # inches
FLAT = 1e-6  # a column that moves less than this, relative to its size, is constant


def require_matplotlib() -> None:
    """Raises Pi0Error if matplotlib is not installed: before the work, not after it."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise Pi0Error(f"--plot: expected matplotlib, found none. {install_hint('plot')}")


def plot_chunk(
    path: Path,
    actions: NDArray[np.float32],
    prompt: str,
    *,
    names: Sequence[str] | None = None,
    units: Sequence[str | None] | None = None,
    limits: Sequence[Limits | None] | None = None,
    rate_hz: float | None = None,
) -> None:
    """Writes a PNG with one panel for each column of actions [H, D].

    Columns without a name that stay constant (padding of the model, for instance) get no panel; a
    line of text gives their values.

    Args:
        names, units, limits: of the first columns, at most D; values beyond a limit are marked.
        rate_hz: actions per second of the robot; adds an axis in seconds.
    """
    names = list(names or [])[: actions.shape[1]]
    constant = _constant_columns(actions, len(names))
    drawn = [j for j in range(actions.shape[1]) if j not in constant]
    columns = min(4 if len(drawn) <= 16 else 6, len(drawn))
    rows = -(-len(drawn) // columns)
    width = max(PANEL_WIDTH * columns, 5)
    size = int(width * 10)  # characters of a line of text
    above = wrapped(f"“{prompt}”", size, 3).splitlines() if prompt.strip() else []
    above.append(_summary(len(actions), rate_hz))
    figure = new_figure(width, PANEL_HEIGHT * rows + 0.2 * len(above) + 0.5)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False)
    letters = lettering(prompt, *names, *(unit or "" for unit in units or ()))
    for place, panel in enumerate(panels.flat):
        if place >= len(drawn):
            panel.set_visible(False)
            continue
        joint = drawn[place]
        _draw(panel, actions[:, joint], limits[joint] if limits and joint < len(limits) else None)
        title = letters.draw(_title(joint, names, units or ()))
        panel.set_title(title, fontsize=9, fontfamily=letters.families, **VERBATIM)
        if place + columns >= len(drawn):  # nothing below it
            panel.tick_params(labelbottom=True)
            panel.set_xlabel("step", fontsize=8)
        panel.xaxis.set_major_formatter(lambda step, _: _tick(step, rate_hz))
    figure.suptitle(
        letters.draw("\n".join(above)),
        fontsize=11,
        color=INK,
        fontfamily=letters.families,
        **VERBATIM,
    )
    if constant:
        footnote = textwrap.fill(_constant_line(actions, constant), int(1.5 * size))
        figure.supxlabel(footnote, x=0.01, ha="left", fontsize=8, color=MUTED)
    figure.savefig(path, format="png", dpi=120)


def _constant_columns(actions: NDArray[np.float32], named: int) -> list[int]:
    """Columns without a name that never move; none if nothing else would be left."""
    import numpy as np

    horizon, width = actions.shape
    spans, sizes = np.ptp(actions, axis=0), np.abs(actions).max(axis=0)
    constant = [j for j in range(named, width) if spans[j] <= FLAT * sizes[j]]
    # A chunk of one action moves nowhere.
    return constant if horizon > 1 and len(constant) < width else []


def _draw(panel: Axes, values: NDArray[np.float32], limits: Limits | None) -> None:
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    low, high = float(values.min()), float(values.max())
    # Rounding noise of a joint that rests is not blown up to a full panel.
    span = max(high - low, 1e-3 * max(abs(low), abs(high)), FLAT)
    middle = (low + high) / 2
    low, high = middle - 0.6 * span, middle + 0.6 * span
    panel.plot(values, "-" if len(values) > 12 else "o-", color=BLUE, linewidth=1.4, markersize=3)
    for limit, sign in zip(limits or (), (-1, 1), strict=False):
        if limit is None:
            continue
        beyond = [i for i, value in enumerate(values) if sign * (value - limit) > 0]
        panel.plot(beyond, values[beyond], "o", color=RED, markersize=4)
        if low - span <= limit <= high + span:  # farther away it would flatten the curve
            panel.axhline(limit, color=RED, linestyle="--", linewidth=1)
            low, high = min(low, limit - 0.05 * span), max(high, limit + 0.05 * span)
    panel.set_ylim(low, high)
    panel.set_xlim(*((0, len(values) - 1) if len(values) > 1 else (-1, 1)))
    panel.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    panel.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    panel.yaxis.get_offset_text().set_fontsize(7)
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    bare(panel)


def _title(joint: int, names: Sequence[str], units: Sequence[str | None]) -> str:
    name = names[joint] if joint < len(names) else f"action {joint}"
    unit = units[joint] if joint < len(units) else None
    return wrapped(f"{name} ({unit})" if unit else name, 34, 2)


def _tick(step: float, rate_hz: float | None) -> str:
    """A step, and under it the time when it is carried out."""
    return f"{step:.0f}" if rate_hz is None else f"{step:.0f}\n{step / rate_hz:.3g} s"


def _summary(horizon: int, rate_hz: float | None) -> str:
    actions = f"{horizon} action" + ("s" if horizon != 1 else "")
    return f"{actions}, {horizon / rate_hz:.3g} s at {rate_hz:g} Hz" if rate_hz else actions


def _constant_line(actions: NDArray[np.float32], constant: list[int]) -> str:
    """Runs of neighbours that have the same value, with it."""
    runs: list[tuple[int, int, float]] = []
    for j in constant:
        value = float(actions[0, j])
        if runs and runs[-1][1] == j - 1 and runs[-1][2] == value:
            runs[-1] = (runs[-1][0], j, value)
        else:
            runs.append((j, j, value))
    told = [
        (f"action {a}" if a == b else f"actions {a} to {b}") + f": {value:.4g}"
        for a, b, value in runs
    ]
    return "Constant in all steps, without a panel: " + "; ".join(told)
