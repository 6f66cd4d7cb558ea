"""Engines by name."""

from __future__ import annotations

import pytest

from pi0.engines.base import choose_precision
from pi0.errors import ConfigError, EngineError


def test_precisions_by_short_names() -> None:
    assert choose_precision("cuda", "bf16") == "bfloat16"
    assert choose_precision("reference", "fp32") == "float32"
    assert choose_precision("cpu", None) == "float32"
    with pytest.raises(ConfigError, match="float16"):
        choose_precision("reference", "fp16")
    with pytest.raises(EngineError, match="expected one of float32, int8, bfloat16"):
        choose_precision("cpu", "int4")
