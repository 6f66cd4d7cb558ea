"""One client: its newest observation, its answers in order.

Each observation gets one frame, in the order in which they came. While a client waits for its turn,
a newer observation replaces the one that waits; the older one is answered with a text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from pi0.serve.answer import Answer, Request, one_line
from pi0.serve.options import ServeOptions
from pi0.serve.turns import Turns

logger = logging.getLogger("pi0.serve")
LOG_PAUSE = 1.0  # seconds between errors of one client in the log
SUPERSEDED = Answer(
    "superseded: expected to compute this observation, found a newer one of this client.",
    "superseded",
    {},
)
Report = Callable[[Answer, float], None]


class Session:
    """Reads and answers one connection until it ends.

    Attributes:
        name: address of the client.
        waiting: its observation stands in line.
        answers: how many it got.
    """

    def __init__(
        self,
        connection: ServerConnection,
        turns: Turns,
        report: Report,
        options: ServeOptions,
    ) -> None:
        """
        Args:
            turns: the line in which it stands.
            report: takes each answer, and the seconds from arrival to the end of sending.
        """
        host, port, *_ = connection.remote_address or ("unknown", 0)
        self.name = f"{host}:{port}"
        self.answers = 0
        self._connection = connection
        self._turns, self._report, self._options = turns, report, options
        self._newest: Request | None = None
        self._arrived = asyncio.Event()
        self._answering = False
        self._closing = False
        self._previous: float | None = None
        self._logged = -math.inf

    @property
    def waiting(self) -> bool:
        return self._newest is not None

    @property
    def busy(self) -> bool:
        """An observation that came is not answered yet."""
        return self.waiting or self._answering

    def refuse_more(self) -> None:
        """What comes from now on is not read: the connection is about to close."""
        self._closing = True

    async def run(self, metadata: bytes) -> None:
        """Greets the client and serves it until the connection ends."""
        tasks = []
        try:
            await self._send(metadata)
            tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._answer())]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except ConnectionClosed:
            pass
        finally:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception) and not isinstance(ended, ConnectionClosed):
                    logger.error("client %s: dropped", self.name, exc_info=ended)

    async def _receive(self) -> None:
        async for frame in self._connection:
            if self._closing:
                continue
            request = Request(frame, self._options.timeout, self.name)
            if self._newest is not None:
                request.superseded = self._newest.superseded + 1
            self._newest = request
            self._arrived.set()

    async def _answer(self) -> None:
        while True:
            await self._arrived.wait()
            request, answer = await self._turns.answer(self._take)
            for _ in range(request.superseded):
                await self._deliver(SUPERSEDED, request)
            await self._deliver(answer, request)
            self._answering = False

    def _take(self) -> Request:
        assert self._newest is not None
        request, self._newest = self._newest, None
        request.previous = self._previous
        self._answering = True
        self._arrived.clear()
        return request

    async def _deliver(self, answer: Answer, request: Request) -> None:
        await self._send(answer.frame)
        seconds = time.perf_counter() - request.arrived
        if answer is not SUPERSEDED:
            self._previous = seconds
        self.answers += 1
        self._log(answer)
        self._report(answer, seconds)

    def _log(self, answer: Answer) -> None:
        """Logs errors, but no client can fill the disk with its own."""
        now = time.monotonic()
        if answer.outcome not in ("ok", "superseded") and now > self._logged + LOG_PAUSE:
            self._logged = now
            logger.warning("client %s: %s", self.name, one_line(str(answer.frame)))

    async def _send(self, frame: bytes | str) -> None:
        """Sends a frame; a client that does not read it in time is dropped."""
        transport = self._connection.transport
        loop = asyncio.get_running_loop()
        guard = loop.call_later(self._options.send_timeout, transport.abort)
        try:
            await self._connection.send(frame)
        finally:
            guard.cancel()


async def event_or_end(connection: ServerConnection, event: asyncio.Event) -> bool:
    """Waits for an event or the end of a connection; whether the event came."""
    waits = [asyncio.create_task(event.wait()), asyncio.create_task(connection.wait_closed())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waits:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    return event.is_set()
