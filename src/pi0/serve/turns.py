"""Whose turn it is: clients stand in line, and whoever is first in it gets computed.

A client stands in line once, so that turns go round. Several at the front are computed together
where the server batches: those that wait when the policy is free, and those that come within a
budget of time after the first of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from pi0.serve.answer import Answer, Request

Compute = Callable[[Sequence[Request]], Awaitable[Sequence[Answer]]]


@dataclass(eq=False)
class _Place:
    """A client in line: `take` gives the request once it is its turn."""

    take: Callable[[], Request]
    result: asyncio.Future[tuple[Request, Answer]]
    joined: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    request: Request | None = None


class Turns:
    """The line of a server. `work` serves it; run as many as may compute at the same time."""

    def __init__(
        self, compute: Compute, batch: int = 1, wait: float = 0.0, most: Callable[[], int] = int
    ) -> None:
        """
        Args:
            compute: the answers to requests, in their order.
            batch: how many are computed together, at most.
            wait: seconds after which the first in line is computed with however many there are.
            most: how many can be in line at all: nobody is waited for who cannot come.
        """
        self._compute, self._batch, self._wait, self._most = compute, batch, wait, most
        self._line: list[_Place] = []
        self._joined = asyncio.Event()
        self._gathering = asyncio.Lock()

    async def answer(self, take: Callable[[], Request]) -> tuple[Request, Answer]:
        """Stands in line; the request that `take` gave when it was its turn, and its answer.

        A caller that is cancelled leaves the line, or has its request abandoned.
        """
        place = _Place(take, asyncio.get_running_loop().create_future())
        self._line.append(place)
        self._joined.set()
        try:
            return await place.result
        except asyncio.CancelledError:
            if place.request:
                place.request.abandon()
            else:
                self._line.remove(place)
            raise

    async def work(self) -> None:
        """Computes for those in line until it is cancelled."""
        while True:
            async with self._gathering:
                places = await self._gather()
                requests = [self._begin(place) for place in places]
            try:
                answers = await self._compute(requests)
            except Exception as error:
                for place in places:
                    if not place.result.done():
                        place.result.set_exception(error)
                continue
            for place, request, answer in zip(places, requests, answers, strict=True):
                if not place.result.done():
                    place.result.set_result((request, answer))

    async def _gather(self) -> list[_Place]:
        """The next to be computed, off the line."""
        while not self._line or self._worth_waiting():
            self._joined.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._joined.wait(), self._left())
        places, self._line = self._line[: self._batch], self._line[self._batch :]
        return places

    def _worth_waiting(self) -> bool:
        left = self._left()
        room = len(self._line) < min(self._batch, self._most())
        return room and left is not None and left > 0

    def _left(self) -> float | None:
        """Seconds that the first in line may be kept waiting; None: there is nobody."""
        if not self._line:
            return None
        return self._line[0].joined + self._wait - asyncio.get_running_loop().time()

    @staticmethod
    def _begin(place: _Place) -> Request:
        place.request = place.take()
        return place.request
