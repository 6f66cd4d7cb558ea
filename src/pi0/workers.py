"""Jobs in turn in this process, or side by side in processes that are spawned for them.

A process is given a job when it has finished its last one. Results arrive in any order. Knows
nothing of policies or environments.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Generic, TypeVar

from pi0.errors import Pi0Error

J = TypeVar("J")
R = TypeVar("R")
# Makes what does a job; entered once in each process. It must be picklable.
Make = Callable[[], AbstractContextManager[Callable[[J], R]]]

STOPPING_S = 10.0  # that a process gets to clean up before it is killed


@dataclass(frozen=True)
class Failure:
    """An error of a worker process, as it crosses the process boundary."""

    kind: type[Pi0Error]
    sentence: str


def run_here(make: Make[J, R], jobs: Iterable[J], on_result: Callable[[R], None]) -> None:
    """Does all jobs in this process."""
    with make() as work:
        for job in jobs:
            on_result(work(job))


def run_in_processes(
    make: Make[J, R], jobs: Iterable[J], count: int, on_result: Callable[[R], None]
) -> None:
    """Does all jobs in at most `count` processes.

    Raises:
        Pi0Error: what the first process that fails raised, or that one died.
    """
    waiting = deque(jobs)
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker[J]] = []
    try:
        with _children_ignore_interrupts():
            for _ in range(min(count, len(waiting))):
                workers.append(_Worker(context, make))
        busy: dict[Any, _Worker[J]] = {
            worker.connection: worker for worker in workers if worker.give(waiting)
        }
        while busy:
            for connection in wait(list(busy)):
                worker = busy[connection]
                on_result(worker.take())
                if not worker.give(waiting):
                    del busy[worker.connection]
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.stop()


class _Worker(Generic[J]):
    """A process and what it is doing."""

    def __init__(self, context: SpawnContext, make: Make[J, Any]) -> None:
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, make), daemon=True
        )
        self.process.start()
        theirs.close()  # so that the end of the process ends the pipe
        self._job: J | None = None

    def give(self, waiting: deque[J]) -> bool:
        """Gives it the next job; False if there is none."""
        if not waiting:
            return False
        self._job = waiting.popleft()
        with contextlib.suppress(BrokenPipeError):  # it died, which `take` will say
            self.connection.send(self._job)
        return True

    def take(self) -> Any:
        """The result of its job."""
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self.process.join(STOPPING_S)
            raise Pi0Error(
                f"worker: expected it to finish {self._job}, found that its process "
                f"{_end(self.process.exitcode)}. Use fewer workers if memory is short."
            ) from error
        if isinstance(answer, Failure):
            raise answer.kind(answer.sentence)
        return answer

    def stop(self) -> None:
        self.process.join(STOPPING_S)
        if self.process.is_alive():  # in the middle of a long computation
            self.process.kill()
            self.process.join()
        self.connection.close()


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def _serve(connection: Connection, make: Make[Any, Any]) -> None:
    """A worker's life: jobs until its process is terminated or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the parent ends its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing half-written stays
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with make() as work:
            while True:
                connection.send(work(connection.recv()))
    except Pi0Error as error:
        connection.send(Failure(type(error), str(error)))
    except (EOFError, BrokenPipeError):
        return  # the parent is gone


def _end_with_parent() -> None:
    """Terminates this process when the parent dies: what would go on with a job would write where
    a new run of the parent does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C from the first moment on, before `_serve`."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where signals cannot be set
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
