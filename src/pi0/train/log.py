"""What a run tells while it runs: a line of JSON for every interval, a plot, TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pi0.checkpoint.outputs import replacing
from pi0.errors import Pi0Error

LOG, PLOT, TENSORBOARD = "log.jsonl", "loss.png", "tensorboard"
NOT_LOSSES = ("step", "learning_rate", "gradient_norm", "samples_per_second", "seconds")

Entry = dict[str, float]


class TrainingLog:
    """Means over intervals of steps, in `log.jsonl` of a folder.

    Args:
        done: steps taken before; what the file says of later ones is dropped.
        batch_size: of all processes.
    """

    def __init__(self, folder: Path, done: int, batch_size: int) -> None:
        self.folder, self.batch_size = folder, batch_size
        self.entries: list[Entry] = []
        path = folder / LOG
        if done and path.is_file():
            self.entries = [e for e in read_log(path) if e["step"] <= done]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(e) + "\n" for e in self.entries))
        self._before = self.entries[-1]["seconds"] if self.entries else 0.0
        self._start = self._last = time.monotonic()
        self._sums: Entry = {}
        self._steps = 0
        self._board = _tensorboard(folder / TENSORBOARD, done)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Takes in what a step returned."""
        self._steps += 1
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def write(self, step: int) -> Entry:
        """Writes the means since the last call; `step` steps were taken by now."""
        now = time.monotonic()
        entry: Entry = {"step": step}
        entry |= {name: value / self._steps for name, value in self._sums.items()}
        entry["samples_per_second"] = self._steps * self.batch_size / (now - self._last)
        entry["seconds"] = self._before + now - self._start
        self._last, self._steps, self._sums = now, 0, {}
        self.entries.append(entry)
        with open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self._board is not None:
            for name, value in entry.items():
                if name != "step":
                    self._board.add_scalar(name, value, step)
        return entry

    def plot(self) -> None:
        """Draws the losses over the steps, if matplotlib is installed and there is something."""
        if not self.entries:
            return
        try:
            figure = plot_losses(self.entries)
        except ImportError:
            return
        with replacing(self.folder / PLOT) as temporary:
            figure.savefig(temporary, format="png", dpi=120)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def describe(entry: Entry, steps: int) -> str:
    """An entry as a line of text, of a run of `steps` steps."""
    losses = {n: v for n, v in entry.items() if n not in (*NOT_LOSSES, "total")}
    words = [f"{name} {value:.4f}" for name, value in losses.items()]
    return (
        f"step {entry['step']:.0f} of {steps}: loss {', '.join(words)}; gradient norm "
        f"{entry['gradient_norm']:.2f}; learning rate {entry['learning_rate']:.2e}; "
        f"{entry['samples_per_second']:.1f} samples/s"
    )


def read_log(path: Path) -> list[Entry]:
    """The entries of a log file.

    Raises:
        Pi0Error: a line is damaged.
    """
    entries = []
    # What follows the last end of a line is what a process that was killed had begun.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            entries.append({str(name): float(value) for name, value in json.loads(line).items()})
        except (ValueError, AttributeError, TypeError) as error:
            raise Pi0Error(
                f"{path}: line {number}: expected a line of a log, found {error}."
            ) from error
    return entries


def plot_losses(entries: list[Entry]) -> Any:
    """Losses over steps on a logarithmic scale, and the learning rate below: a figure."""
    from pi0.figures import MUTED, SERIES, bare, new_figure

    figure = new_figure(7, 4.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps = [entry["step"] for entry in entries]
    names = [name for name in entries[-1] if name not in (*NOT_LOSSES, "total")]
    for name, colour in zip(names, SERIES * len(names), strict=False):
        values = [entry.get(name, float("nan")) for entry in entries]
        mark = "." if len(steps) == 1 else None  # a line of one point is not seen
        upper.plot(steps, values, color=colour, label=name, linewidth=1.2, marker=mark)
    upper.set_yscale("log")
    upper.set_ylabel("loss")
    upper.legend(frameon=False, fontsize=8)
    lower.plot(steps, [entry["learning_rate"] for entry in entries], color=MUTED, linewidth=1.2)
    lower.set_ylabel("learning rate", fontsize=8)
    lower.set_xlabel("step")
    for axes in (upper, lower):
        bare(axes)
    return figure


def _tensorboard(folder: Path, done: int) -> Any:
    """TensorBoard's writer; None: it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=done or None)
