"""A policy server: many connections in one asyncio loop, the policy in one thread beside it.

PyTorch releases the interpreter while it computes, so that pings, health checks and other clients
are answered while a chunk takes seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websockets

from pi0.policy import Policy
from pi0.serve.answer import AbandonedError, Answer, Answerer, Request
from pi0.serve.binding import listen
from pi0.serve.metrics import Metrics
from pi0.serve.options import ServeOptions
from pi0.serve.replicas import Replicas
from pi0.serve.session import Session, event_or_end
from pi0.serve.site import Site
from pi0.serve.turns import Turns

if TYPE_CHECKING:
    from pi0.serve.record import Recorder

logger = logging.getLogger("pi0.serve")
websocket_logger = logging.getLogger("pi0.serve.websockets")
websocket_logger.setLevel(logging.ERROR)  # below it: each handshake that a port scan begins
DRAIN_POLL = 0.02  # seconds

A = TypeVar("A")
R = TypeVar("R")


class PolicyServer:
    """Serves a policy until it is told to stop. `serve` runs it.

    Attributes:
        sessions: clients that are connected.
        answerer: computes.
        metrics: counts.
        recorder: records what is answered; None: nobody does.
    """

    def __init__(self, policy: Policy | Replicas, options: ServeOptions | None = None) -> None:
        self.options = options or ServeOptions()
        self.sessions: set[Session] = set()
        message, batch = self.options.message, self.options.batch
        self.answerer = policy if isinstance(policy, Replicas) else Answerer(policy, message, batch)
        self.metrics = Metrics(
            clients=lambda: len(self.sessions),
            waiting=lambda: sum(session.waiting for session in self.sessions),
        )
        self.recorder = self._make_recorder()
        self.answerer.recording = self.recorder is not None
        self._ready = asyncio.Event()
        self._stopping = threading.Event()  # the computing thread looks at it, too
        self._turns = Turns(
            self._compute, batch, self.options.batch_wait, lambda: len(self.sessions)
        )
        self._thread = ThreadPoolExecutor(self.answerer.at_once, thread_name_prefix="pi0-policy")
        self._site = Site(self)

    def _make_recorder(self) -> Recorder | None:
        if self.options.record is None:
            return None
        from pi0.serve.record import Recorder  # which needs packages that serving does not

        pipeline = self.answerer.policy.pipeline
        return Recorder(self.options.record, pipeline, self.metrics.recorded)

    @property
    def ready(self) -> bool:
        """The policy is warm, and the server is not about to end."""
        return self._ready.is_set() and not self.stopping

    @property
    def stopping(self) -> bool:
        """It was told to stop, and takes nobody in any more."""
        return self._stopping.is_set()

    async def serve(
        self,
        sock: socket.socket,
        stop: asyncio.Event,
        on_ready: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Listens on a bound socket until `stop` is set; then answers what came, and closes with
        code 1001.

        Args:
            on_ready: called after the warm-up with its seconds.

        Raises:
            Pi0Error: the policy cannot compute, or another process listens there.
        """
        options = self.options
        try:
            listen(sock)
            async with serve_websockets(
                self._client,
                sock=sock,
                ssl=options.tls,
                process_request=self._site.respond,
                origins=[None],  # a page in somebody's browser is no robot
                compression=None,
                # Between the two limits a client is told what is wrong and stays connected.
                max_size=2 * options.message.message_bytes,
                max_queue=2,
                ping_interval=options.ping_interval,
                ping_timeout=options.ping_timeout,
                logger=websocket_logger,
            ):
                await self._until(stop, on_ready)
        finally:
            self._stopping.set()
            self._thread.shutdown(wait=True, cancel_futures=True)
            if self.recorder:
                logger.info("recording: writing the episodes in progress")
                await asyncio.to_thread(self.recorder.close)

    async def _until(self, stop: asyncio.Event, on_ready: Callable[[float], None]) -> None:
        beside = [self._watch(stop), self._log_latency()]
        beside += [self._turns.work() for _ in range(self.answerer.at_once)]
        tasks = [asyncio.create_task(work) for work in beside]
        try:
            with contextlib.suppress(AbandonedError):  # told to stop
                seconds = await self._in_thread(self.answerer.warm_up, self._check_stop)
                self.metrics.ready.set(1)
                self._ready.set()
                on_ready(seconds)
            await stop.wait()
            await self._drain()
            if self.recorder:
                self.recorder.hurry()
        finally:
            self.metrics.ready.set(0)
            for task in tasks:
                task.cancel()

    async def _watch(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._stopping.set()

    def _check_stop(self) -> None:
        if self._stopping.is_set():
            raise AbandonedError

    async def _drain(self) -> None:
        """Waits until everything that came is answered, but no longer than `grace`."""
        for session in self.sessions:
            session.refuse_more()
        end = time.monotonic() + self.options.grace
        while any(session.busy for session in self.sessions) and time.monotonic() < end:
            await asyncio.sleep(DRAIN_POLL)
        unanswered = sum(session.busy for session in self.sessions)
        if unanswered:
            logger.warning("stopping: %d observations stay unanswered.", unanswered)

    async def _client(self, connection: ServerConnection) -> None:
        session = Session(connection, self._turns, self._answered, self.options)
        self.sessions.add(session)
        logger.info("client %s: connected, %d in all", session.name, len(self.sessions))
        try:
            if await event_or_end(connection, self._ready):
                await session.run(self.answerer.metadata())
        finally:
            self.sessions.discard(session)
            if self.recorder:
                self.recorder.end(session.name)
            responses = f"{session.answers} response{'' if session.answers == 1 else 's'}"
            logger.info("client %s: disconnected after %s", session.name, responses)

    def _answered(self, answer: Answer, total: float) -> None:
        self.metrics.answered(answer, total)
        if self.recorder and answer.recorded:
            self.recorder.put(answer.recorded)

    async def _compute(self, requests: Sequence[Request]) -> Sequence[Answer]:
        return await self._in_thread(self.answerer.answer, requests)

    async def _in_thread(self, work: Callable[[A], R], argument: A) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, argument)

    async def _log_latency(self) -> None:
        while True:
            await asyncio.sleep(self.options.log_interval)
            latency = self.metrics.latency(self.options.log_interval)
            if latency:
                logger.info(
                    "last %.0f s: %s, %d clients",
                    self.options.log_interval,
                    latency,
                    len(self.sessions),
                )
