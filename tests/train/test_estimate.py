"""Memory by arithmetic: what is counted, and what makes it less."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from episodes import SIZES

from pi0.config import PRESETS
from pi0.model import Pi0
from pi0.train.estimate import TrainingMemory, estimate
from pi0.train.lora import LoraOptions, add_lora
from pi0.train.trainer import TrainerOptions, freeze

WIDE = replace(PRESETS["tiny"], vocab_size=64).with_image_size(140)  # 100 patches


def measured(**changes: Any) -> TrainingMemory:
    values: dict[str, Any] = {
        "config": WIDE,
        "prepare": lambda model: None,
        "options": TrainerOptions(),
        "batch": 2,
        "cameras": 2,
        "tokens": 8,
        "draws": 1,
        "ema": True,
    }
    return estimate(**values | changes)


@cache
def whole() -> TrainingMemory:
    """A batch of 2 without anything that saves memory."""
    return measured()


def test_weights_and_optimizer_are_counted() -> None:
    count = sum(p.numel() for p in Pi0(SIZES).parameters())
    found = measured(config=SIZES, ema=False)
    assert found.weights == found.gradients == 4 * count
    assert found.optimizer == 8 * count
    assert found.average == 0
    assert whole().average == whole().weights
    assert found.total == sum(vars(found).values())


def test_passes_grow_with_the_batch() -> None:
    one, three = (measured(batch=n).passes for n in (1, 3))
    assert three - whole().passes == pytest.approx(whole().passes - one, rel=0.01)


def test_what_saves_memory_saves_it() -> None:
    assert measured(options=TrainerOptions(recompute=True)).passes < 0.6 * whole().passes
    assert measured(draws=4).passes > whole().passes


def test_frozen_weights_have_no_gradient() -> None:
    def frozen(model: Pi0) -> None:
        freeze(model, ["vision_tower.*"], [])

    found = measured(prepare=frozen)
    assert found.gradients < whole().gradients
    assert found.passes < whole().passes


def test_an_adapter_is_small() -> None:
    pytest.importorskip("peft")
    found = measured(prepare=lambda model: add_lora(model, LoraOptions(4), 0))
    assert found.gradients < 0.3 * found.weights
