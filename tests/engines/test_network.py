"""Fast engines compute what the model computes, and leave out what has no effect.

Tolerance 1e-5 of the largest value: float32, of which only the order of sums differs. A text
embedding without its scale, an exact GELU or a rotary position off by one is off by more than 1e-3.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pi0.checkpoint.load import Checkpoint, load_model, open_checkpoint
from pi0.config import PRESETS
from pi0.engines.base import Engine, make_engine
from pi0.engines.fast.plan import make_token_plan
from pi0.inputs import ModelInputs, random_inputs
from pi0.model import STAGES, Pi0

CONFIG = PRESETS["tiny"]
only_pi0 = pytest.mark.parametrize("each_path", ["tiny"], indirect=True)  # it has a state token


@pytest.fixture(scope="module")
def checkpoint(each_path: Path) -> Checkpoint:
    return open_checkpoint(each_path)


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Engine:
    return make_engine("cpu:float32", checkpoint)


@pytest.fixture(scope="module")
def tiny(checkpoint: Checkpoint) -> Pi0:
    return load_model(checkpoint)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def batch(masks: list[tuple[list[bool], int]], seed: int = 0) -> tuple[ModelInputs, Tensor]:
    """A row for each (which cameras are valid, how many text tokens)."""
    inputs, _ = random_inputs(CONFIG, len(masks[0][0]), 6, seed)
    parts = [random_inputs(CONFIG, len(views), 6, seed + i) for i, (views, _) in enumerate(masks)]
    rows = {name: torch.cat([getattr(part, name) for part, _ in parts]) for name in vars(inputs)}
    rows["image_mask"] = torch.tensor([views for views, _ in masks])
    rows["token_mask"] = torch.arange(6) < torch.tensor([[count] for _, count in masks])
    return ModelInputs(**rows), torch.cat([noise for _, noise in parts])


ROW = st.tuples(st.lists(st.booleans(), min_size=2, max_size=2), st.integers(1, 6))


@given(st.lists(ROW, min_size=1, max_size=3))
def test_any_masks_give_the_models_actions(
    engine: Engine, tiny: Pi0, masks: list[tuple[list[bool], int]]
) -> None:
    inputs, noise = batch(masks)
    assert close(engine.sample(inputs, noise, 3), tiny.sample_actions(inputs, noise, 3))


def test_no_text_at_all(engine: Engine, tiny: Pi0) -> None:
    inputs, noise = batch([([True, False], 0)])
    assert close(engine.sample(inputs, noise, 2), tiny.sample_actions(inputs, noise, 2))


def test_other_image_size(checkpoint: Checkpoint) -> None:
    inputs, noise = random_inputs(CONFIG.with_image_size(56), 1, 4, 0)
    engine = make_engine("cpu:float32", checkpoint, image_size=56)
    expected = load_model(checkpoint, image_size=56).sample_actions(inputs, noise, 2)
    assert close(engine.sample(inputs, noise, 2), expected)


@only_pi0
def test_another_state_is_seen(engine: Engine, tiny: Pi0) -> None:
    """A cache has the state that it was made from, whatever its owner does with it afterwards."""
    inputs, noise = batch([([True, True], 6)])
    other = replace(inputs, state=inputs.state + 1)
    t, first = torch.ones(1), inputs.state.clone()
    mine, theirs = engine.prefill(inputs), engine.prefill(other)
    inputs.state.mul_(2)
    other.state.mul_(2)
    for cache, state in ((mine, first), (theirs, first + 1), (mine, first), (theirs, first + 1)):
        expected = tiny.velocity(noise, t, tiny.prefill(replace(inputs, state=state)))
        assert close(engine.velocity(noise, t, cache), expected)


@only_pi0
def test_steps_after_the_first_do_without_the_state_token(engine: Engine) -> None:
    inputs, noise = batch([([True, True], 6)])
    rows: list[int] = []
    kernels = engine.network.kernels  # type: ignore[attr-defined]
    attend = kernels.attend

    def counting(q: Tensor, *rest: Tensor | None) -> Tensor:
        rows.append(q.shape[1])
        result: Tensor = attend(q, *rest)
        return result

    kernels.attend = counting
    try:
        engine.sample(inputs, noise, 3)
    finally:
        del kernels.attend
    suffix = rows[-3 * CONFIG.expert.depth - CONFIG.expert.depth :]
    assert suffix.count(1) == CONFIG.expert.depth
    assert suffix.count(CONFIG.horizon) == 3 * CONFIG.expert.depth


def test_masked_images_are_not_computed(engine: Engine) -> None:
    inputs, _ = batch([([True, False], 3)])
    shapes = {}
    kernels = engine.network.kernels  # type: ignore[attr-defined]
    attend = kernels.attend

    def watching(q: Tensor, *rest: Tensor | None) -> Tensor:
        shapes[tuple(q.shape[:2])] = True
        result: Tensor = attend(q, *rest)
        return result

    kernels.attend = watching
    try:
        engine.prefill(inputs)
    finally:
        del kernels.attend
    patches = CONFIG.vision.num_patches
    assert set(shapes) == {(1, patches), (1, patches + 3)}


def test_stages_have_the_models_shapes(engine: Engine, tiny: Pi0) -> None:
    inputs, noise = batch([([True, False], 3), ([True, True], 6)])
    seen: dict[str, dict[str, list[int]]] = {"model": {}, "engine": {}}

    def tap(who: str):  # type: ignore[no-untyped-def]
        def note(name: str, value: Tensor) -> Tensor:
            seen[who][name] = list(value.shape)
            return value

        return note

    t = torch.ones(2)
    tiny.velocity(noise, t, tiny.prefill(inputs, tap("model")), tap("model"))
    cache = engine.prefill(inputs, tap("engine"))
    engine.velocity(noise, t, cache, tap("engine"))
    last = f"vlm_transformer.block.{CONFIG.vlm.depth - 1}"
    left_out = {"vlm_transformer", "sequence", "suffix.condition", last}
    assert set(STAGES) - left_out <= set(seen["engine"])
    assert seen["engine"] == {k: v for k, v in seen["model"].items() if k not in left_out}


def test_same_bits_again(engine: Engine) -> None:
    inputs, noise = batch([([True, True], 6)])
    assert torch.equal(engine.sample(inputs, noise), engine.sample(inputs, noise))


@given(st.lists(ROW, min_size=1, max_size=4), st.sampled_from([1, 4, 16]))
def test_plan(masks: list[tuple[list[bool], int]], bucket: int) -> None:
    inputs, _ = batch(masks)
    plan = make_token_plan(inputs, CONFIG.vision.num_patches, CONFIG.suffix_len, bucket)
    images = inputs.image_mask.repeat_interleave(CONFIG.vision.num_patches, dim=1)
    seen = torch.cat([images, inputs.token_mask], dim=1)
    number = torch.arange(1, seen.shape[1] + 1)[None].repeat(len(masks), 1)
    assert torch.equal(plan.scatter(plan.gather(number)), number * seen)
    assert plan.tokens % bucket == 0 or plan.tokens == seen.shape[1]
    lengths = set(seen.sum(dim=1).tolist())
    assert (plan.valid is None) == (bucket == 1 and len(lengths) == 1)
    for row, count in enumerate(seen.sum(dim=1).tolist()):
        assert plan.positions[row, :count].tolist() == list(range(count))
        suffix = plan.positions[row, plan.tokens :].tolist()
        assert suffix == list(range(count, count + CONFIG.suffix_len))


def test_bucket_changes_nothing(engine: Engine) -> None:
    inputs, noise = batch([([True, True], 3)])
    network = engine.network  # type: ignore[attr-defined]
    t = network.times(torch.ones(1))
    velocities = []
    for bucket in (1, 16):
        plan = make_token_plan(inputs, CONFIG.vision.num_patches, engine.config.suffix_len, bucket)
        with torch.inference_mode():
            cache = network.prefill(inputs, plan)
            velocities.append(network.velocity(noise, t, cache))
    assert close(*velocities)


def test_one_observation_like_its_row_in_a_batch(engine: Engine) -> None:
    inputs, noise = batch([([True, True], 6), ([True, False], 2)])
    together = engine.sample(inputs, noise, 2)
    alone = replace(inputs.row(1))
    assert close(engine.sample(alone, noise[1:], 2), together[1:])


def test_the_same_pictures_are_not_computed_again(
    engine: Engine, tiny: Pi0, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = engine.network  # type: ignore[attr-defined]
    computed = []
    prefill = network.prefill
    monkeypatch.setattr(network, "prefill", lambda *args: computed.append(args) or prefill(*args))
    inputs, noise = batch([([True, False], 6)], seed=5)
    first = engine.sample(inputs, noise, 3)
    assert torch.equal(engine.sample(inputs, noise, 3), first)
    moved = replace(inputs, state=inputs.state + 1)
    assert close(engine.sample(moved, noise, 3), tiny.sample_actions(moved, noise, 3))
    assert close(engine.sample(inputs, noise, 2), tiny.sample_actions(inputs, noise, 2))
    assert len(computed) == 1


@pytest.mark.parametrize("name", ["images", "image_mask", "tokens", "token_mask"])
def test_another_prefix_is_computed(engine: Engine, tiny: Pi0, name: str) -> None:
    """Even where the tensors are those of the last call, changed in place."""
    inputs, noise = batch([([True, False], 5)])
    engine.sample(inputs, noise, 1)
    value = getattr(inputs, name)
    if value.dtype == torch.bool:
        value.logical_not_()
    else:
        value.copy_(value.flip(-1))
    assert close(engine.sample(inputs, noise, 2), tiny.sample_actions(inputs, noise, 2))


def test_rows_may_have_times_of_their_own(engine: Engine, tiny: Pi0) -> None:
    inputs, noise = batch([([True, False], 5), ([True, True], 6)])
    t = torch.tensor([0.9, 0.2])
    expected = tiny.velocity(noise, t, tiny.prefill(inputs))
    assert close(engine.velocity(noise, t, engine.prefill(inputs)), expected)


def test_what_depends_on_time_alone_is_computed_once(
    engine: Engine, tiny: Pi0, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = engine.network  # type: ignore[attr-defined]
    computed = []
    times = network.times
    monkeypatch.setattr(network, "_step_times", None)
    monkeypatch.setattr(network, "times", lambda t: computed.append(len(t)) or times(t))
    inputs, noise = batch([([True, True], 6)])
    for steps in (3, 3, 2):
        assert close(engine.sample(inputs, noise, steps), tiny.sample_actions(inputs, noise, steps))
    assert computed == [3, 2]
