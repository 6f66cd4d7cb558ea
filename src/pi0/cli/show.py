"""How things look in a terminal: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from pi0.errors import Pi0Error
from pi0.errors import human_bytes as human_bytes

PIPED_WIDTH = 160  # of tables, where there is no terminal to fit into
UNLIMITED = 10_000

READER_GONE = 141  # what a shell reports of a process that SIGPIPE ended


class _Stdout(Console):
    def on_broken_pipe(self) -> None:
        """Called by rich, which would exit with 1: the code for engines that do not agree."""
        raise BrokenPipeError


out = _Stdout(width=None if sys.stdout.isatty() else PIPED_WIDTH)
err = Console(stderr=True)


class Advance(Protocol):
    """Moves a bar by what is done, and says something else beside it."""

    def __call__(self, done: int = 1, text: str | None = None) -> None: ...


@contextlib.contextmanager
def byte_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, rate and time left; yields a function that takes bytes done."""
    with _bar(what, total, DownloadColumn(), TransferSpeedColumn()) as advance:
        yield advance


@contextlib.contextmanager
def step_progress(what: str, total: int) -> Iterator[Advance]:
    """A bar with steps done and time left; yields a function to call after each step, or with how
    many more are done, and with what is said beside the bar from then on."""
    with _bar(what, total, MofNCompleteColumn()) as advance:
        yield advance


@contextlib.contextmanager
def stage_progress(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner; yields a function that takes what is being done."""
    with err.status(what) as status:
        yield lambda stage: status.update(f"{what}: {stage}")


@contextlib.contextmanager
def _bar(what: str, total: int, *columns: ProgressColumn) -> Iterator[Advance]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as progress:
        task = progress.add_task(what, total=total)

        def advance(done: int = 1, text: str | None = None) -> None:
            progress.update(task, advance=done, description=text)

        yield advance


def print_line(sentence: str) -> None:
    """Prints a line as it is: not wrapped, no colours, no markup."""
    with _printing():
        out.print(sentence, markup=False, highlight=False, soft_wrap=True)


def table(
    title: str, columns: list[str], rows: Sequence[Sequence[str | Text]], left: int = 1
) -> None:
    """Prints a table; the first `left` columns are aligned left, the others right.

    Numbers are never cut: a table that does not fit is wider than the terminal.
    """
    grid = Table(header_style="bold", box=None, pad_edge=False)
    # As they are: a word in brackets is no markup.
    for i, column in enumerate(columns):
        grid.add_column(Text(column), justify="left" if i < left else "right", no_wrap=i >= left)
    for row in rows:
        grid.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    unlimited = out.options.update(width=UNLIMITED)
    least = Measurement.get(out, unlimited, grid).minimum
    with _printing():
        if title:
            out.print(Text(title, "table.title"), soft_wrap=True)  # it may be wider than the table
        out.print(grid, width=max(out.width, least), crop=False)
        out.print()


def print_json(value: Any) -> None:
    """Prints plain data as JSON, with escapes where stdout does not have all characters."""
    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    with _printing():
        print(to_json(value, ascii_only), flush=True)


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    """Ends the program quietly if nobody reads stdout any more (`| head`).

    Raises:
        Pi0Error: stdout cannot be written for another reason, such as a full disk.
    """
    try:
        yield
    except OSError as error:
        # What is left in the buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(READER_GONE) from None
        raise Pi0Error(f"stdout: expected room to print, found: {error.strerror}.") from error


def to_json(value: Any, ascii_only: bool = False) -> str:
    """Plain data as JSON; NaN and infinities, which JSON does not have, as null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=ascii_only)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def count(number: int, noun: str) -> str:
    """A number of things, as in "1 tensor" and "2 tensors"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def human_dims(shape: list[int]) -> str:
    return "×".join(map(str, shape))
