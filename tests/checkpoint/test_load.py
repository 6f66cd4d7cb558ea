"""Loading: from every kind of folder, strictly, and without using memory twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from weights_file import rewrite

from pi0.checkpoint import files
from pi0.checkpoint.convert import convert
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import check, load_model, open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS, GemmaConfig, Pi0Config, SiglipConfig
from pi0.engines.base import make_engine
from pi0.engines.spec import EngineSpec
from pi0.errors import CheckpointError, ConfigError
from pi0.inputs import random_inputs
from pi0.model import Pi0

HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
K_PROJ = "paligemma_with_expert.gemma_expert.model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy to do as one likes with."""
    return shutil.copytree(tiny_path, tmp_path / "ckpt")


def same(a: Pi0, b: Pi0) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


def test_values_are_those_of_the_file(tiny: Pi0, tiny_path: Path) -> None:
    tensors = load_file(tiny_path / "model.safetensors")
    assert torch.equal(tiny.token_embedding.weight, tensors[HEAD])
    assert torch.equal(tiny.expert.blocks[1].k_proj.weight, tensors[K_PROJ])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(layout: str, tiny: Pi0, tmp_path: Path) -> None:
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS[layout], seed=0, dtype=torch.float32)
    assert same(tiny, load_model(open_checkpoint(tmp_path)))


def test_file_itself_and_other_name(tiny: Pi0, folder: Path) -> None:
    assert same(tiny, load_model(open_checkpoint(folder / "model.safetensors")))
    (folder / "model.safetensors").rename(folder / "pi0.safetensors")
    save_file({"x": torch.ones(1)}, folder / "policy_preprocessor_step_5.safetensors")
    assert same(tiny, load_model(open_checkpoint(folder)))


def test_float16_is_read_as_float32(folder: Path, tmp_path: Path) -> None:
    """LeRobot loads such files, too. The fast engine and a conversion read the same values."""
    path = folder / "model.safetensors"
    halves = {name: values.half() for name, values in load_file(path).items()}
    save_file({name: values.float() for name, values in halves.items()}, path)
    expected, actions = load_model(open_checkpoint(folder)), sampled(folder)
    save_file(halves, path)
    checkpoint = open_checkpoint(folder)
    assert same(expected, load_model(checkpoint))
    assert torch.equal(sampled(folder), actions)
    assert checkpoint.read_bytes == sum(v.nbytes for _, _, v in checkpoint.stream())
    for target in ("openpi", "jax"):
        convert(checkpoint, tmp_path / target, target, {})
        shutil.copy(folder / "config.json", tmp_path / target)
        assert same(expected, load_model(open_checkpoint(tmp_path / target)))


def sampled(folder: Path) -> Tensor:
    """Actions of engine cpu."""
    with make_engine(EngineSpec.parse("cpu"), open_checkpoint(folder)) as engine:
        inputs, noise = random_inputs(engine.config, 2, 8, seed=1)
        return engine.sample(inputs, noise, 1)


@pytest.fixture
def sharded(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards(tiny: Pi0, sharded: Path) -> None:
    assert same(tiny, load_model(open_checkpoint(sharded)))
    assert same(tiny, load_model(open_checkpoint(sharded / "model.safetensors.index.json")))


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2 shards .* no model-00002-of-00002"):
        open_checkpoint(sharded)


def test_embed_tokens_counts_where_lm_head_differs(tmp_path: Path, tiny: Pi0) -> None:
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["lerobot"], seed=0, dtype=torch.float32)
    rewrite(tmp_path, lambda t: t["model." + HEAD].zero_())
    assert same(tiny, load_model(open_checkpoint(tmp_path)))


def test_expert_head_is_not_needed(folder: Path, tiny: Pi0) -> None:
    rewrite(folder, lambda t: t.pop("paligemma_with_expert.gemma_expert.lm_head.weight"))
    assert same(tiny, load_model(open_checkpoint(folder)))


@pytest.mark.parametrize("name", [K_PROJ, HEAD, "action_out_proj.bias"])
def test_missing_tensor(folder: Path, name: str) -> None:
    rewrite(folder, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=name):
        load_model(open_checkpoint(folder))


def test_all_problems_in_one_error(folder: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["state_proj.bias"]
        tensors[K_PROJ] = tensors[K_PROJ][:-1].clone()
        tensors["extra.weight"] = torch.ones(3)
        tensors["action_in_proj.bias"] = tensors["action_in_proj.bias"].double()

    rewrite(folder, damage)
    with pytest.raises(CheckpointError) as error:
        load_model(open_checkpoint(folder))
    text = str(error.value)
    assert "found 4 that do not fit" in text
    assert "missing: state_proj.bias [32]" in text
    assert f"shape: {K_PROJ}: expected [16, 32], found [15, 32]" in text
    assert "unexpected: extra.weight [3]" in text
    assert "dtype: action_in_proj.bias: expected BF16, F32 or F16, found F64" in text


@pytest.mark.parametrize(("preset", "model"), [("tiny", "π0"), ("pi05_tiny", "π0.5")])
def test_the_model_is_called_what_it_is(tmp_path: Path, preset: str, model: str) -> None:
    synthesise(tmp_path, PRESETS[preset], LAYOUTS["openpi"], 0, torch.bfloat16)
    rewrite(tmp_path, lambda t: t.update(extra=torch.ones(1)))
    with pytest.raises(
        CheckpointError, match=rf"tensors of this {model} in layout openpi, found 1"
    ):
        check(open_checkpoint(tmp_path))


def test_long_lists_are_cut(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({f"extra.{i}": torch.ones(1) for i in range(25)}))
    with pytest.raises(CheckpointError) as error:
        load_model(open_checkpoint(folder))
    assert str(error.value).count("unexpected") == 20
    assert "... and 5 more" in str(error.value)


@pytest.mark.parametrize("keep", [5, 1000, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_checkpoint(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found nothing there"):
        open_checkpoint(tmp_path / "no")
    with pytest.raises(CheckpointError, match=r"expected model.safetensors.*found none"):
        open_checkpoint(tmp_path)
    (tmp_path / "params").mkdir()
    with pytest.raises(CheckpointError, match="JAX checkpoint"):
        open_checkpoint(tmp_path)


def test_bad_config_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: expected JSON"):
        open_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps({"vlm": {"width": 65}}))
    with pytest.raises(ConfigError, match=r"vlm.width: the tensors say 64, config.json says 65"):
        open_checkpoint(folder)


def test_two_files_without_index(folder: Path) -> None:
    path = folder / "model.safetensors"
    shutil.copy(path, folder / "a.safetensors")
    path.rename(folder / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"found in a.safetensors and b.safetensors"):
        open_checkpoint(folder)


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesise(
            tmp_path, PRESETS["tiny"], LAYOUTS["openpi"], 0, torch.bfloat16, progress=interrupt
        )
    assert not list(tmp_path.rglob("*model*"))
    with pytest.raises(CheckpointError, match="found none"):
        open_checkpoint(tmp_path)


def test_no_overwriting(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a folder without a model"):
        synthesise(folder, PRESETS["tiny"], LAYOUTS["openpi"], 0, torch.bfloat16)


def test_slabs_make_no_difference(
    tiny: Pi0, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SLAB_BYTES", 300)
    read: list[int] = []
    checkpoint = open_checkpoint(tiny_path)
    assert same(tiny, load_model(checkpoint, progress=read.append))
    assert sum(read) == checkpoint.read_bytes
    assert len(read) > 1000


WIDE = Pi0Config(
    vision=SiglipConfig(
        width=768, depth=6, mlp_dim=3072, num_heads=12, patch_size=14, image_size=224
    ),
    vlm=GemmaConfig(width=1024, depth=6, mlp_dim=8192, num_heads=8, num_kv_heads=1, head_dim=128),
    expert=GemmaConfig(width=512, depth=6, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=128),
    vocab_size=100_000,
    state_dim=32,
    action_dim=32,
    horizon=50,
    max_tokens=48,
    adaptive_norm=False,
)
MEASURE = """
import resource, sys, torch
from pi0.checkpoint import files
from pi0.checkpoint.load import load_model, open_checkpoint
files.SLAB_BYTES = 8 << 20  # as the full-size model's 64 MiB are to its 6.5 GB
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
checkpoint = open_checkpoint(sys.argv[1])
before = peak()
model = load_model(checkpoint, getattr(torch, sys.argv[2]))
print(sum(p.nbytes for p in model.parameters()), peak() - before)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    synthesise(folder, WIDE, LAYOUTS["openpi"], seed=0, dtype=torch.bfloat16)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory as Linux counts it")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_is_that_of_the_parameters(wide: Path, dtype: str) -> None:
    """At most 10 % above the parameters as held: neither the file nor a tensor is held twice."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(wide), dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    held, grown = map(int, done.stdout.split())
    assert held > 500e6
    assert grown < 1.10 * held


def test_image_size_too_small(tiny_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one patch of 14 pixels, found 13"):
        load_model(open_checkpoint(tiny_path), image_size=13)


def test_loaded_models_are_deterministic(tiny_path: Path, tiny: Pi0) -> None:
    inputs, noise = random_inputs(tiny.config, cameras=2, tokens=8, seed=0)
    again = load_model(open_checkpoint(tiny_path))
    assert torch.equal(tiny.sample_actions(inputs, noise), again.sample_actions(inputs, noise))
