"""Names: the published list, every layout both ways, mixtures, and which embedding is read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pi0.checkpoint.layouts import EMBEDDING, LAYOUTS, LM_HEADS, Layout, map_names, their_names
from pi0.checkpoint.load import empty_model
from pi0.checkpoint.synth import tensor_list
from pi0.config import PRESETS
from pi0.errors import CheckpointError

TINY = PRESETS["tiny"]
OUR_NAMES = set(empty_model(TINY, torch.float32).state_dict())


def test_pi0_base_is_the_published_list() -> None:
    """All 777 names and shapes of the hub's pi0_base."""
    lines = (Path(__file__).parent / "pi0_base_tensors.txt").read_text().splitlines()
    published = {name: shape for name, shape in (line.split("\t") for line in lines)}
    ours = tensor_list(PRESETS["pi0_base"], LAYOUTS["openpi"])
    assert len(published) == 777
    assert {name: str(list(shape)) for name, (_, shape) in ours.items()} == published
    read = [shape for our, shape in ours.values() if our != "unread"]
    assert sum(map(math.prod, read)) == 3_238_048_528


def test_lerobot_has_778() -> None:
    names = tensor_list(PRESETS["pi0_base"], LAYOUTS["lerobot"])
    assert len(names) == 778
    assert all(name.startswith("model.") for name in names)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_there_and_back(layout: Layout) -> None:
    mapped = map_names(tensor_list(TINY, layout))
    assert mapped.layout == layout.name
    assert layout.origin in mapped.explanation
    assert set(mapped.ours.values()) == OUR_NAMES
    assert not mapped.unexpected
    assert len(mapped.unread) == 1
    for theirs, ours in mapped.ours.items():
        assert theirs in their_names(layout, ours)


@given(
    st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 4),
    st.sampled_from(["", "model."]),
    st.randoms(),
)
def test_mixtures_are_read(parts: tuple[str, ...], root: str, random) -> None:
    """Every part may have another layout's spelling: transformers releases renamed them singly."""
    vision, projector, language, expert = (LAYOUTS[name] for name in parts)
    mixed = Layout(
        name="mixed",
        origin="",
        root=root,
        vision=vision.vision,
        projector=projector.projector,
        language=language.language,
        expert=expert.expert,
        embedding=language.embedding,
        unread=expert.unread,
    )
    names = list(tensor_list(TINY, mixed))
    random.shuffle(names)
    mapped = map_names(names)
    assert set(mapped.ours.values()) == OUR_NAMES
    assert not mapped.unexpected


def test_embed_tokens_goes_before_lm_head() -> None:
    lerobot = LAYOUTS["lerobot"]
    tokens, head = their_names(lerobot, EMBEDDING)
    for order in (lambda names: names, reversed):
        mapped = map_names(order(list(tensor_list(TINY, lerobot))))
        assert mapped.ours[tokens] == EMBEDDING
        assert head not in mapped.ours
        assert mapped.embeddings == [tokens, head]


@pytest.mark.parametrize("head", sorted(LM_HEADS))
def test_every_lm_head_serves(head: str) -> None:
    names = list(tensor_list(TINY, LAYOUTS["openpi"]))
    old = LAYOUTS["openpi"].embedding[0]
    mapped = map_names([head if name == old else name for name in names])
    assert mapped.ours[head] == EMBEDDING


def test_unknown_names_are_unexpected() -> None:
    names = [*tensor_list(TINY, LAYOUTS["openpi"]), "value_head.weight"]
    assert map_names(names).unexpected == ["value_head.weight"]


def test_a_name_with_and_without_the_root() -> None:
    """The last one used to win."""
    names = list(tensor_list(TINY, LAYOUTS["lerobot"]))
    tokens, _ = their_names(LAYOUTS["lerobot"], EMBEDDING)
    twice = [name.removeprefix("model.") for name in ("model.state_proj.weight", tokens)]
    assert map_names(names + twice).unexpected == twice


@pytest.mark.parametrize("names", [[], ["a.weight", "b.weight"], ["state_proj.weight"]])
def test_no_pi0_at_all(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match="expected a π0 checkpoint in one of the layouts"):
        map_names(names)
