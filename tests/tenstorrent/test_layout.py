"""Padding, packing and block sizes: what of the TTNN engine needs no TTNN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pi0.checkpoint.load import empty_model
from pi0.config import PRESETS, Pi0Config
from pi0.engines.base import EngineOptions
from pi0.engines.tenstorrent import program_configs
from pi0.engines.tenstorrent.backend import Grid
from pi0.engines.tenstorrent.engine import (
    TtnnHostEngine,
    most_rows,
    packed_bytes,
    require_dram,
    require_short_suffix,
    require_tile_widths,
)
from pi0.engines.tenstorrent.layout import (
    TileLayout,
    neighbours,
    padded_head,
    rope_tables,
    tiled,
)
from pi0.engines.tenstorrent.precision import PRESETS as PRECISIONS
from pi0.engines.tenstorrent.weights import pad_heads
from pi0.errors import EngineError
from pi0.inputs import ModelInputs, random_inputs
from pi0.model.gemma import Rope
from pi0.model.pi0 import Pi0, attention_mask, token_positions

TINY, BASE = PRESETS["tiny"], PRESETS["pi0_base"]
PI05_TINY, PI05_BASE = PRESETS["pi05_tiny"], PRESETS["pi05_base"]


@pytest.mark.parametrize(
    ("base", "size", "cameras", "tokens", "prefix"),
    [
        (BASE, 384, 2, 32, 1504),
        (BASE, 224, 2, 48, 576),
        (BASE, 224, 3, 48, 832),
        (BASE, 28, 1, 5, 64),
        (PI05_BASE, 224, 3, 200, 992),
        (PI05_BASE, 384, 2, 200, 1696),
    ],
)
def test_lengths(base: Pi0Config, size: int, cameras: int, tokens: int, prefix: int) -> None:
    layout = TileLayout(base.with_image_size(size), cameras, tokens)
    assert (layout.prefix, layout.suffix) == (prefix, 64)
    assert len(layout.view["prefix"].rows) == layout.config.prefix_len(cameras, tokens)


@given(
    st.sampled_from([TINY, PI05_TINY]),
    st.integers(1, 3),
    st.integers(1, 210),
    st.sampled_from([14, 28, 70, 98]),
)
def test_views_are_inverse(base: Pi0Config, views: int, tokens: int, size: int) -> None:
    layout = TileLayout(base.with_image_size(size), views, tokens)
    rows = {
        "patches": views * layout.patches,
        "text": layout.text,
        "prefix": layout.prefix,
        "prefix_heads": layout.prefix,
        "suffix": layout.suffix,
        "suffix_heads": layout.suffix,
        "actions": layout.suffix,
    }
    assert set(rows) == set(layout.view)
    for name, view in layout.view.items():
        width = 16 if "heads" in name else 5
        padded = 32 if "heads" in name else 5
        value = torch.randn(*view.shape, width)
        filled = view.fill(value, (1, 1, rows[name], padded))
        assert torch.equal(view.cut(filled), value)
        assert filled.count_nonzero() <= value.numel(), "padding is zero"


@given(
    st.sampled_from([TINY, PI05_TINY]),
    st.lists(st.booleans(), min_size=2, max_size=2),
    st.integers(0, 9),
)
def test_masks_are_the_models(config: Pi0Config, cameras: list[bool], words: int) -> None:
    """What real tokens see of real tokens is the model's mask; nobody sees padding."""
    inputs, _ = random_inputs(config, 2, 9, 0)
    inputs = replace(
        inputs,
        image_mask=torch.tensor([cameras]),
        token_mask=torch.arange(9)[None] < words,
    )
    layout = TileLayout(config, 2, 9)
    given = layout.uploads(inputs, PRECISIONS["accurate"])
    with torch.device("meta"):
        model = Pi0(config)
    seen = []
    patches = inputs.image_mask.repeat_interleave(config.vision.num_patches, dim=1)
    valid = torch.cat([patches, inputs.token_mask], dim=1)
    mask, positions = model.mask_and_positions(
        valid, lambda name, value: seen.append(value) or value
    )
    n = valid.shape[1]
    rows = torch.cat([layout.view["prefix"].rows, layout.prefix + layout.view["suffix"].rows])
    own, past = (given["suffix_mask"].value[0, 0] == 0).split([layout.suffix, layout.prefix], 1)
    suffix = torch.cat([past, own], dim=1)  # the cache has the suffix first
    assert torch.equal(suffix[: config.suffix_len][:, rows], mask[0, n:])
    assert suffix.sum() == mask[0, n:].sum()
    prefix = given["prefix_mask"].value[0, 0] == 0
    assert torch.equal(prefix[rows[:n]][:, rows[:n]], mask[0, :n, :n])
    assert prefix.sum() == mask[0, :n, :n].sum()
    tables = rope_tables(positions[0], config.vlm.head_dim)
    real = torch.cat([valid[0], torch.ones(config.suffix_len, dtype=torch.bool)])
    trunk = config.vlm
    for name, table, of_values in zip(("cos", "sin"), tables, (1, 0), strict=True):
        ours = torch.cat([given[f"{part}_{name}"].value for part in ("prefix", "suffix")], dim=1)
        by_head = ours.unflatten(1, (-1, trunk.num_heads + 2 * trunk.num_kv_heads))
        by_head = by_head.transpose(2, 3).flatten(1, 2)[0, rows][real]  # [S, H + 2K, D]
        rotated, values = by_head.split(
            [trunk.num_heads + trunk.num_kv_heads, trunk.num_kv_heads], 1
        )
        assert torch.equal(rotated, table[real][:, None].expand_as(rotated))
        assert (values == of_values).all(), "values are not rotated"


def test_observations_follow_each_other() -> None:
    """Inputs of three, and their actions, are those of each, joined; actions are found again."""
    rows = [random_inputs(TINY, 2, 9, seed) for seed in range(3)]
    batch, precision = ModelInputs.joined([row for row, _ in rows]), PRECISIONS["accurate"]
    one, three = TileLayout(TINY, 2, 9), TileLayout(TINY, 2, 9, batch=3)
    together = three.uploads(batch, precision)
    axes = {"tokens": 0, "prefix_mask": 0, "suffix_mask": 0, "patches": 2, "state": 2}
    for i, (row, _) in enumerate(rows):
        for name, alone in one.uploads(row, precision).items():
            axis = axes.get(name, 1)
            length = alone.value.shape[axis]
            part = together[name].value.narrow(axis, i * length, length)
            assert torch.equal(part, alone.value), name
    noise = torch.cat([noise for _, noise in rows])
    padded = three.actions(noise).value
    assert padded.shape == (1, 1, 3 * 64, 32)
    assert torch.equal(three.chunks(padded), noise)


def test_without_a_state_token() -> None:
    """π0.5: actions begin in the suffix's first row, and no state is uploaded."""
    config = PI05_TINY
    inputs, _ = random_inputs(config, 2, 9, 0)
    layout = TileLayout(config, 2, 9)
    given = layout.uploads(inputs, PRECISIONS["accurate"])
    actions = torch.randn(1, config.horizon, config.action_dim)
    uploaded = layout.actions(actions).value[0, 0]
    assert torch.equal(uploaded[: config.horizon], actions[0])
    assert not uploaded[config.horizon :].any()
    assert "state" not in given
    rows = given["suffix_mask"].value[0, 0, : config.horizon] == 0
    assert rows[:, : layout.suffix].sum(dim=1).eq(config.horizon).all()


@given(st.integers(0, 2000))
def test_rope_in_padded_heads(position: int) -> None:
    """Rotating a padded head, neighbours with each other, rotates the head."""
    x = torch.randn(1, 1, 1, 16)
    positions = torch.tensor([[position]])
    wanted = Rope()(x, positions)
    cos, sin = rope_tables(positions[0], 16)
    padded = torch.zeros(1, 1, 1, 32)
    padded[..., padded_head(16)] = x
    turned = padded * cos + padded @ neighbours() * sin
    assert torch.allclose(turned[..., padded_head(16)], wanted, atol=1e-5)
    assert turned.norm() == pytest.approx(float(wanted.norm()), rel=1e-5)


def test_padded_heads_keep_products() -> None:
    weight, x = torch.randn(3 * 12, 20), torch.randn(20)
    padded = pad_heads(weight, 12, torch.arange(12)) @ x
    assert torch.equal(padded.view(3, 32)[:, :12].flatten(), weight @ x) or torch.allclose(
        padded.view(3, 32)[:, :12].flatten(), weight @ x, atol=1e-6
    )
    assert padded.view(3, 32)[:, 12:].count_nonzero() == 0


@given(
    st.integers(1, 100),
    st.integers(1, 600),
    st.integers(1, 600),
    st.sampled_from([Grid(8, 8), Grid(8, 7), Grid(13, 10)]),
    st.booleans(),
)
def test_matmul_blocks_cover_and_fit(m: int, k: int, n: int, grid: Grid, sums: bool) -> None:
    dtypes = ("bfloat16", "bfloat8_b", "bfloat16")
    b = program_configs.matmul_blocks(m, k, n, grid, dtypes, sums)
    assert (k % b.inner, b.rows % b.sub_rows, b.columns % b.sub_columns) == (0, 0, 0)
    assert max(b.rows, b.columns, b.inner) <= program_configs.LONGEST
    assert 2 <= b.sub_rows * b.sub_columns <= (4 if sums else 8), "never one tile at a time"


@pytest.mark.parametrize(
    ("m", "n", "columns", "together"),
    [
        (18, 1024, 8, 4),  # gate and up of the VLM, 2 × 224
        (18, 47 * 13, 8, 4),  # 47 columns of a core: 48, not one at a time
        (2, 256, 4, 4),  # of the expert
        (2, 1, 1, 2),  # velocity
    ],
)
def test_matmul_blocks_of_the_model(m: int, n: int, columns: int, together: int) -> None:
    b = program_configs.matmul_blocks(m, 32, n, Grid(13, 10), ("bfloat16",) * 3, True)
    assert (b.columns, b.sub_rows * b.sub_columns) == (columns, together)


@pytest.mark.parametrize("width", [32, 64, 96, 1024, 2048])
def test_shards_divide_a_width(width: int) -> None:
    grid = program_configs.shards(width // 32)
    assert width // 32 % grid.cores == 0
    assert (grid.x, grid.y) <= (8, 2)
    assert width < 1024 or grid.cores == 16


@pytest.mark.parametrize("base", [BASE, PI05_BASE], ids=["pi0", "pi05"])
def test_weights_have_to_fit(base: Pi0Config) -> None:
    """bfloat16: 2 bytes for each of the 3.24e9 parameters; fast: 1.06 for all but the embedding
    and what adds to residual streams, save the VLM's MLP.
    π0.5's layers on the timestep stay on the host."""
    accurate, fast = (packed_bytes(base, PRECISIONS[name]) for name in ("accurate", "fast"))
    parameters = sum(
        parameter.numel()
        for name, parameter in empty_model(base, torch.bfloat16).named_parameters()
        if not (".dense." in name or name.startswith("time_mlp"))
    )
    assert accurate == pytest.approx(2 * parameters, rel=0.03)
    table = base.vocab_size * base.vlm.width
    expert, vlm, vision = base.expert, base.vlm, base.vision
    attended = expert.num_heads * expert.head_dim
    whole = table + expert.depth * expert.width * (attended + expert.mlp_dim)
    whole += vlm.depth * vlm.width * attended
    whole += vision.depth * vision.width * (vision.width + vision.mlp_dim)
    assert fast == pytest.approx(2 * whole + 1.0625 * (parameters - whole), rel=0.03)
    require_dram(base, PRECISIONS["accurate"], 12_000_000_000)
    with pytest.raises(EngineError, match=r"at most the 6.0 GB .* found 6.6 GB. Use --dtype fast"):
        require_dram(base, PRECISIONS["accurate"], 6_000_000_000)


def test_widths_have_to_be_tiles() -> None:
    odd = replace(TINY, expert=replace(TINY.expert, width=40))
    with pytest.raises(EngineError, match="width of the expert that is a multiple of 32, found 40"):
        require_tile_widths(odd)


@pytest.mark.parametrize(("base", "most"), [(TINY, 255), (PI05_TINY, 256)])
def test_a_horizon_has_to_fit_the_cache(base: Pi0Config, most: int) -> None:
    require_short_suffix(replace(base, horizon=most))
    assert most_rows(replace(base, horizon=most)) == 1
    with pytest.raises(EngineError, match=f"^horizon: .* at most {most} actions .*found 300.$"):
        require_short_suffix(replace(base, horizon=300))
    with pytest.raises(EngineError, match="^horizon: expected at most"):
        TtnnHostEngine.check_available(replace(base, horizon=300), EngineOptions("fast"))


def test_tiled() -> None:
    assert [tiled(n) for n in (1, 32, 33, 729)] == [32, 32, 64, 736]


def test_state_sees_no_actions() -> None:
    """By hand: in the suffix the state sees the prefix and itself, actions see everything."""
    inputs, _ = random_inputs(TINY, 1, 3, 0)
    layout = TileLayout(TINY, 1, 3)
    mask = layout.uploads(inputs, PRECISIONS["fast"])["suffix_mask"].value[0, 0] == 0
    assert mask[0].sum() == 4 + 3 + 1
    assert mask[1].sum() == 4 + 3 + 51
    assert mask[51:].sum() == 0
    assert attention_mask(torch.ones(1, 2, dtype=torch.bool), torch.arange(2)).sum() == 3
    assert token_positions(torch.tensor([[True, False, True]])).tolist() == [[0, 0, 1]]
