"""openpi's JAX checkpoints.

openpi's own actions are met within 1e-4: two implementations in float32 differ by 5e-5 at most
here, and merging the LoRA of the attention's output head by head moves actions by more than 1.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import torch
from jax_folder import ORACLES, PREFIX, copy_oracle, edit, odd_config, put, remove, synthesise_jax
from typer.testing import CliRunner

from pi0.checkpoint import files, jax
from pi0.checkpoint.jax import write_params
from pi0.checkpoint.jax_leaves import leaves
from pi0.checkpoint.load import Checkpoint, check, load_model, open_checkpoint
from pi0.cli.main import app
from pi0.config import PRESETS
from pi0.engines.base import make_engine
from pi0.errors import CheckpointError, ConfigError, Pi0Error
from pi0.inputs import from_npz

CASES = ["jax_pi0", "jax_pi05", "jax_pi0_lora"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_oracle("jax_pi0", tmp_path / "jax")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return copy_oracle("jax_pi0_lora", tmp_path / "lora")


def state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return load_model(checkpoint).state_dict()


def same(a: Checkpoint, b: Checkpoint) -> bool:
    ours, theirs = state(a), state(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def set_lora(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora": values}))


# What openpi computes


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_actions_are_openpis(case: str, engine: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(copy_oracle(case, tmp_path / case))
    arrays, expected = (dict(np.load(ORACLES / case / f"{name}.npz")) for name in ("in", "out"))
    if checkpoint.config.adaptive_norm:
        arrays.pop("state", None)
    inputs, noise = from_npz(checkpoint.config, arrays)
    with make_engine(engine, checkpoint) as computed:
        actions = computed.sample(inputs, noise, 10).numpy()
    assert np.abs(actions - expected["actions"]).max() <= 1e-4


@pytest.mark.parametrize("case", CASES[:2])
def test_leaves_are_those_of_openpi(case: str) -> None:
    lines = (ORACLES / case / "params.txt").read_text().splitlines()
    assert list(leaves("05" in case)) == [line.split("\t")[0] for line in lines]


def test_what_is_declared_and_found(folder: Path) -> None:
    (folder / "config.json").unlink()
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.vision == PRESETS["tiny"].vision
    assert checkpoint.config.vlm == PRESETS["tiny"].vlm
    assert [f.code for f in checkpoint.findings] == ["horizon-assumed", "max-tokens-assumed"]
    assert open_checkpoint(folder, horizon=10).config.horizon == 10


def test_params_themselves(folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "params")
    assert checkpoint.path == folder
    assert same(checkpoint, open_checkpoint(folder))


@pytest.mark.parametrize("place", [".", "d/..", "../latest"])
def test_params_by_other_names(folder: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beside them counts: config.json, statistics, tokenizer."""
    (folder / "latest").symlink_to(folder / "params", target_is_directory=True)
    (folder / "params" / "d").mkdir(exist_ok=True)
    monkeypatch.chdir(folder / "params")
    checkpoint = open_checkpoint(place)
    assert checkpoint.path == folder.resolve()
    assert checkpoint.settings == open_checkpoint(folder).settings


def test_dtypes_are_those_of_the_leaves(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(copy_oracle("jax_pi05", tmp_path / "jax"))
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    assert {values.dtype for _, _, values in checkpoint.stream()} == {torch.bfloat16}


def test_float16_is_read_as_float32(folder: Path) -> None:
    """As in safetensors; double precision is refused, also as there."""
    key, values = f"{PREFIX}attn.q_einsum.w.value", torch.randn(2, 8, 64, 16)
    put(folder, key, values.half())
    read = state(open_checkpoint(folder))["vlm.blocks.1.q_proj.weight"]
    assert torch.equal(read, values[1].half().float().permute(0, 2, 1).reshape(128, 64))
    put(folder, key, values.double())
    with pytest.raises(CheckpointError, match="float32 or float16, found float64"):
        open_checkpoint(folder)


# Sizes of all kinds, both ways


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adaptive", [False, True])
def test_there_and_back(adaptive: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    config = odd_config(adaptive)
    pytorch = open_checkpoint(synthesise_jax(tmp_path / "jax", config, dtype))
    there = open_checkpoint(tmp_path / "jax")
    assert there.config == config
    assert same(there, pytorch)
    dtypes = dict.fromkeys(there.names.ours.values(), dtype)
    write_params(tmp_path / "again" / "params", config, dtypes, there.stream())
    a, b = (jax.open_folder(tmp_path / name / "params") for name in ("jax", "again"))
    assert a.arrays == b.arrays
    for name in a.arrays:
        with a.open(name) as x, b.open(name) as y:
            assert torch.equal(x.read(), y.read())


@pytest.mark.parametrize("case", ["jax_pi0", "jax_pi05"])
def test_leaves_of_openpi_are_written_again(case: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(copy_oracle(case, tmp_path / case))
    dtypes = {ours: values.dtype for ours, _, values in checkpoint.stream()}
    write_params(tmp_path / "params", checkpoint.config, dtypes, checkpoint.stream())
    a, b = (jax.open_folder(path) for path in (tmp_path / case / "params", tmp_path / "params"))
    assert list(a.arrays) == list(b.arrays)
    for name in a.arrays:
        with a.open(name) as x, b.open(name) as y:
            assert torch.equal(x.read(), y.read())
    ours, theirs = (json.loads((f.folder / "_METADATA").read_text()) for f in (a, b))
    if case == "jax_pi05":  # without the level `value`
        assert ours == theirs


def test_large_tensors_come_in_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tensor that is not the embedding comes from a file in several."""
    for module in (files, jax):
        monkeypatch.setattr(module, "SLAB_BYTES", 1000)
    pytorch = open_checkpoint(synthesise_jax(tmp_path / "jax", odd_config(False), torch.float32))
    there = open_checkpoint(tmp_path / "jax")
    assert same(there, pytorch)
    rows = [rows for ours, rows, _ in there.stream({"token_embedding.weight"})]
    assert len(rows) > 10


# LoRA


def test_alpha_scales_attention_only(lora: Path) -> None:
    plain = state(open_checkpoint(lora))
    set_lora(lora, alpha=[8, 6])
    doubled = state(open_checkpoint(lora))
    moved = {name for name in plain if not torch.equal(plain[name], doubled[name])}
    heads = [f"{n}_proj" for n in "qkvo"]
    assert moved == {
        f"{trunk}.blocks.{layer}.{head}.weight"
        for trunk in ("vlm", "expert")
        for layer in (0, 1)
        for head in heads
    }


def test_alpha_is_the_rank_where_nothing_states_it(lora: Path) -> None:
    stated = state(open_checkpoint(lora))
    set_lora(lora)
    checkpoint = open_checkpoint(lora)
    assert [f.code for f in checkpoint.findings] == ["lora-alpha-assumed"]
    assert all(torch.equal(value, stated[name]) for name, value in state(checkpoint).items())


def test_merged_tensors_are_float32(lora: Path) -> None:
    checkpoint = open_checkpoint(lora)
    merged = {of for of in checkpoint.tensors if "einsum" in of or "linear" in of}
    assert {checkpoint.tensors[name].dtype for name in merged} == {"F32"}
    assert "LoRA merged into 10" in checkpoint.names.explanation


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 5}, "lora.rank: expected 4 as .*lora_a has it, found 5"),
        (
            {"alpha": 4},
            "lora.alpha: expected two numbers, of the VLM and of the expert, whose ranks",
        ),
        ({"alpha": "x"}, "lora.alpha: expected a positive number, or two"),
        ({"alpha": [1, 2, 3]}, "lora.alpha: expected a positive number, or two"),
        ({"alpha": float("inf")}, "lora.alpha: expected a positive number, or two"),
    ],
)
def test_bad_statements_on_lora(values: dict[str, object], message: str, lora: Path) -> None:
    set_lora(lora, **values)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(lora)


def test_factors_of_different_ranks(lora: Path) -> None:
    put(lora, f"{PREFIX}attn.q_einsum.lora_b.value", torch.zeros(2, 8, 5, 16))
    with pytest.raises(CheckpointError, match="lora_b: expected shape .* of rank 4 as in lora_a"):
        open_checkpoint(lora)


@pytest.mark.parametrize("stated", [{}, {"alpha": [4, 3]}])
def test_a_leaf_of_another_rank(stated: dict[str, object], lora: Path) -> None:
    """Not only where the rank is stated, and the first leaf is as good as any."""
    set_lora(lora, **stated)
    for name, shape in (("lora_a", (2, 2, 1, 64, 5)), ("lora_b", (2, 2, 1, 5, 16))):
        put(lora, f"{PREFIX}attn.kv_einsum.{name}.value", torch.zeros(shape))
    with pytest.raises(
        CheckpointError, match="kv_einsum/lora_a: expected rank 4, as the other leaves of the VLM"
    ):
        open_checkpoint(lora)


def test_leaves_without_their_lora(lora: Path) -> None:
    """Attention has LoRA in all of its leaves or in none."""
    edit(lora, lambda store: remove(store, f"{PREFIX}attn.q_einsum_1.lora_"))
    with pytest.raises(CheckpointError, match="2 missing: PaliGemma.*q_einsum_1/lora_a, "):
        open_checkpoint(lora)


def test_factors_of_rank_0(lora: Path) -> None:
    for name, shape in (("lora_a", (2, 8, 64, 0)), ("lora_b", (2, 8, 0, 16))):
        put(lora, f"{PREFIX}attn.q_einsum.{name}.value", torch.zeros(shape))
    with pytest.raises(CheckpointError, match="expected factors of rank 1 or more, found shape"):
        open_checkpoint(lora)


def test_lora_that_overflows(lora: Path) -> None:
    name = f"{PREFIX}attn.q_einsum.lora_"
    put(lora, f"{name}a.value", torch.full((2, 8, 64, 4), 3e38))
    put(lora, f"{name}b.value", torch.full((2, 8, 4, 16), 3e38))
    with pytest.raises(CheckpointError, match="expected finite weights"):
        state(open_checkpoint(lora))


def test_an_array_twice(folder: Path) -> None:
    put(folder, "params.state_proj.bias", torch.zeros(32))
    with pytest.raises(CheckpointError, match="state_proj/bias: expected one array, found"):
        open_checkpoint(folder)


def test_one_factor_alone(lora: Path) -> None:
    edit(lora, lambda store: remove(store, f"{PREFIX}mlp.linear_lora_b"))
    with pytest.raises(CheckpointError, match="1 missing: PaliGemma.*linear_lora_b. Copy"):
        open_checkpoint(lora)


# What does not fit


def test_missing_and_unexpected_leaves(folder: Path) -> None:
    edit(folder, lambda store: remove(store, "params.state_proj.bias"))
    put(folder, "params.extra.kernel", torch.zeros(2))
    with pytest.raises(CheckpointError, match="1 missing: state_proj/bias; 1 unexpected: extra/k"):
        open_checkpoint(folder)


@pytest.mark.parametrize("shape", [(2, 8, 60, 16), (3, 8, 64, 16), (2, 8, 64), (2, 8, 64, 0)])
def test_shapes(shape: tuple[int, ...], folder: Path) -> None:
    put(folder, f"{PREFIX}attn.q_einsum.w.value", torch.zeros(shape))
    with pytest.raises(CheckpointError, match="expected shape .* as the other leaves have it"):
        open_checkpoint(folder)


def test_heads_that_config_json_contradicts(folder: Path) -> None:
    (folder / "config.json").write_text('{"vlm": {"num_heads": 4}}')
    with pytest.raises(ConfigError, match="num_heads: the tensors say 8, config.json says 4"):
        open_checkpoint(folder)


def test_values_that_are_not_finite(folder: Path) -> None:
    put(folder, "params.state_proj.bias.value", torch.full((32,), torch.nan))
    with pytest.raises(CheckpointError, match="state_proj/bias: expected finite weights, found 32"):
        load_model(open_checkpoint(folder))


@pytest.mark.parametrize("size", [0, 50])
def test_a_truncated_manifest(size: int, folder: Path) -> None:
    with open(folder / "params" / "manifest.ocdbt", "r+b") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match="params: .*expected .* JAX checkpoint, found"):
        open_checkpoint(folder)


@pytest.mark.parametrize("gone", [False, True])
def test_truncated_data(gone: bool, folder: Path) -> None:
    data = max((folder / "params/ocdbt.process_0/d").iterdir(), key=lambda p: p.stat().st_size)
    if gone:
        data.unlink()
    else:
        with open(data, "r+b") as file:
            file.truncate(1000)
    found = "no file" if gone else "1000"
    with pytest.raises(CheckpointError, match=rf"{data.name}: expected \d+ bytes .* found {found}"):
        open_checkpoint(folder)  # as pi0 inspect and pi0 doctor do, which need no weights


@pytest.mark.parametrize("with_metadata", [True, False])
def test_a_chunk_that_is_not_there(folder: Path, with_metadata: bool) -> None:
    """tensorstore would read zeros."""
    if not with_metadata:
        (folder / "params" / "_METADATA").unlink()
    edit(folder, lambda store: remove(store, "params.state_proj.kernel.value/0"))
    with pytest.raises(CheckpointError, match="state_proj/kernel: expected a complete"):
        load_model(open_checkpoint(folder))


def test_a_chunk_of_zeros_that_an_older_orbax_left_out(folder: Path) -> None:
    """Its _METADATA does not say that zeros are stored; orbax reads them as zeros, too."""
    edit(folder, lambda store: remove(store, "params.state_proj.kernel.value/0"))
    path = folder / "params" / "_METADATA"
    metadata = json.loads(path.read_text())
    del metadata["store_array_data_equal_to_fill_value"]
    path.write_text(json.dumps(metadata))
    weights = state(open_checkpoint(folder))
    assert not weights["state_proj.weight"].any()
    assert weights["state_proj.bias"].any()


def test_zarr_of_version_3(tmp_path: Path) -> None:
    (tmp_path / "params").mkdir()
    base = {"driver": "file", "path": f"{tmp_path}/params/"}
    store = {"driver": "ocdbt", "base": base, "path": "params.a.w/"}
    spec = {"driver": "zarr3", "kvstore": store}
    ts.open(spec, create=True, dtype=ts.float32, shape=[3]).result().write(1).result()
    with pytest.raises(CheckpointError, match="found zarr v3. Save them again with use_zarr3=F"):
        open_checkpoint(tmp_path)


def test_no_manifest(folder: Path) -> None:
    (folder / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match="expected a JAX checkpoint with manifest.ocdbt"):
        open_checkpoint(folder)


def test_without_tensorstore(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(Pi0Error, match=r"which the extra pi0\[jax\] brings, found none"):
        open_checkpoint(folder)


# With everything else


def test_inspect_and_its_policy(folder: Path, tiny_path: Path) -> None:
    shutil.copy(tiny_path / "tokenizer.json", folder)
    check(open_checkpoint(folder))
    shown = CliRunner().invoke(app, ["inspect", str(folder), "--json", "--robot", "generic"])
    assert shown.exit_code == 0, shown.output
    data = json.loads(shown.stdout)
    assert data["layout"] == "jax"
    assert data["policy"]["findings"] == []
    assert "norm_stats.json" in data["policy"]["sources"]["statistics"]


def test_weight_cache_depends_on_alpha(lora: Path) -> None:
    assert open_checkpoint(lora).files == [lora / "params" / "manifest.ocdbt", lora / "config.json"]
    with make_engine("cpu", open_checkpoint(lora), weight_cache=True):
        pass
    with make_engine("cpu", open_checkpoint(lora), weight_cache=True):
        pass
