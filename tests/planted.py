"""Bugs planted in an engine's code, and verify's answer to them.

A plant patches the engine's own modules, never `pi0.model`, which the reference runs; so every
engine made while it is in place has the bug, as if it stood in the source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.checkpoint.synth import TRAINED_LIKE, synthesise
from pi0.config import PRESETS
from pi0.engines.base import Engine, make_engine
from pi0.engines.spec import EngineSpec
from pi0.inputs import ModelInputs
from pi0.model.flow import schedule
from pi0.verify.cases import Case, default_cases
from pi0.verify.record import EngineRun
from pi0.verify.run import VerifyResult, record_reference, unrounded_engine, verify

STEPS = 3
REFERENCE = "reference:float32"
EXPERT, VLM, VISION = (
    "expert_transformer.block.0",
    "vlm_transformer.block.0",
    "vision_tower.block.0",
)
Planting = Callable[[pytest.MonkeyPatch], None]
_references: dict[tuple[Path, int], EngineRun] = {}  # by path and seed


@dataclass(frozen=True)
class Plant:
    """A bug.

    Attributes:
        plant: patches the modules.
        blamed: the row that verify has to name first.
        change: done to the candidate alone, once it is made: a bug of one precision.
    """

    name: str
    blamed: str
    plant: Planting = lambda patch: None
    change: Callable[[Engine], None] = lambda engine: None


def rope_base(module: ModuleType, base: float) -> Planting:
    """In a module that takes the angles of rotations from the model."""

    def angles(positions: Tensor, head_dim: int) -> Tensor:
        half = head_dim // 2
        return positions[..., None] * base ** (-torch.arange(half) / half)

    return lambda patch: patch.setattr(module, "rotary_angles", angles)


def euler_at_the_steps_end(module: ModuleType) -> Planting:
    """In a module that takes the times of steps from the model."""
    return lambda patch: patch.setattr(
        module, "schedule", lambda steps: [*schedule(steps)[1:], 0.0]
    )


def padded_text_seen(module: ModuleType) -> Planting:
    """In a module that takes the prefix's validity from the inputs."""
    valid = module.prefix_valid

    def seen(inputs: ModelInputs, patches: int) -> Tensor:
        text = torch.ones_like(inputs.token_mask)
        return valid(replace(inputs, token_mask=text), patches)

    return lambda patch: patch.setattr(module, "prefix_valid", seen)


def velocity_gain(kind: type) -> Planting:
    """In a class with a method of the velocity."""
    velocity = kind.velocity
    return lambda patch: patch.setattr(
        kind, "velocity", lambda *args, **more: 0.92 * velocity(*args, **more)
    )


def trained_like(folder: Path, preset: str = "tiny", seed: int = 0) -> Checkpoint:
    """A checkpoint whose attention is peaked, in bfloat16 as the published ones."""
    layout = LAYOUTS["openpi"]
    config = PRESETS[preset]
    synthesise(folder, config, layout, seed, torch.bfloat16, statistics=TRAINED_LIKE)
    return open_checkpoint(folder)


def observation(checkpoint: Checkpoint, seed: int) -> list[Case]:
    return default_cases(checkpoint.config, cameras=2, tokens=12, seed=seed)


def reference(checkpoint: Checkpoint, seed: int = 0) -> EngineRun:
    """Recorded once for all bugs of a module: none of them is in the reference."""
    key = checkpoint.path, seed
    if key not in _references:
        _references[key] = record_reference(
            lambda: make_engine(REFERENCE, checkpoint),
            observation(checkpoint, seed),
            STEPS,
        )
    return _references[key]


def verified(
    checkpoint: Checkpoint,
    engine: str,
    change: Callable[[Engine], None] = lambda made: None,
    seed: int = 0,
) -> VerifyResult:
    """What `pi0 verify` finds by default, on a small observation."""
    spec = EngineSpec.parse(engine)
    unrounded = unrounded_engine(EngineSpec.parse(REFERENCE), spec)

    def candidate() -> Engine:
        made = make_engine(spec, checkpoint)
        change(made)
        return made

    return verify(
        reference(checkpoint, seed),
        candidate,
        observation(checkpoint, seed),
        steps=STEPS,
        unrounded=None if unrounded is None else lambda: make_engine(unrounded, checkpoint),
    )


def check_plant(
    checkpoint: Checkpoint, engine: str, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asserts that verify blames what the plant says."""
    reference(checkpoint)  # before the bug is there
    plant.plant(monkeypatch)
    failure = verified(checkpoint, engine, plant.change).first_failure
    assert failure is not None, f"{plant.name}: not caught"
    assert failure.name == plant.blamed, f"{plant.name}: {failure.exceeded}"
