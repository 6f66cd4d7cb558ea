"""Engines that ask another implementation, in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

import pi0
from pi0.checkpoint.load import Checkpoint
from pi0.config import Pi0Config
from pi0.engines.base import Engine, require_finite
from pi0.engines.reference import parse_device
from pi0.errors import EngineError
from pi0.inputs import ModelInputs
from pi0.model import Tap
from pi0.model.pi0 import no_tap
from pi0.model.precision import DTYPES
from pi0.peers.frames import Message, receive, send


class PeerEngine(Engine):
    """Another implementation. It shows few stages, and none can be fed.

    Attributes:
        implementation: its name and version.
        torch: the version of PyTorch that it runs on.
        seconds: that its last answer took, without the way there.
        peak, cuda_peak: bytes of memory that its process has held at most, and of a CUDA device's.
    """

    precisions = tuple(DTYPES)
    module: ClassVar[str]
    install: ClassVar[str]
    seconds = 0.0
    peak = cuda_peak = 0

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str | None = None,
        dtype: str = "float32",
        image_size: int | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.config = checkpoint.config
        self.need(self.config, device, image_size)
        source = Path(pi0.__file__).parents[1]
        words = [self.python(), "-m", "pi0.peers.worker", self.module]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the engine
        self._worker = subprocess.Popen(
            [*words, str(checkpoint.path.absolute()), dtype, device or "cpu"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": str(source)},
        )
        weakref.finalize(self, stop, self._worker, self._log)
        ready = self._answer()
        self.implementation, self.torch = str(ready["name"]), str(ready["torch"])
        self._prefixes = 0

    @classmethod
    def need(cls, config: Pi0Config, device: str | None, image_size: int | None) -> None:
        """See `pi0.engines.base.need_engine`."""
        parse_device(device or "cpu")
        if image_size not in (None, config.vision.image_size):
            raise EngineError(
                f"image_size: expected the checkpoint's {config.vision.image_size} for engine "
                f"{cls.module}, found {image_size}."
            )
        cls.python()

    @classmethod
    def python(cls) -> str:
        """The interpreter that has the implementation.

        Raises:
            EngineError: none is known.
        """
        if importlib.util.find_spec(cls.module):
            return sys.executable
        raise EngineError(f"engine {cls.module}: expected it installed, found none. {cls.install}")

    def prefill(self, inputs: ModelInputs, tap: Tap = no_tap) -> int:
        """The number of the prefix; the worker keeps the last only."""
        answer = self._ask("prefill", **arrays_of(inputs))
        if "prefix" in answer:
            tap("prefix", torch.from_numpy(answer["prefix"]))
        self._prefixes += 1
        return self._prefixes

    def velocity(
        self, x_t: Tensor, t: Tensor, state: Tensor, cache: int, tap: Tap = no_tap
    ) -> Tensor:
        if cache != self._prefixes:
            raise EngineError(
                f"engine {self.module}: expected the prefix of the last prefill, found an older."
            )
        answer = self._ask("velocity", x_t=x_t.numpy(), t=t.numpy(), state=state.numpy())
        v = torch.from_numpy(answer["velocity"])
        tap("velocity", v)
        return v

    def sample(
        self,
        inputs: ModelInputs,
        noise: Tensor,
        steps: int = 10,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """See `Engine`; by the implementation's own loop."""
        answer = self._ask("sample", noise=noise.numpy(), steps=steps, **arrays_of(inputs))
        for _ in range(steps):
            on_step()
        return require_finite(torch.from_numpy(answer["actions"]))

    def _ask(self, command: str, **arrays: object) -> Message:
        with contextlib.suppress(BrokenPipeError):  # said by `_answer`
            assert self._worker.stdin
            send(self._worker.stdin, command=command, **arrays)
        answer = self._answer()
        self.seconds = float(answer["seconds"])
        self.peak, self.cuda_peak = int(answer["peak"]), int(answer["cuda_peak"])
        return answer

    def _answer(self) -> Message:
        assert self._worker.stdout
        message = receive(self._worker.stdout)
        if message is None:
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip().splitlines()
            raise EngineError(
                f"engine {self.module}: expected an answer of its process, found that it ended "
                f"({said[-1] if said else 'without a word'})."
            )
        if "error" in message:
            raise EngineError(f"engine {self.module}: {message['error']}")
        return message


class TransformersEngine(PeerEngine):
    """transformers' π0."""

    module = "transformers"
    install = "Install it: pip install 'transformers>=5.5'."


class LerobotEngine(PeerEngine):
    """LeRobot's π0."""

    module = "lerobot"
    install = (
        "Install it into an environment of Python 3.12 (pip install 'lerobot[pi]==0.6.1') and name "
        "its interpreter in PI0_LEROBOT_PYTHON."
    )

    @classmethod
    def python(cls) -> str:
        """This interpreter, PI0_LEROBOT_PYTHON, or .venv-lerobot in the working directory."""
        named = os.environ.get("PI0_LEROBOT_PYTHON")
        if named and not Path(named).exists():
            raise EngineError(f"PI0_LEROBOT_PYTHON: expected an interpreter, found no {named}.")
        beside = Path(".venv-lerobot/bin/python")
        return named or (str(beside.absolute()) if beside.exists() else super().python())


PEERS: dict[str, type[PeerEngine]] = {
    "transformers": TransformersEngine,
    "lerobot": LerobotEngine,
}


def arrays_of(inputs: ModelInputs) -> dict[str, Any]:
    return {name: value.numpy() for name, value in vars(inputs).items()}


def stop(worker: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    for pipe in (worker.stdin, worker.stdout, log):
        if pipe:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    worker.wait()
