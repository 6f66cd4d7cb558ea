"""The grammar of engines."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi0.config import PRESETS
from pi0.engines.fastest import choose_engine
from pi0.engines.registry import find_engine
from pi0.engines.spec import EngineSpec
from pi0.errors import ConfigError, EngineError

parse = EngineSpec.parse


def test_parts() -> None:
    assert parse("reference") == EngineSpec("reference", "float32", None)
    assert parse("cpu:int8") == EngineSpec("cpu", "int8", None)
    assert parse("reference@cuda:1") == EngineSpec("reference", "float32", "cuda:1")
    assert parse("reference:bfloat16@cuda:1").label == "reference:bfloat16@cuda:1"


def test_short_names_of_precisions() -> None:
    assert parse("cuda:bf16").precision == "bfloat16"
    assert parse("reference", "fp32").precision == "float32"
    with pytest.raises(ConfigError, match="float16: π0's activations leave its range"):
        parse("reference:fp16")
    with pytest.raises(ConfigError, match="float16"):
        parse("reference", "float16")


def test_options_complete_the_text() -> None:
    assert parse("cpu", "int8") == parse("cpu:int8") == parse("cpu:int8", "int8")
    assert parse("reference:bf16", "bfloat16", "cuda").label == "reference:bfloat16@cuda"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("float32", None), "dtype: expected int8, as in engine cpu:int8@cpu, found float32."),
        ((None, "cuda"), "device: expected cpu, as in engine cpu:int8@cpu, found cuda."),
    ],
)
def test_options_contradict_the_text(options: tuple[str | None, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        parse("cpu:int8@cpu", *options)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cpu:",
        "@cuda",
        ":int8",
        "cpu@",
        "cpu:@cpu",
        "cpu:int8:x",
        "cpu@cpu@1",
        "cpu int8",
        " cpu",
        None,
    ],
)
def test_refuses_other_forms(text: Any) -> None:
    with pytest.raises(EngineError, match=r"expected ENGINE\[:PRECISION\]\[@DEVICE\]") as error:
        parse(text)
    assert f"found {text!r}." in str(error.value)


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(EngineError, match="expected one of reference, compiled, cpu, .* 'warp'"):
        parse("warp:float32")
    with pytest.raises(EngineError, match="engine cpu, dtype: expected one of float32, int8, bf"):
        parse("cpu:int4")


@given(
    st.sampled_from(("reference", "cpu", "cuda", "lerobot")),
    st.integers(0, 2),
    st.sampled_from((None, "cpu", "cuda:3", "7")),
)
def test_label_gives_the_spec_back(name: str, precision: int, device: str | None) -> None:
    offered = find_engine(name).capabilities.precisions
    spec = EngineSpec(name, offered[precision % len(offered)], device)
    assert parse(spec.label) == spec


@given(st.text("ab:@ ", max_size=8))
def test_any_text_is_a_spec_or_an_error(text: str) -> None:
    with pytest.raises(EngineError):
        parse(text)


def test_auto_with_a_precision_and_a_device() -> None:
    """In the same grammar, beside options or in place of them."""
    config = PRESETS["tiny"]
    for text, *options in (
        ("auto:int8@cpu", None, None), ("auto@cpu", "int8", None), ("auto:int8", "int8", "cpu")
    ):  # fmt: skip
        spec = choose_engine(text, config, *options, None)
        assert spec == EngineSpec("cpu", "int8", "cpu")
    with pytest.raises(ConfigError, match="dtype: expected int8, as in engine auto:int8, found fl"):
        choose_engine("auto:int8", config, "float32", None, None)
    with pytest.raises(EngineError, match="engine auto: expected an engine with precision x on de"):
        choose_engine("auto:x@cpu", config, None, None, None)
    with pytest.raises(EngineError, match=r"expected ENGINE\[:PRECISION\]\[@DEVICE\]"):
        choose_engine("auto:", config, None, None, None)
