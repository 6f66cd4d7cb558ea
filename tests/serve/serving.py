"""A server in a thread, policies whose answers tell whose observation they saw, a plain client."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor
from websockets.sync.client import ClientConnection, connect

from pi0.checkpoint.synth import byte_tokenizer
from pi0.config import PRESETS
from pi0.engines.base import Capabilities, Engine, EngineOptions
from pi0.inputs import ModelInputs
from pi0.model import Tap
from pi0.model.pi0 import no_tap
from pi0.policy import ROBOTS, Pipeline, Policy
from pi0.policy.normalize import make_normalizer
from pi0.policy.tokenizer import PromptFormat, Tokenizer
from pi0.serve.binding import bind
from pi0.serve.options import ServeOptions
from pi0.serve.replicas import Replicas
from pi0.serve.server import PolicyServer
from pi0.serve.wire import MessageLimits, pack, unpack

OPENPI_PYTHON = Path(__file__).parents[2] / ".venv-openpi" / "bin" / "python"
NO_OPENPI = "needs openpi-client in .venv-openpi (make .venv-openpi/installed)"
IMAGE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
WIDTH = 14  # of states and actions
SOON = 20.0  # seconds in which a busy machine does what takes milliseconds


class StateEngine(Engine):
    """Its actions are the state's first value, each of them; it computes as long as it is told."""

    name = "state"
    capabilities = Capabilities(precisions=("float32",))

    def __init__(self, seconds: float = 0.0, scale: float = 1.0) -> None:
        super().__init__(SimpleNamespace(config=PRESETS["tiny"]), EngineOptions("float32"))
        self.seconds, self.scale = seconds, scale
        self.computed: list[float] = []
        self.batches: list[int] = []  # how many observations each call had
        self.gate = threading.Event()  # calls wait for it
        self.gate.set()
        self.started = threading.Semaphore(0)

    def prefill(self, inputs: ModelInputs, tap: Tap = no_tap) -> ModelInputs:
        return inputs

    def velocity(self, x_t: Tensor, t: Tensor, cache: ModelInputs, tap: Tap = no_tap) -> Tensor:
        return (x_t - cache.state[:, :1, None]) / t[:, None, None]

    def _sample(
        self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: Callable[[], None]
    ) -> Tensor:
        self.started.release()
        self.gate.wait(SOON)
        for _ in range(steps):
            time.sleep(self.seconds / steps)
            on_step()
        self.computed += inputs.state[:, 0].tolist()
        self.batches.append(len(noise))
        return inputs.state[:, :1, None].expand_as(noise) * self.scale


def make_policy(engine: Engine, robot: str = "generic", **options: Any) -> Policy:
    """A policy that changes nothing of the engine's actions but cutting them to the robot."""
    backend = byte_tokenizer()
    stats = {"mean": np.zeros(WIDTH), "std": np.ones(WIDTH)}
    state, actions = (
        make_normalizer(what, "mean_std", "openpi", stats) for what in ("state", "actions")
    )
    pipeline = Pipeline(
        config=PRESETS["tiny"],
        robot=ROBOTS[robot],
        tokenizer=Tokenizer(lambda text: list(backend.encode(text).ids), 2, 260, Path("bytes")),
        resize="openpi",
        prompt=PromptFormat("openpi", 48),
        state_stats=state,
        action_stats=actions,
        target_stats=actions,
    )
    return Policy(pipeline, engine, **options)


def observation(value: float, **changes: Any) -> dict[str, Any]:
    """An observation of robot generic whose state begins with a value; None removes a key."""
    state = np.zeros(WIDTH, np.float32)
    state[0] = value
    made = {"images": {"base": IMAGE}, "state": state, "prompt": "go", **changes}
    return {key: inner for key, inner in made.items() if inner is not None}


@dataclass
class Running:
    """A server that runs, and what a test needs of it."""

    server: PolicyServer
    port: int
    loop: asyncio.AbstractEventLoop
    stop_event: asyncio.Event
    ready: threading.Event = field(default_factory=threading.Event)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.stop_event.set)

    @contextlib.contextmanager
    def connect(self, **options: Any) -> Iterator[ClientConnection]:
        """A connection that has read the metadata."""
        address = f"ws://{self.address}"
        with connect(address, compression=None, max_size=None, **options) as client:
            read(client)
            yield client


@contextlib.contextmanager
def running(
    policy: Policy | Replicas,
    options: ServeOptions | None = None,
    wait: bool = True,
    send_buffer: int | None = None,
) -> Iterator[Running]:
    """A server of a policy on a free port; it has ended when the block ends.

    Args:
        wait: until the policy is warm.
        send_buffer: bytes that the system keeps for a client that does not read.
    """
    sock = bind("127.0.0.1", 0)
    if send_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    ready, failures, made = threading.Event(), [], []
    created = threading.Event()

    async def serve() -> None:
        server = PolicyServer(policy, options)
        stop = asyncio.Event()
        made.append(Running(server, sock.getsockname()[1], asyncio.get_running_loop(), stop, ready))
        created.set()
        await server.serve(sock, stop, lambda _: ready.set())

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failures.append(error)
        finally:
            created.set()
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert created.wait(SOON)
        if wait:
            assert ready.wait(SOON)
        if failures:
            raise failures[0]
        yield made[0]
    finally:
        if made:
            made[0].stop()
        thread.join(SOON)
        sock.close()
    assert not thread.is_alive()
    if failures:
        raise failures[0]


def read(client: ClientConnection) -> Any:
    """The next frame: unpacked, or a text as it is."""
    frame = client.recv(timeout=SOON)
    return frame if isinstance(frame, str) else unpack(frame, MessageLimits())


def ask(client: ClientConnection, value: dict[str, Any]) -> Any:
    """The answer to an observation."""
    client.send(pack(value))
    return read(client)


def ask_together(
    served: Running, clients: int, rounds: int
) -> tuple[list[dict[str, Any]], list[tuple[int, Any]]]:
    """Several clients ask at the same time, round after round, each with values of its own.

    Returns:
        The answers that are a client's own, and all others with the client's number.
    """
    own: list[dict[str, Any]] = []
    wrong: list[tuple[int, Any]] = []

    def loop(me: int, client: ClientConnection) -> None:
        for i in range(rounds):
            value = me + i / 64
            answer = ask(client, observation(value))
            if isinstance(answer, str) or not np.allclose(answer["actions"], value, rtol=1e-5):
                wrong.append((me, answer))
            else:
                own.append(answer)

    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(served.connect()) for _ in range(clients)]
        threads = [threading.Thread(target=loop, args=pair) for pair in enumerate(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return own, wrong


def eventually(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
