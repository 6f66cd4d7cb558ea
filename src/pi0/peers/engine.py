"""Engines that ask another implementation of π0, which runs in a process of its own."""

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
from pi0.dtypes import DTYPES
from pi0.engines.base import Capabilities, Engine, EngineOptions, exclusive
from pi0.engines.reference import parse_device
from pi0.errors import EngineError
from pi0.inputs import ModelInputs
from pi0.model import Tap
from pi0.model.pi0 import no_tap
from pi0.peers.frames import Message, receive, send


class PeerEngine(Engine):
    """Another implementation, in a process of its own. It shows few stages, and none can be fed.

    `name` is also the name of its Python package.
    """

    capabilities = Capabilities(
        precisions=tuple(DTYPES),
        devices=("cpu", "cuda"),
        shows_stages=False,
        feedable=False,
        peer=True,
    )
    install: ClassVar[str]  # a sentence that says how

    def __init__(self, checkpoint: Checkpoint, options: EngineOptions) -> None:
        super().__init__(checkpoint, options)
        source = Path(pi0.__file__).parents[1]
        command = [self.python(), "-m", "pi0.peers.worker", self.name]
        sizes = str(checkpoint.config.horizon), str(checkpoint.config.max_tokens)
        where = str(checkpoint.path.absolute())
        base = str(checkpoint.base.absolute()) if checkpoint.base else ""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the engine
        self._worker = subprocess.Popen(
            [*command, where, base, *sizes, options.precision, options.device or "cpu"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": str(source)},
        )
        self._stop = weakref.finalize(self, stop, self._worker, self._log)
        ready = self._answer()
        self._implementation, self._torch = str(ready["name"]), str(ready["torch"])
        self._peak = (0, 0)
        self._prefixes = 0

    @classmethod
    def check_available(cls, config: Pi0Config, options: EngineOptions) -> None:
        """See `Engine`; whether its interpreter can use the device is known when it starts."""
        parse_device(options.device or "cpu")
        if options.image_size not in (None, config.vision.image_size):
            raise EngineError(
                f"image_size: expected the checkpoint's {config.vision.image_size} for engine "
                f"{cls.name}, found {options.image_size}."
            )
        cls.python()

    @property
    def implementation(self) -> str:
        """Its name and version."""
        return self._implementation

    @property
    def torch_version(self) -> str:
        """The version of PyTorch that its process runs on."""
        return self._torch

    def peak_memory(self) -> tuple[int, int]:
        """Of its process; see `Engine`."""
        return self._peak

    @classmethod
    def python(cls) -> str:
        """The interpreter that has the implementation.

        Raises:
            EngineError: none is known.
        """
        if importlib.util.find_spec(cls.name):
            return sys.executable
        raise EngineError(f"engine {cls.name}: expected it installed, found none. {cls.install}")

    @exclusive
    def prefill(self, inputs: ModelInputs, tap: Tap = no_tap) -> int:
        """The number of the prefix; its process keeps the last only."""
        answer = self._ask("prefill", **arrays_of(inputs))
        if "prefix" in answer:
            tap("prefix", torch.from_numpy(answer["prefix"]))
        self._prefixes += 1
        return self._prefixes

    @exclusive
    def velocity(self, x_t: Tensor, t: Tensor, cache: int, tap: Tap = no_tap) -> Tensor:
        if cache != self._prefixes:
            raise EngineError(
                f"engine {self.name}: expected the prefix of the last prefill, found an older."
            )
        answer = self._ask("velocity", x_t=x_t.numpy(), t=t.numpy())
        v = torch.from_numpy(answer["velocity"])
        tap("velocity", v)
        return v

    def _sample(
        self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: Callable[[], None]
    ) -> Tensor:
        """See `Engine`; by the implementation's own loop."""
        answer = self._ask("sample", noise=noise.numpy(), steps=steps, **arrays_of(inputs))
        for _ in range(steps):
            on_step()
        return torch.from_numpy(answer["actions"])

    def _close(self) -> None:
        self._stop()

    def _ask(self, command: str, **arrays: object) -> Message:
        with contextlib.suppress(BrokenPipeError):  # `_answer` raises the error
            assert self._worker.stdin
            send(self._worker.stdin, command=command, **arrays)
        answer = self._answer()
        self.own_seconds = float(answer["seconds"])
        self._peak = int(answer["peak"]), int(answer["cuda_peak"])
        return answer

    def _answer(self) -> Message:
        assert self._worker.stdout
        message = receive(self._worker.stdout)
        if message is None:
            self._log.seek(0)
            output = self._log.read().decode(errors="replace").strip().splitlines()
            raise EngineError(
                f"engine {self.name}: expected an answer of its process, found that it ended "
                f"({output[-1] if output else 'without output'})."
            )
        if "error" in message:
            raise EngineError(f"engine {self.name}: {message['error']}")
        return message


class TransformersEngine(PeerEngine):
    """transformers' π0."""

    name = "transformers"
    install = "Install it: pip install 'transformers>=5.5'."

    @classmethod
    def check_available(cls, config: Pi0Config, options: EngineOptions) -> None:
        """See `Engine`."""
        if config.adaptive_norm:
            raise EngineError(
                "engine transformers: expected a π0, found a π0.5, which transformers does not "
                "have. Use engine lerobot."
            )
        super().check_available(config, options)


class LerobotEngine(PeerEngine):
    """LeRobot's π0 and π0.5."""

    name = "lerobot"
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
        local = Path(".venv-lerobot/bin/python")
        return named or (str(local.absolute()) if local.exists() else super().python())


def arrays_of(inputs: ModelInputs) -> dict[str, Any]:
    return {name: value.numpy() for name, value in vars(inputs).items()}


def stop(worker: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    for pipe in (worker.stdin, worker.stdout, log):
        if pipe:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    worker.wait()
