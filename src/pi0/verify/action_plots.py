"""Figures of the actions of two engines: where over the chunk, and in which joints, they differ."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pi0.figures import MUTED, RED, bare, new_figure
from pi0.verify.error_axis import NO_NUMBER, Style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    Actions = dict[str, tuple[Tensor, Tensor]]  # by case: reference and candidate, [B, H, D]

JOINTS_SHOWN = 8


def plot_differences(actions: Actions, styles: dict[str, Style]) -> Figure:
    """Candidate minus reference over the chunk, of the actions that deviate most in any case."""
    differences = {case: (b - a).double() for case, (a, b) in actions.items()}
    sizes = [
        d.abs().amax(dim=(0, 1)).nan_to_num(nan=math.inf).tolist() for d in differences.values()
    ]
    worst = [max(of_joint) for of_joint in zip(*sizes, strict=True)]
    joints = sorted(sorted(range(len(worst)), key=lambda j: -worst[j])[:JOINTS_SHOWN])
    columns = min(4, len(joints))
    figure = new_figure(max(5.0, 2.4 * columns), 2.1 * -(-len(joints) // columns) + 0.3)
    panels = figure.subplots(
        -(-len(joints) // columns), columns, sharey=True, sharex=True, squeeze=False
    )
    largest = max(
        (float(d[d.isfinite()].abs().max()) for d in differences.values() if d.isfinite().any()),
        default=0.0,
    )
    for place, axes in enumerate(panels.flat):
        if place >= len(joints):
            axes.set_visible(False)
            continue
        for case, difference in differences.items():
            values = difference[:, :, joints[place]].T.numpy()
            axes.plot(values, color=styles[case].colour, linewidth=1.2)
            if not difference[:, :, joints[place]].isfinite().all():
                axes.set_title(NO_NUMBER, loc="right", fontsize=8, color=RED)
        axes.axhline(0, color=MUTED, linewidth=0.6)
        axes.set_title(f"action {joints[place]}", loc="left", fontsize=9)
        axes.set_ylim(-1.1 * (largest or 1.0), 1.1 * (largest or 1.0))
        axes.set_xlim(-0.5, difference.shape[1] - 0.5)
        bare(axes)
        if place >= len(joints) - columns:
            axes.set_xlabel("action of the chunk", fontsize=8)
            axes.tick_params(labelbottom=True)
    figure.supylabel("candidate − reference", fontsize=9)
    return figure


def plot_largest_deviations(actions: Actions, styles: dict[str, Style]) -> Figure:
    """Bars side by side: the largest deviation of each action, by case; a cross for no number."""
    figure = new_figure(9, 2.4)
    axes = figure.subplots()
    width = 0.8 / len(actions)
    for i, (case, (a, b)) in enumerate(actions.items()):
        deviations = (a - b).abs().amax(dim=(0, 1)).tolist()
        places = [joint + (i + 0.5) * width - 0.4 for joint in range(len(deviations))]
        heights = [value if math.isfinite(value) else 0.0 for value in deviations]
        axes.bar(places, heights, width, color=styles[case].colour)
        lost = [x for x, value in zip(places, deviations, strict=True) if not math.isfinite(value)]
        axes.plot(lost, [0.0] * len(lost), "X", color=RED, clip_on=False)
    axes.set_xlabel("action", fontsize=9)
    axes.set_ylabel("largest deviation", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    bare(axes, "y")
    return figure
