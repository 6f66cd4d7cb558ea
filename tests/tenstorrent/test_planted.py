"""Every planted bug in the TTNN network is caught in both precisions of a card, and the right stage
is blamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planted import (
    EXPERT,
    VISION,
    VLM,
    Plant,
    check_plant,
    euler_at_the_steps_end,
    padded_text_seen,
    rope_base,
    trained_like,
    velocity_gain,
    verified,
)
from torch import Tensor

from pi0.checkpoint.load import Checkpoint
from pi0.engines.tenstorrent import engine as tt
from pi0.engines.tenstorrent import golden, layout
from pi0.engines.tenstorrent.backend import Upload
from pi0.engines.tenstorrent.layout import MASKED, TileLayout
from pi0.engines.tenstorrent.ops import Ops
from pi0.engines.tenstorrent.precision import BFP8, HOST_PRESETS
from pi0.engines.tenstorrent.silicon import Fpu

pytestmark = pytest.mark.ttnn
Patch = pytest.MonkeyPatch
PRECISIONS = ("accurate", "fast")


def gate_and_up_swapped(patch: Patch) -> None:
    original = Ops.gelu_product
    patch.setattr(Ops, "gelu_product", lambda self, gate, up: original(self, up, gate))


def change_uploads(change: Callable[[TileLayout, dict[str, Upload]], None]) -> Any:
    def plant(patch: Patch) -> None:
        original = TileLayout.uploads

        def changed(self: TileLayout, *arguments: Any) -> dict[str, Upload]:
            uploads = original(self, *arguments)
            change(self, uploads)
            return uploads

        patch.setattr(TileLayout, "uploads", changed)

    return plant


def hide_last_prefix_token(of: TileLayout, uploads: dict[str, Upload]) -> None:
    mask = uploads["suffix_mask"].value.clone()
    mask[..., of.suffix + of.view["prefix"].rows[-1]] = MASKED  # behind the suffix's own columns
    uploads["suffix_mask"] = replace(uploads["suffix_mask"], value=mask)


def drop_masks(of: TileLayout, uploads: dict[str, Upload]) -> None:
    for name in ("prefix_mask", "suffix_mask"):
        uploads[name] = replace(uploads[name], value=torch.zeros_like(uploads[name].value))


def leave_the_suffix_where_it_is(of: TileLayout, uploads: dict[str, Upload]) -> None:
    """Not rotated."""
    for name, value in (("suffix_cos", 1.0), ("suffix_sin", 0.0)):
        still = torch.full_like(uploads[name].value, value)
        uploads[name] = replace(uploads[name], value=still)


def suffix_positions_too_high(patch: Patch) -> None:
    original = TileLayout._sequence

    def shifted(self: TileLayout, inputs: Any) -> tuple[Tensor, Tensor]:
        mask, positions = original(self, inputs)
        positions = positions.clone()
        positions[self.prefix :] += 1
        return mask, positions

    patch.setattr(TileLayout, "_sequence", shifted)


def half_of_the_state_zero(patch: Patch) -> None:
    original = TileLayout.state

    def half(self: TileLayout, state: Tensor) -> Upload:
        return original(self, torch.cat([state[:, :16], torch.zeros_like(state[:, 16:])], dim=1))

    patch.setattr(TileLayout, "state", half)


def eps(name: str) -> Any:
    def plant(patch: Patch) -> None:
        original = getattr(Ops, name)
        patch.setattr(Ops, name, lambda self, x, norm, epsilon: original(self, x, norm, 1e-5))

    return plant


def padded_heads_scale(patch: Patch) -> None:
    original = Ops.attention

    def scaled(self: Ops, q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
        vision = q.shape[1] == k.shape[1]
        return original(self, q, k, v, mask, scale * (72 / 96) ** 0.5 if vision else scale)

    patch.setattr(Ops, "attention", scaled)


def erf_gelu(patch: Patch) -> None:
    original = golden.activate

    def activate(x: Tensor, unary: Any) -> Tensor:
        return F.gelu(x) if unary.op_type.name == "GELU_TANH" else original(x, unary)

    patch.setattr(golden, "activate", activate)


def matrix_scaled(factor: float) -> Any:
    def plant(patch: Patch) -> None:
        original = tt.build_network

        def scaled(model: Any, *more: Any) -> Any:
            with torch.no_grad():
                model.expert.blocks[1].down_proj.weight *= factor
            return original(model, *more)

        patch.setattr(tt, "build_network", scaled)

    return plant


def sums_in_bfloat16(patch: Patch) -> None:
    """Of 32 products at a time, as registers of a card add them up."""
    original, bfloat16 = Fpu._sums, Fpu(float32_sums=False)
    patch.setattr(Fpu, "_sums", lambda self, x, w: original(bfloat16, x, w))


def a_step_too_long(patch: Patch) -> None:
    original = tt.TtnnEngine._sample
    patch.setattr(
        tt.TtnnEngine,
        "_sample",
        lambda self, inputs, noise, steps, on_step: original(
            self, inputs, noise, steps + 1, on_step
        ),
    )


def stale(*names: str) -> Any:
    """The engine's own loop keeps these inputs from its first call of a shape."""

    def plant(patch: Patch) -> None:
        original = tt.TtnnEngine._sample

        def kept(self: Any, inputs: Any, *more: Any) -> Tensor:
            first = self.__dict__.setdefault("first", inputs)
            old = {name: getattr(first, name) for name in names}
            if first.tokens.shape == inputs.tokens.shape:
                inputs = replace(inputs, **old)
            return original(self, inputs, *more)

        patch.setattr(tt.TtnnEngine, "_sample", kept)

    return plant


def stale_noise(patch: Patch) -> None:
    original = tt.TtnnEngine._sample

    def kept(self: Any, inputs: Any, noise: Tensor, *more: Any) -> Tensor:
        first = self.__dict__.setdefault(f"first_noise_of_{len(noise)}", noise)
        return original(self, inputs, first, *more)

    patch.setattr(tt.TtnnEngine, "_sample", kept)


def norms_in_blocks(patch: Patch) -> None:
    """In the presets of a card alone: rounding that they do not have."""
    for name in PRECISIONS:
        patch.setitem(HOST_PRESETS, name, replace(HOST_PRESETS[name], norm=BFP8))


PLANTS = [
    Plant("gate and up swapped", VLM, gate_and_up_swapped),
    Plant("last prefix token unseen", "sequence", change_uploads(hide_last_prefix_token)),
    Plant("suffix positions one too high", f"{EXPERT}.keys", suffix_positions_too_high),
    Plant("half of the state zero", "suffix", half_of_the_state_zero),
    Plant("RoPE base 10 500", f"{VLM}.keys", rope_base(layout, 10_500.0)),
    Plant("RoPE base 10 001", f"{VLM}.keys", rope_base(layout, 10_001.0)),
    Plant("RMS eps 1e-5", f"{VLM}.keys", eps("rms_norm")),
    Plant("LayerNorm eps 1e-5", VISION, eps("layer_norm")),
    Plant("SigLIP scale of padded heads", VISION, padded_heads_scale),
    Plant("erf GELU", VISION, erf_gelu),
    Plant("Euler's t at the step's end", "sample", euler_at_the_steps_end(tt)),
    Plant("padded text seen", f"{VLM}.keys", padded_text_seen(layout)),  # positions, too
    Plant("a matrix × 1.005", "expert_transformer.block.1", matrix_scaled(1.005)),
    Plant("sums in bfloat16", VISION, sums_in_bfloat16),
    Plant("loop a step too long", "sample", a_step_too_long),
    Plant("sample ignores the state", "sample", stale("state")),
    Plant("sample reuses another image's prefix", "sample", stale("images")),
    Plant("masks dropped", VLM, change_uploads(drop_masks)),
    Plant("suffix not rotated", f"{EXPERT}.keys", change_uploads(leave_the_suffix_where_it_is)),
    Plant("sample reuses another prompt", "sample", stale("tokens")),
    Plant("sample reuses other noise", "sample", stale_noise),
    Plant("velocities × 0.92", "velocity.0", velocity_gain(tt.TtnnEngine)),
    Plant("norms in blocks", "vision_tower", norms_in_blocks),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return trained_like(tmp_path_factory.mktemp("trained_like"))


QUICK = (
    "gate and up swapped",
    "last prefix token unseen",
    "RMS eps 1e-5",
    "erf GELU",
    "Euler's t at the step's end",
    "sums in bfloat16",
    "sample ignores the state",
    "norms in blocks",
)  # the others take two minutes


# π0.5 reads it in the prompt.
WITH_STATE = ("half of the state zero", "sample ignores the state")


@pytest.mark.parametrize(
    ("precision", "plant"),
    [
        pytest.param(
            precision,
            plant,
            marks=() if precision == "fast" and plant.name in QUICK else pytest.mark.slow,
            id=f"{precision}-{plant.name}",
        )
        for precision in PRECISIONS
        for plant in PLANTS
    ],
)
def test_planted(
    checkpoint: Checkpoint, precision: str, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_plant(checkpoint, f"ttnn-host:{precision}", plant, monkeypatch)


@pytest.fixture(scope="module")
def pi05(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return trained_like(tmp_path_factory.mktemp("pi05"), "pi05_tiny")


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "plant", [p for p in PLANTS if p.name not in WITH_STATE], ids=lambda p: p.name
)
def test_planted_in_pi05(
    pi05: Checkpoint, precision: str, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_plant(pi05, f"ttnn-host:{precision}", plant, monkeypatch)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", ["checkpoint", "pi05"])
def test_no_false_alarm(request: pytest.FixtureRequest, path: str, precision: str) -> None:
    result = verified(request.getfixturevalue(path), f"ttnn-host:{precision}")
    assert result.structure == "ttnn-host:exact"
    assert [(row.part, row.name, row.exceeded) for row in result.rows if not row.passed] == []
