"""The messages between the benchmark and its workers, and the inputs that all engines run on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pi0.config import Pi0Config
from pi0.engines.spec import EngineSpec
from pi0.errors import ConfigError
from pi0.inputs import ModelInputs, random_inputs

RESULT_FILE, ACTIONS = "result.json", "actions.npz"  # what a worker writes into its folder


@dataclass(frozen=True)
class Workload:
    """The size of a sampling call.

    Attributes:
        cameras: how many, of which the last `masked` are masked.
        tokens: how many text tokens, of which the first `valid` are valid.
        steps: denoising steps.
        batch: rows, all alike.
    """

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
        checkpoint, base: paths; the second is an adapter's full model, if it is named.
        horizon, max_tokens: as for `open_checkpoint`.
        repeat: timed calls at each point.
        seeds: of noise, for accuracy; 0: no accuracy.
        sweep: workloads to time instead of a visit to `point`.
    """

    checkpoint: str
    spec: EngineSpec
    point: Workload
    repeat: int
    seeds: int
    seed: int
    sweep: tuple[Workload, ...] = ()
    base: str | None = None
    horizon: int | None = None
    max_tokens: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerTask:
        values = json.loads(text)
        values["spec"], values["point"] = EngineSpec(**values["spec"]), Workload(**values["point"])
        values["sweep"] = tuple(Workload(**point) for point in values["sweep"])
        return cls(**values)


@dataclass(frozen=True)
class Trial:
    """What a worker measured. Milliseconds, but for `load_s` and the clock of `first_action_at`.

    Attributes:
        load_s: opening the checkpoint and making the engine.
        first_action_at: when the first actions were computed, in seconds of `time.monotonic`,
            which is the same in all processes of a machine.
        sample_ms: each timed call.
        prefill_ms, step_ms: of a pass in parts; `vision_ms` is the part of prefill until the
            projector's result, None where the engine does not show it.
        peak_bytes: of the process that computes; `cuda_bytes` of a CUDA device's memory.
        device: the kind of device: cpu, cuda or another.
        implementation, torch: the package that computes and its version, and its PyTorch's.
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
    implementation: str
    torch: str


def workload_inputs(config: Pi0Config, point: Workload, seed: int) -> tuple[ModelInputs, Tensor]:
    """Random inputs of a workload, and noise [batch, horizon, action_dim]."""
    inputs, noise = random_inputs(config, point.cameras, point.tokens, seed)
    inputs.image_mask[:, point.cameras - point.masked :] = False
    inputs.token_mask[:, point.valid :] = False
    rows = {name: torch.cat([value] * point.batch) for name, value in vars(inputs).items()}
    return ModelInputs(**rows), torch.cat([noise] * point.batch)
