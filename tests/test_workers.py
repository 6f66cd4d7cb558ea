"""Worker processes: results of all jobs, and what is said when one fails or dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import is_running, wait_until

from pi0.errors import LimitError, Pi0Error
from pi0.workers import run_here, run_in_processes


@contextlib.contextmanager
def squaring() -> Iterator[Callable[[int], int]]:
    """Squares numbers; dies of 13 and refuses negative ones."""

    def work(job: int) -> int:
        if job == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        if job < 0:
            raise LimitError(f"{job}: expected 0 or more.")
        return job**2

    yield work


def test_all_jobs_are_done() -> None:
    here: list[int] = []
    run_here(squaring, range(5), here.append)
    assert here == [0, 1, 4, 9, 16]
    there: list[int] = []
    run_in_processes(squaring, range(5), 2, there.append)
    assert sorted(there) == here


@pytest.mark.parametrize(
    ("job", "kind", "sentence"),
    [
        (-1, LimitError, "-1: expected 0 or more."),
        (13, Pi0Error, "expected it to finish 13, found that its process was ended by SIGKILL"),
    ],
)
def test_failures(job: int, kind: type[Pi0Error], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        run_in_processes(squaring, [job, 1], 2, lambda _: None)


def test_what_the_caller_raises_ends_the_processes() -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_processes(squaring, range(4), 2, interrupt)


@contextlib.contextmanager
def sleeping(file: Path) -> Iterator[Callable[[int], None]]:
    """Says who it is in a file, and sleeps for as many seconds as it is given."""

    def work(job: int) -> None:
        file.write_text(f"{os.getpid()}\n")
        time.sleep(job)

    yield work


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """They had gone on, and written where a new run of the parent did."""
    file = tmp_path / "pid"
    script = (
        "import functools, pathlib\n"
        "from pi0.workers import run_in_processes\n"
        "from test_workers import sleeping\n"
        "if __name__ == '__main__':\n"
        f"    make = functools.partial(sleeping, pathlib.Path({str(file)!r}))\n"
        "    run_in_processes(make, [60], 1, print)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}
    )
    try:
        wait_until(lambda: file.is_file() and file.read_text().endswith("\n"))
        worker = int(file.read_text())
        parent.kill()
        wait_until(lambda: not is_running(worker))
    finally:
        parent.kill()
        parent.wait()
