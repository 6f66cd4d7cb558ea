"""The plot of an action chunk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pi0.errors import Pi0Error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COLUMNS = 4


def require_matplotlib() -> None:
    """Raises Pi0Error if matplotlib is not installed: before the work, not after it."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise Pi0Error(
            "--plot: expected matplotlib, found none. Install it: pip install 'pi0[plot]'."
        )


def plot_chunk(path: Path, actions: NDArray[np.float32], prompt: str) -> None:
    """Writes a PNG with one panel for each column of actions [H, D]."""
    from matplotlib.figure import Figure

    horizon, width = actions.shape
    columns = min(COLUMNS, width)
    rows = -(-width // columns)
    figure = Figure(figsize=(2.6 * columns, 1.7 * rows + 0.5), layout="constrained")
    figure.suptitle(f"“{prompt}”: {horizon} actions", fontsize=11)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flat
    for joint, panel in enumerate(panels):
        if joint >= width:
            panel.set_visible(False)
            continue
        panel.plot(actions[:, joint], color="#2b6cb0", linewidth=1.4)
        panel.set_title(f"action {joint}", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
        panel.margins(x=0)
    for panel in figure.axes[-columns:]:
        panel.set_xlabel("step", fontsize=8)
    figure.savefig(path, format="png", dpi=120)
