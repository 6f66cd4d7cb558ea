"""Who sees whom. Exactness is bitwise where it says so: a masked key has weight exactly 0."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pi0.config import PRESETS
from pi0.inputs import ModelInputs, random_inputs
from pi0.model import Pi0
from pi0.model.pi0 import attention_mask, no_tap, token_blocks, token_positions

# Cached and joint passes sum in another order over 4 float32 layers; seen: 1e-6.
SAME = 1e-5
CONFIG = PRESETS["tiny"]


@pytest.fixture
def observation() -> tuple[ModelInputs, Tensor]:
    """Three cameras, the middle one masked; 16 tokens, 9 valid."""
    inputs, noise = random_inputs(CONFIG, cameras=3, tokens=16, seed=3)
    inputs.image_mask[0, 1] = False
    inputs.token_mask[0, 9:] = False
    return inputs, noise


def changed(inputs: ModelInputs, name: str, index: tuple[int, ...], value: float) -> ModelInputs:
    tensor = getattr(inputs, name).clone()
    tensor[index] = value
    return replace(inputs, **{name: tensor})


def test_mask_by_eye() -> None:
    """Two prefix tokens and one padding, a state token, two actions."""
    valid = torch.tensor([[True, True, False, True, True, True]])
    mask = attention_mask(valid, torch.tensor([0, 0, 0, 1, 2, 2]))
    expected = [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 1],
        [1, 1, 0, 1, 1, 1],
    ]
    assert mask[0].int().tolist() == expected
    assert token_positions(valid)[0].tolist() == [0, 1, 1, 2, 3, 4]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=12),
)
def test_mask_is_the_published_rule(tokens: list[tuple[bool, int]]) -> None:
    """Against openpi's rule, spelled out token by token."""
    tokens = sorted(tokens, key=lambda token: token[1])
    valid = torch.tensor([[v for v, _ in tokens]])
    blocks = torch.tensor([b for _, b in tokens])
    mask = attention_mask(valid, blocks)[0]
    for i, (valid_i, block_i) in enumerate(tokens):
        for j, (valid_j, block_j) in enumerate(tokens):
            assert mask[i, j] == (valid_i and valid_j and block_j <= block_i)


def test_sequence_slices(tiny: Pi0) -> None:
    """The slices of the joint mask that prefill and denoising use, in both dimensions."""
    valid = torch.ones(1, 20, dtype=torch.bool)
    valid[0, 15:] = False
    mask, positions = tiny.mask_and_positions(valid, no_tap)
    assert mask.shape == (1, 71, 71)
    prefill = attention_mask(valid, torch.zeros(20))
    assert torch.equal(mask[:, :20, :20], prefill)
    assert not mask[:, :20, 20:].any(), "the prefix sees no suffix"
    assert mask[:, 20:, :15].all(), "the suffix sees the whole valid prefix"
    assert not mask[:, 20:, 15:20].any(), "and no padding"
    assert mask[0, 20, 20:].tolist() == [True] + [False] * 50, "the state sees no action"
    assert mask[0, 21:, 20:].all(), "actions see the state and each other"
    assert positions[0, 20:].tolist() == list(range(15, 66)), "continue after the last valid"


def test_blocks() -> None:
    assert token_blocks(3, 1, 2).tolist() == [0, 0, 0, 1, 2, 2]
    assert token_blocks(2, 0, 2).tolist() == [0, 0, 2, 2], "no state token, as in π0.5"


def test_brief_case_lengths() -> None:
    config = PRESETS["pi0_base"].with_image_size(384)
    assert config.vision.num_patches == 729
    assert config.prefix_len(cameras=2, tokens=32) == 1490
    assert config.suffix_len == 51


@pytest.mark.parametrize("t", [1.0, 0.3])
def test_joint_pass_equals_cached_pass(
    tiny: Pi0, observation: tuple[ModelInputs, Tensor], t: float
) -> None:
    inputs, x = observation
    time = torch.tensor([t])
    with torch.no_grad():
        cached = tiny.velocity(x, time, tiny.prefill(inputs))
        joint = tiny(inputs, x, time)
    assert cached.shape == (1, 50, 32)
    assert cached.std() > 0.1
    torch.testing.assert_close(cached, joint, atol=SAME, rtol=0)


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("images", (0, 0, 0, 13, 13), 1.0),
        ("images", (0, 2, 2, 0, 0), -1.0),
        ("tokens", (0, 4), 7),
        ("state", (0, 31), 2.0),
    ],
)
def test_what_is_seen_matters(
    tiny: Pi0,
    observation: tuple[ModelInputs, Tensor],
    name: str,
    index: tuple[int, ...],
    value: float,
) -> None:
    inputs, noise = observation
    before = tiny.sample_actions(inputs, noise)
    after = tiny.sample_actions(changed(inputs, name, index, value), noise)
    assert (before - after).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "index", "value"), [("images", (0, 1), 0.7), ("tokens", (0, 9), 7)]
)
def test_what_is_masked_does_not(
    tiny: Pi0,
    observation: tuple[ModelInputs, Tensor],
    name: str,
    index: tuple[int, ...],
    value: float,
) -> None:
    inputs, noise = observation
    before = tiny.sample_actions(inputs, noise)
    assert torch.equal(before, tiny.sample_actions(changed(inputs, name, index, value), noise))


def test_masked_camera_dropped_equals_computed(
    tiny: Pi0, observation: tuple[ModelInputs, Tensor]
) -> None:
    inputs, noise = observation
    dropped = ModelInputs(
        images=inputs.images[:, [0, 2]],
        image_mask=inputs.image_mask[:, [0, 2]],
        tokens=inputs.tokens[:, :9],
        token_mask=inputs.token_mask[:, :9],
        state=inputs.state,
    )
    torch.testing.assert_close(
        tiny.sample_actions(inputs, noise),
        tiny.sample_actions(dropped, noise),
        atol=SAME,
        rtol=0,
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_rows_of_a_batch_do_not_meet(tiny: Pi0, seed: int) -> None:
    """A batch with a mask of its own in every row equals its rows, one by one."""
    generator = torch.Generator().manual_seed(seed)
    rows = [random_inputs(CONFIG, cameras=3, tokens=8, seed=seed + i) for i in range(3)]
    for inputs, _ in rows:
        inputs.image_mask[0, 1:] = torch.rand(2, generator=generator) < 0.5
        inputs.token_mask[0, int(torch.randint(1, 9, (1,), generator=generator)) :] = False
    batch = ModelInputs(
        **{name: torch.cat([getattr(r, name) for r, _ in rows]) for name in vars(rows[0][0])}
    )
    together = tiny.sample_actions(batch, torch.cat([noise for _, noise in rows]), steps=2)
    for i, (inputs, noise) in enumerate(rows):
        alone = tiny.sample_actions(inputs, noise, steps=2)
        torch.testing.assert_close(together[i : i + 1], alone, atol=SAME, rtol=0)
