"""A latency that is counted in ticks, so that it is the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class LateResults(Executor):
    """Computes at once, and is not done before `delay` calls of `tick`; who asks for a result
    earlier gets it, which an `ActionBuffer` does only where the robot stands still."""

    def __init__(self, delay: int) -> None:
        self.delay = delay
        self._now = 0

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """The result of a call, later; an error at once."""
        late: LateResult[T] = LateResult(self, self._now + self.delay)
        late.set_result(fn(*args, **kwargs))
        return late

    def tick(self) -> None:
        """One tick has passed."""
        self._now += 1

    def passed(self, tick: int) -> bool:
        """Whether it is that tick, or later."""
        return self._now >= tick


class LateResult(Future[T]):
    """A result that is there from a tick on."""

    def __init__(self, clock: LateResults, due: int) -> None:
        super().__init__()
        self._clock, self._due = clock, due

    def done(self) -> bool:
        return self._clock.passed(self._due)
