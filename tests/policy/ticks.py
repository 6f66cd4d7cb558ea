"""A background that computes for as many ticks as a test says: no thread, no clock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class Ticks(Executor):
    """Its work is done `delay` calls of `tick` after it was submitted; who asks earlier waits for
    nothing and gets the result."""

    def __init__(self, delay: int) -> None:
        self.delay = delay
        self.waiting: list[Work] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Work:
        self.waiting.append(Work(self.delay, lambda: fn(*args, **kwargs)))
        return self.waiting[-1]

    def tick(self) -> None:
        for work in self.waiting:
            work.left -= 1
            if work.left <= 0:
                work.run()
        self.waiting = [work for work in self.waiting if not work.done()]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.waiting.clear()


class Work(Future):
    def __init__(self, delay: int, call: Callable[[], Any]) -> None:
        super().__init__()
        self.left, self.call = delay, call

    def run(self) -> None:
        if not self.done():
            try:
                self.set_result(self.call())
            except Exception as error:
                self.set_exception(error)

    def result(self, timeout: float | None = None) -> Any:
        self.run()
        return super().result(timeout)
