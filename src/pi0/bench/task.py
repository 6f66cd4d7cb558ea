"""What the benchmark and its workers tell each other, and the inputs that all engines run on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pi0.config import Pi0Config
from pi0.engines.base import choose_precision
from pi0.errors import ConfigError
from pi0.inputs import ModelInputs, random_inputs

RESULT_FILE, ACTIONS = "told.json", "actions.npz"  # what a worker writes into its folder


@dataclass(frozen=True)
class EngineSpec:
    """An engine, its precision, and its device (None: the engine's default)."""

    name: str
    dtype: str
    device: str | None

    @property
    def label(self) -> str:
        return f"{self.name}:{self.dtype}" + (f"@{self.device}" if self.device else "")


@dataclass(frozen=True)
class Workload:
    """What is asked of an engine: so many cameras, the last of them masked; so many text tokens,
    the first of them valid; denoising steps; rows of the batch, all alike."""

    cameras: int
    masked: int
    tokens: int
    valid: int
    steps: int
    batch: int = 1

    def __post_init__(self) -> None:
        if self.masked >= self.cameras:
            raise ConfigError(
                f"masked: expected fewer than the {self.cameras} cameras, found {self.masked}."
            )
        if self.valid > self.tokens:
            raise ConfigError(
                f"valid: expected at most the {self.tokens} text tokens, found {self.valid}."
            )


@dataclass(frozen=True)
class WorkerTask:
    """What one worker does.

    Attributes:
        repeat: timed calls at each point.
        seeds: of noise, for accuracy; 0: no accuracy.
        sweep: points whose times are asked instead of a visit to `point`.
    """

    checkpoint: str
    spec: EngineSpec
    point: Workload
    repeat: int
    seeds: int
    seed: int
    sweep: tuple[Workload, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerTask:
        told = json.loads(text)
        told["spec"], told["point"] = EngineSpec(**told["spec"]), Workload(**told["point"])
        told["sweep"] = tuple(Workload(**point) for point in told["sweep"])
        return cls(**told)


@dataclass(frozen=True)
class Trial:
    """What a worker measured. Milliseconds, but for `load_s` and the clock of `first_action_at`.

    Attributes:
        load_s: opening the checkpoint and making the engine.
        first_action_at: when the first actions were there, in seconds of `time.monotonic`, which
            is the same in all processes of a machine.
        sample_ms: each timed call.
        prefill_ms, step_ms: of a pass in parts; `vision_ms` is the part of prefill until the
            projector's result, None where the engine does not show it.
        peak_bytes: of the process that computes; `cuda_bytes` of a CUDA device's memory.
        device: cpu or cuda.
        implementation, torch: of an engine from outside its name and version, and its PyTorch.
    """

    load_s: float
    first_action_at: float
    sample_ms: list[float]
    prefill_ms: float
    vision_ms: float | None
    step_ms: float
    peak_bytes: int
    cuda_bytes: int | None
    threads: int
    device: str
    implementation: str | None
    torch: str


def parse_spec(text: str) -> EngineSpec:
    """ENGINE, ENGINE:DTYPE or ENGINE:DTYPE@DEVICE.

    Raises:
        EngineError: no such engine or precision.
    """
    rest, _, device = text.partition("@")
    name, _, dtype = rest.partition(":")
    return EngineSpec(name, choose_precision(name, dtype or None), device or None)


def workload_inputs(config: Pi0Config, point: Workload, seed: int) -> tuple[ModelInputs, Tensor]:
    """Random inputs as a point asks for, and noise [batch, horizon, action_dim]."""
    inputs, noise = random_inputs(config, point.cameras, point.tokens, seed)
    inputs.image_mask[:, point.cameras - point.masked :] = False
    inputs.token_mask[:, point.valid :] = False
    rows = {name: torch.cat([value] * point.batch) for name, value in vars(inputs).items()}
    return ModelInputs(**rows), torch.cat([noise] * point.batch)
