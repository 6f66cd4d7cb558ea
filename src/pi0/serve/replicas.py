"""One server, several replicas of its policy, as a Ray Serve deployment (docs/scaling.md).

The server keeps connections, turns, limits and noise. A replica, in a process of its own and maybe
on another machine, gets the frames of one observation, or of several that it computes together, and
returns the frames of the answers. It keeps nothing between two calls, so that any replica may
answer any client. Ray starts replicas, watches them, replaces those that fail, and adds and removes
some as load asks.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pi0.errors import Pi0Error
from pi0.policy import Pipeline, PolicyOptions, PolicyRecipe, Robot
from pi0.serve.answer import (
    AbandonedError,
    Answer,
    Answerer,
    Chunk,
    Frame,
    Request,
    check_any,
    failure,
)
from pi0.serve.cluster import Scale, connect, reason, require_ray, require_room
from pi0.serve.extras import split_extras
from pi0.serve.wire import MessageLimits, unpack

logger = logging.getLogger("pi0.serve")
POLL = 0.05  # seconds between two looks whether an answer is still wanted
START_TIMEOUT = 1800.0  # seconds: large weights from a slow disk
LOST = (
    "server: expected an answer, found that two replicas were lost while they computed it. Send "
    "the next observation."
)


@dataclass(frozen=True)
class Recipe(PolicyRecipe):
    """Everything that a replica needs to make its policy; the files must be there on its machine.

    Attributes:
        limits: of messages.
        batch: how many requests it is asked at once, at most.
    """

    limits: MessageLimits = field(default_factory=MessageLimits)
    batch: int = 1

    def with_absolute_paths(self) -> Recipe:
        """The same for a process that runs in another folder."""
        options = {name: _absolute(value) for name, value in vars(self.options).items()}
        return replace(
            self,
            checkpoint=Path(self.checkpoint).expanduser().absolute(),
            base=self.base and Path(self.base).expanduser().absolute(),
            options=PolicyOptions(**options),
        )


class PolicyReplica:
    """What runs in a replica's process: a policy that is warm before Ray sends it anything."""

    def __init__(self, recipe: Recipe) -> None:
        self._answerer = Answerer(recipe.make(), recipe.limits, recipe.batch)
        self._seconds = self._answerer.warm_up(lambda: None)
        self._suspect = False

    def describe(self) -> dict[str, Any]:
        """The greeting's frame, the policy's metadata, and how long the first chunk took."""
        return {
            "greeting": self._answerer.metadata(),
            "metadata": dict(self._answerer.policy.metadata),
            "seconds": self._seconds,
        }

    async def answer(self, requests: list[dict[str, Any]], ages: list[float]) -> list[Answer]:
        """The answers to requests whose fields are given, and that arrived `ages` seconds ago.

        In a thread, so that Ray's question for the replica's health is answered meanwhile.
        """
        now = time.perf_counter()
        made = [
            Request(**fields, arrived=now - age) for fields, age in zip(requests, ages, strict=True)
        ]
        try:
            answers = await asyncio.to_thread(self._answerer.answer, made)
        except asyncio.CancelledError:
            for request in made:
                request.abandon()
            raise
        self._suspect |= any(answer.outcome == "internal" for answer in answers)
        return answers

    async def check_health(self) -> None:
        """Ray asks every few seconds, and replaces a replica for which this raises.

        An internal error may come from one odd observation or from a device that is lost: a chunk
        for nobody tells.
        """
        if self._suspect:
            await asyncio.to_thread(self._answerer.warm_up, lambda: None)
            self._suspect = False


@dataclass(frozen=True)
class Described:
    """What is known of the replicas' policy where its weights are not.

    Attributes:
        pipeline: its pre- and post-processing.
        metadata: see `Policy`.
    """

    pipeline: Pipeline
    metadata: Mapping[str, Any]

    @property
    def robot(self) -> Robot:
        """The robot's table."""
        return self.pipeline.robot


class Replicas:
    """Answers requests by asking replicas, several at a time; in place of an `Answerer`.

    Attributes:
        policy: what all of them are.
        limits: of messages.
        at_once: how many replicas may be asked at the same time.
        recording: answers say what is to be recorded of them.
    """

    def __init__(
        self,
        ask: Callable[[list[dict[str, Any]], list[float]], Any],
        pipeline: Pipeline,
        limits: MessageLimits,
        description: Mapping[str, Any],
        at_once: int = 1,
        seed: int = 0,
        lost: type[Exception] = ConnectionError,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            ask: sends requests to any replica (see `PolicyReplica.answer`); returns Ray's
                DeploymentResponse.
            pipeline: the policy's.
            description: `PolicyReplica.describe`.
            seed: of the noise. It is drawn here, so that a request that is asked again has the
                same answer.
            lost: what a response raises if its replica is gone.
            stop: called by `close`.
        """
        self.policy = Described(pipeline, description["metadata"])
        self.limits = limits
        self.at_once = at_once
        self.recording = False
        self._ask, self._lost, self._stop = ask, lost, stop
        self._greeting: bytes = description["greeting"]
        self._seconds: float = description["seconds"]
        self._generator = torch.Generator().manual_seed(seed)
        self._numbers = itertools.count(1)
        self._last: tuple[int, bytes, bytes] | None = None

    @property
    def last(self) -> Chunk | None:
        """The last observation and its actions; None: there was none yet."""
        if self._last is None:
            return None
        number, asked, answered = self._last
        observation, _ = split_extras(unpack(asked, self.limits))
        return Chunk(number, observation, unpack(answered, self.limits)["actions"])

    def metadata(self) -> bytes:
        """The frame that greets a client."""
        return self._greeting

    def warm_up(self, on_step: Callable[[], None]) -> float:
        """Replicas are warm before they are asked; returns the seconds of one's first chunk."""
        on_step()
        return self._seconds

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers to requests, in their order; nothing is raised. For any number of threads.

        Requests whose replica is lost are asked once more.
        """
        fields = [self._fields(request) for request in requests]
        now = time.perf_counter()
        stages = [{"queue": now - request.arrived} for request in requests]
        try:
            for _ in range(2):
                try:
                    answers = self._wait(requests, fields)
                except self._lost as error:
                    said = reason(error).partition(". ")[0]  # of several with addresses
                    logger.warning("a replica was lost while it computed (%s)", said)
                else:
                    return list(map(self._remember, requests, answers))
            return [Answer(LOST, "lost", own) for own in stages]
        except Exception as error:  # of any kind: clients wait, and others come after them
            return [
                failure(request.problem() or error, own)
                for request, own in zip(requests, stages, strict=True)
            ]

    def _fields(self, request: Request) -> dict[str, Any]:
        """What a replica is told of a request."""
        config = self.policy.pipeline.config
        return {
            "frame": request.frame,
            "timeout": request.timeout,
            "previous": request.previous,
            "noise": torch.randn(1, config.horizon, config.action_dim, generator=self._generator),
        }

    def close(self) -> None:
        """Ends the replicas."""
        self._stop()

    def _wait(self, requests: Sequence[Request], fields: list[dict[str, Any]]) -> list[Answer]:
        """Asks, and waits for as long as one of the answers is wanted."""
        now = time.perf_counter()
        response = self._ask(fields, [now - request.arrived for request in requests])
        while True:
            try:
                answers: list[Answer] = response.result(timeout_s=POLL)
                return answers
            except TimeoutError:
                try:
                    check_any(requests)
                except (AbandonedError, TimeoutError):
                    response.cancel()
                    raise

    def _remember(self, request: Request, answer: Answer) -> Answer:
        """The answer, with what is to be recorded of it."""
        asked, answered = request.frame, answer.frame
        if answer.state is None or isinstance(asked, str) or isinstance(answered, str):
            return answer
        self._last = next(self._numbers), asked, answered
        if not self.recording:
            return answer
        observation, extras = split_extras(unpack(asked, self.limits))
        told = (observation, answer.state, unpack(answered, self.limits)["actions"])
        frame = Frame(request.client, *told, extras.reset, request.arrived, len(asked))
        return replace(answer, recorded=frame)


def start_replicas(
    recipe: Recipe,
    pipeline: Pipeline,
    scale: Scale,
    seed: int = 0,
    check_here: Callable[[], None] = lambda: None,
) -> Replicas:
    """Replicas that are warm, on the Ray cluster that RAY_ADDRESS names or that runs on this
    machine, else in a Ray that is started here and ended with them.

    Args:
        pipeline: of the same checkpoint.
        seed: of the noise.
        check_here: called before they start, if all of them will be on this machine.

    Raises:
        Pi0Error: Ray is not installed, or the replicas cannot start.
    """
    require_ray()
    import ray
    from ray import serve
    from ray.exceptions import RayActorError

    started = connect()
    most = scale.most or scale.replicas
    count: dict[str, Any] = {"num_replicas": scale.replicas}
    if scale.most is not None:
        bounds = {"min_replicas": scale.replicas, "max_replicas": most}
        count = {"autoscaling_config": {**bounds, "target_ongoing_requests": 1}}

    def stop() -> None:
        serve.delete(scale.name)
        if started:
            serve.shutdown()
        ray.shutdown()

    if started:
        try:
            check_here()
        except BaseException:
            ray.shutdown()
            raise
    require_room(ray.cluster_resources(), scale, ray.shutdown)
    serve.start(proxy_location="Disabled")  # robots speak to this server, not to Ray's
    deployment = serve.deployment(
        PolicyReplica,
        name="policy",
        max_ongoing_requests=1,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        **count,
    )
    try:
        handle = serve.run(
            deployment.bind(recipe.with_absolute_paths()), name=scale.name, route_prefix=None
        )
        described = handle.describe.remote().result(timeout_s=START_TIMEOUT)
    except BaseException as error:  # Ray has many; Ctrl-C leaves no replicas behind either
        stop()
        if not isinstance(error, Exception):
            raise
        raise Pi0Error(
            f"--replicas: expected {scale.replicas} to start, found an error: {reason(error)}."
        ) from error
    said = pipeline, recipe.limits, described, most, seed, RayActorError, stop
    return Replicas(handle.answer.remote, *said)


def _absolute(value: Any) -> Any:
    """The value of an option; a file's path as seen from anywhere."""
    if isinstance(value, (str, Path)) and Path(value).expanduser().is_file():
        return Path(value).expanduser().absolute()
    return value
