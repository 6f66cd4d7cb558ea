"""An observation's frame in, an answer's frame out.

Runs in the one thread that computes. Whatever happens, there is an answer: actions that were
checked once more, or one sentence for the client; tracebacks go to the log. Knows no connections.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pi0 import __version__
from pi0.errors import EngineError, LimitError, ObservationError, Pi0Error
from pi0.policy import Policy
from pi0.serve.extras import split_extras
from pi0.serve.wire import MessageLimits, pack, unpack

logger = logging.getLogger("pi0.serve")
SHOWN_CHARACTERS = 1000  # of an error
# What clients may know of a policy: nothing that tells where files lie.
PUBLIC_METADATA = (
    *("layout", "horizon", "robot", "resize", "prompt", "state_in_prompt", "default_prompt"),
    *("engine", "steps", "n_action_steps", "on_limit", "real_time"),
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


@dataclass(frozen=True)
class Answer:
    """What a client gets.

    Attributes:
        frame: bytes are actions, a text is an error.
        outcome: "ok", or the kind of error.
        stages: seconds of each stage that was reached.
        warnings: how many were raised.
        state: [D] float32, that the actions begin from; None: there are no actions.
    """

    frame: bytes | str
    outcome: str
    stages: Mapping[str, float]
    warnings: int = 0
    state: NDArray[np.float32] | None = None


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


class Answerer:
    """Answers requests with a policy, one at a time.

    Attributes:
        policy: computes.
        limits: of messages.
        last: the last observation and its actions; None: there was none yet.
        on_frame: is given each observation with its actions, for a recording; None: nobody is.
    """

    at_once = 1  # requests

    def __init__(self, policy: Policy, limits: MessageLimits) -> None:
        self.policy = policy
        self.limits = limits
        self.on_frame: Callable[[Frame], None] | None = None
        self.last: Chunk | None = None
        self._shape = (policy.engine.config.horizon, policy.pipeline.action_dim)
        self._numbers = itertools.count(1)

    def metadata(self) -> bytes:
        """The frame that greets a client."""
        known = {name: self.policy.metadata.get(name) for name in PUBLIC_METADATA}
        known["noise_shape"] = list(self.policy.noise_shape)
        return pack({**known, "server": f"pi0 {__version__}"})

    def warm_up(self, on_step: Callable[[], None]) -> float:
        """Computes a chunk that nobody gets, with all cameras; returns its seconds.

        Raises:
            Pi0Error: the policy cannot compute.
        """
        pipeline, config = self.policy.pipeline, self.policy.engine.config
        side = config.vision.image_size
        images = {
            camera.key: np.zeros((side, side, 3), np.uint8) for camera in pipeline.robot.cameras
        }
        width = pipeline.robot.state_dim or pipeline.state_stats.width
        observation = pipeline.robot.observation(images, np.zeros(width), "warm up")
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that state is nobody's
            inputs, _ = pipeline.encode(observation)
            noise = torch.zeros(1, config.horizon, config.action_dim)
            self.policy.engine.sample(inputs, noise, self.policy.steps, on_step)
        return time.perf_counter() - start

    def answer(self, request: Request) -> Answer:
        """The answer to a request; nothing is raised."""
        stages = {"queue": time.perf_counter() - request.arrived}
        try:
            with warnings.catch_warnings(record=True) as raised:
                warnings.simplefilter("always")
                result = self._infer(request, stages)
            said = [str(warning.message) for warning in raised]
            frame = self._pack(result, said, stages, request)
            return Answer(frame, "ok", stages, len(said), result["state"])
        except Exception as error:  # of any kind: the client waits, and others come after it
            return failure(error, stages)

    def _infer(self, request: Request, stages: dict[str, float]) -> dict[str, Any]:
        request.check()
        if isinstance(request.frame, str):
            raise ObservationError(
                "observation: expected a binary message of msgpack, found text. Connect with "
                "openpi's client, or pack as docs/serving.md shows."
            )
        start = time.perf_counter()
        observation, extras = split_extras(unpack(request.frame, self.limits))
        stages["decode"] = time.perf_counter() - start
        if extras.previous is not None and self.policy.real_time is None:
            raise ObservationError(
                "pi0/previous: expected a server that continues chunks, found one without. Start "
                "it with --real-time, or leave the key out."
            )
        result = self.policy.infer(
            observation,
            request.noise if extras.noise is None else extras.noise,
            request.check,
            previous=extras.previous,
            delay=extras.delay,
        )
        request.check()
        for stage in ("preprocess", "infer", "postprocess"):
            stages[stage] = result["policy_timing"][f"{stage}_ms"] / 1e3
        check_actions(result["actions"], self._shape)
        self.last = Chunk(next(self._numbers), observation, result["actions"])
        if self.on_frame:
            told = (observation, result["state"], result["actions"], extras.reset)
            self.on_frame(Frame(request.client, *told, request.arrived, len(request.frame)))
        return result

    def _pack(
        self, result: dict[str, Any], said: list[str], stages: dict[str, float], request: Request
    ) -> bytes:
        timing = {
            "infer_ms": 1e3 * (time.perf_counter() - request.arrived - stages["queue"]),
            "queue_ms": 1e3 * stages["queue"],
        }
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
        if said:
            answer["warnings"] = said
        return pack(answer)


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
