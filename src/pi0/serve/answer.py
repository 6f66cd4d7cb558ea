"""An observation's frame in, an answer's frame out.

Runs in the one thread that computes. Whatever happens, there is an answer: actions that were
checked once more, or one sentence for the client; tracebacks go to the log. Knows no connections.

Several requests are one call of the engine where they can be: each is read, decoded and checked on
its own, and whatever is wrong with one of them is its own error.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pi0 import __version__
from pi0.errors import EngineError, LimitError, ObservationError, Pi0Error
from pi0.policy import Encoded, Policy, Sampled
from pi0.serve.extras import naming_extras, split_extras
from pi0.serve.wire import MessageLimits, pack, unpack

logger = logging.getLogger("pi0.serve")
SHOWN_CHARACTERS = 1000  # of an error
# What clients may know of a policy: nothing that tells where files lie.
PUBLIC_METADATA = (
    *("layout", "horizon", "robot", "resize", "prompt", "state_in_prompt", "default_prompt"),
    *("engine", "steps", "sampler", "n_action_steps", "on_limit", "real_time"),
)
# What becomes of an observation, by the error that ended it.
OUTCOMES = {ObservationError: "observation", LimitError: "limit", EngineError: "engine"}


class AbandonedError(Exception):
    """Nobody waits for this answer any more."""


@dataclass
class Request:
    """One message of a client, on its way to an answer.

    Attributes:
        frame: as it came; text is no observation.
        timeout: seconds after which nobody wants the answer.
        client: whose it is.
        arrived: `time.perf_counter()`.
        previous: seconds from arrival to answer of this client's previous observation.
        superseded: older observations of this client that this one replaced while they waited.
        noise: [1, horizon, action_dim of the model]; None: the policy draws it.
    """

    frame: bytes | str
    timeout: float
    client: str = ""
    arrived: float = field(default_factory=time.perf_counter)
    previous: float | None = None
    superseded: int = 0
    noise: Tensor | None = None
    _abandoned: threading.Event = field(default_factory=threading.Event)

    def abandon(self) -> None:
        """Stops its computation at the next denoising step."""
        self._abandoned.set()

    def check(self) -> None:
        """Raises AbandonedError or TimeoutError once there is no use in going on."""
        if self._abandoned.is_set():
            raise AbandonedError
        age = time.perf_counter() - self.arrived
        if age > self.timeout:
            raise TimeoutError(
                f"time: expected an answer within {self.timeout:g} s, found {age:.1f} s gone. Send "
                "the next observation, and fewer robots to this server."
            )

    def problem(self) -> Exception | None:
        """What `check` raises; None: nothing."""
        try:
            self.check()
        except (AbandonedError, TimeoutError) as error:
            return error
        return None


def check_any(requests: Sequence[Request]) -> None:
    """Raises what `Request.check` does once there is no use in going on for any of them."""
    problems = [request.problem() for request in requests]
    if all(problems):
        assert problems[0] is not None
        raise problems[0]


@dataclass(frozen=True)
class Answer:
    """What a client gets.

    Attributes:
        frame: bytes are actions, a text is an error.
        outcome: "ok", or the kind of error.
        stages: seconds of each stage that was reached.
        warnings: how many were raised.
        batch: how many observations were computed together, this one among them; 0: it was not.
        state: [D] float32, that the actions begin from; None: there are no actions.
        recorded: what a recording keeps once the client has it; None: nothing.
    """

    frame: bytes | str
    outcome: str
    stages: Mapping[str, float]
    warnings: int = 0
    batch: int = 0
    state: NDArray[np.float32] | None = None
    recorded: Frame | None = None


@dataclass(frozen=True)
class Frame:
    """An observation that was answered, as it is recorded.

    Attributes:
        client: whose it is.
        observation: as the policy read it.
        state: [D] float32.
        actions: [H, D] float32.
        reset: another episode begins with it.
        arrived: `time.perf_counter()`.
        size: bytes that it keeps in memory.
    """

    client: str
    observation: Mapping[str, Any]
    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    reset: bool
    arrived: float
    size: int


@dataclass(frozen=True)
class Chunk:
    """The last observation that was answered, and its actions [H, D], for the live page."""

    number: int
    observation: Mapping[str, Any]
    actions: NDArray[np.float32]


@dataclass
class _Task:
    """A request on its way through the policy, as far as it has come."""

    request: Request
    stages: dict[str, float]
    said: list[str] = field(default_factory=list)  # warnings
    observation: Any = None
    reset: bool = False  # another episode begins
    encoded: Encoded | None = None
    sampled: Sampled | None = None
    batch: int = 0
    answer: Answer | None = None

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Warnings of the block are this task's, and an error is the answer to it alone."""
        try:
            with warnings.catch_warnings(record=True) as raised:
                warnings.simplefilter("always")
                yield
            self.said += [str(warning.message) for warning in raised]
        except Exception as error:  # of any kind: the client waits, and others come after it
            self.answer = failure(error, self.stages)


class Answerer:
    """Answers requests with a policy, one call at a time.

    Attributes:
        policy: computes.
        limits: of messages.
        last: the last observation and its actions; None: there was none yet.
        recording: answers say what is to be recorded of them.
    """

    at_once = 1  # calls of `answer`

    def __init__(self, policy: Policy, limits: MessageLimits, batch: int = 1) -> None:
        """
        Args:
            batch: how many requests a call of `answer` may have.

        Raises:
            EngineError: the engine takes one observation at a time, and `batch` is larger.
        """
        policy.engine.check_batch(batch)
        self.policy = policy
        self.limits = limits
        self.recording = False
        self.last: Chunk | None = None
        self._batch = batch
        self._shape = (policy.engine.config.horizon, policy.pipeline.action_dim)
        self._numbers = itertools.count(1)

    def metadata(self) -> bytes:
        """The frame that greets a client."""
        known = {name: self.policy.metadata.get(name) for name in PUBLIC_METADATA}
        known["noise_shape"] = list(self.policy.noise_shape)
        return pack({**known, "server": f"pi0 {__version__}"})

    def warm_up(self, on_step: Callable[[], None]) -> float:
        """Computes a chunk that nobody gets, with all cameras, and then the largest batch of them;
        returns the seconds of the single one.

        Raises:
            Pi0Error: the policy cannot compute.
        """
        pipeline, config = self.policy.pipeline, self.policy.engine.config
        side = config.vision.image_size
        images = {
            camera.key: np.zeros((side, side, 3), np.uint8) for camera in pipeline.robot.cameras
        }
        width = pipeline.robot.state_dim or pipeline.state_stats.width
        observation = pipeline.observation(images, np.zeros(width), "warm up")
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that state is nobody's
            encoded = self.policy.encode(observation, torch.zeros(1, *self.policy.noise_shape))
            self.policy.sample([encoded], on_step)
            seconds = time.perf_counter() - start
            if self._batch > 1:
                self.policy.sample([encoded] * self._batch, on_step)
        return seconds

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers to requests, in their order; nothing is raised."""
        tasks = [
            _Task(request, {"queue": time.perf_counter() - request.arrived}) for request in requests
        ]
        groups: dict[Hashable, list[_Task]] = {}
        for number, task in enumerate(tasks):
            with task.collecting():
                task.encoded = self._encode(task)
                key = task.encoded.batch_key
                groups.setdefault(number if key is None else key, []).append(task)
        for group in groups.values():
            self._sample(group)
        return [task.answer or self._finish(task) for task in tasks]

    def _encode(self, task: _Task) -> Encoded:
        request, start = task.request, time.perf_counter()
        request.check()
        if isinstance(request.frame, str):
            raise ObservationError(
                "observation: expected a binary message of msgpack, found text. Connect with "
                "openpi's client, or pack as docs/serving.md shows."
            )
        task.observation, extras = split_extras(unpack(request.frame, self.limits))
        task.stages["decode"] = time.perf_counter() - start
        if extras.previous is not None and self.policy.real_time is None:
            raise ObservationError(
                "pi0/previous: expected a server that continues chunks, found one without. Start "
                "it with --real-time, or leave the key out."
            )
        task.reset = extras.reset
        with naming_extras():
            return self.policy.encode(
                task.observation,
                request.noise if extras.noise is None else extras.noise,
                previous=extras.previous,
                delay=extras.delay,
            )

    def _sample(self, tasks: Sequence[_Task]) -> None:
        """Samples tasks that fit together. What fails together is tried one by one, so that what
        is wrong with one observation ends no other."""
        if len(tasks) == 1:
            with tasks[0].collecting():
                self._sample_together(tasks)
            return
        try:
            self._sample_together(tasks)
        except Exception as error:  # of any kind; each alone shows which of them it is about
            if not isinstance(error, (AbandonedError, TimeoutError)):
                reason = one_line(f"{type(error).__name__}: {error}")
                logger.warning("a batch of %d failed and is computed apart: %s", len(tasks), reason)
            for task in tasks:
                self._sample([task])

    def _sample_together(self, tasks: Sequence[_Task]) -> None:
        requests = [task.request for task in tasks]
        check_any(requests)
        encoded = [task.encoded for task in tasks if task.encoded]
        sampled = self.policy.sample(encoded, lambda: check_any(requests))
        for task, actions in zip(tasks, sampled, strict=True):
            task.sampled, task.batch = actions, len(tasks)

    def _finish(self, task: _Task) -> Answer:
        with task.collecting():
            result = self._decode(task)
        if task.answer is None:
            with task.collecting():
                task.answer = self._answer(task, result)
        assert task.answer is not None
        return task.answer

    def _decode(self, task: _Task) -> dict[str, Any]:
        request = task.request
        request.check()
        assert task.encoded is not None
        assert task.sampled is not None
        result = self.policy.decode(task.encoded, task.sampled)
        for stage in ("preprocess", "infer", "postprocess"):
            task.stages[stage] = result["policy_timing"][f"{stage}_ms"] / 1e3
        check_actions(result["actions"], self._shape)
        self.last = Chunk(next(self._numbers), task.observation, result["actions"])
        return result

    def _answer(self, task: _Task, result: dict[str, Any]) -> Answer:
        request, stages = task.request, task.stages
        timing = {
            "infer_ms": 1e3 * (time.perf_counter() - request.arrived - stages["queue"]),
            "queue_ms": 1e3 * stages["queue"],
        }
        if self._batch > 1:
            timing["batch"] = task.batch
        if request.previous is not None:
            timing["prev_total_ms"] = 1e3 * request.previous
        # No array but the actions: openpi's ActionChunkBroker cuts every array of an answer.
        answer = {
            "actions": result["actions"],
            "policy_timing": result["policy_timing"],
            "server_timing": timing,
        }
        if result["limits"].get("violations"):
            answer["limits"] = result["limits"]
        if task.said:
            answer["warnings"] = task.said
        recorded = None
        if self.recording:
            told = (task.observation, result["state"], result["actions"], task.reset)
            recorded = Frame(request.client, *told, request.arrived, len(request.frame))
        counts = len(task.said), task.batch
        return Answer(pack(answer), "ok", stages, *counts, result["state"], recorded)


def check_actions(actions: Any, shape: tuple[int, int]) -> None:
    """The last look at a chunk before it leaves, whatever computed it.

    Raises:
        EngineError: no finite float32 of this shape.
    """
    found = (getattr(actions, "shape", None), getattr(actions, "dtype", type(actions).__name__))
    if not isinstance(actions, np.ndarray) or found != (shape, np.dtype(np.float32)):
        raise EngineError(
            f"actions: expected float32 of {list(shape)}, found {found[1]} {found[0]}."
        )
    if not np.isfinite(actions).all():
        raise EngineError("actions: expected finite values, found NaN or infinite ones.")


def one_line(text: str) -> str:
    """A text that fits into a log and a message: one line, nothing unprintable, not too long."""
    line = "".join(c if c.isprintable() else " " for c in text[: SHOWN_CHARACTERS + 1])
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}…"


def failure(error: Exception, stages: Mapping[str, float]) -> Answer:
    """What a client gets in place of actions: one sentence."""
    if isinstance(error, Pi0Error):
        return Answer(one_line(str(error)), OUTCOMES.get(type(error), "policy"), stages)
    if isinstance(error, TimeoutError):
        return Answer(one_line(str(error)), "timeout", stages)
    if isinstance(error, AbandonedError):
        return Answer("", "abandoned", stages)
    logger.error("an observation was not answered", exc_info=error)
    text = "server: expected an answer, found an internal error. Its log says at this time which."
    return Answer(text, "internal", stages)
