"""Engines by name."""

from __future__ import annotations

import pytest

from pi0.config import PRESETS
from pi0.engines.base import choose_precision, need_engine
from pi0.errors import ConfigError, EngineError


def test_precisions_by_short_names() -> None:
    assert choose_precision("cuda", "bf16") == "bfloat16"
    assert choose_precision("reference", "fp32") == "float32"
    assert choose_precision("cpu", None) == "float32"
    with pytest.raises(ConfigError, match="float16"):
        choose_precision("reference", "fp16")
    with pytest.raises(EngineError, match="expected one of float32, int8, bfloat16"):
        choose_precision("cpu", "int4")


def test_a_device_that_is_not_there_is_said_before_the_work() -> None:
    with pytest.raises(EngineError, match="expected cpu for engine cpu, found 'cuda'"):
        need_engine("cpu", PRESETS["tiny"], "cuda")
    with pytest.raises(EngineError, match="expected cuda or cuda:N for engine cuda"):
        need_engine("cuda", PRESETS["tiny"], "cpu")
