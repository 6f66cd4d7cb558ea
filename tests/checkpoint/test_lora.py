"""PEFT adapters: LeRobot's and peft's own actions, every field that changes them, every misfit.

1e-4: the merged weights are rounded once, peft adds both paths in the activations; the two differ
by 2e-6. Without the adapter the actions are off by more than 0.1.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_folder import EXPERT, ORACLE, PREFIX, configure, copy_case, rewrite, write_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from pi0.checkpoint import files
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.engines.base import make_engine
from pi0.engines.fast.weights import Scheme, pack
from pi0.engines.spec import EngineSpec
from pi0.errors import CheckpointError, ConfigError
from pi0.inputs import from_npz

Q = EXPERT + "0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return copy_case(tmp_path)


def refused(path: Path, base: Path | None = None) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as error:
        load_model(open_checkpoint(path, base=base))
    assert "\n" not in str(error.value)
    return str(error.value)


def weights(path: Path, base: Path | None = None) -> dict[str, Tensor]:
    return load_model(open_checkpoint(path, base=base)).state_dict()


def actions(path: Path) -> np.ndarray[Any, Any]:
    with np.load(ORACLE / "in.npz") as arrays:
        inputs, noise = from_npz(open_checkpoint(path).config, dict(arrays))
    with make_engine(EngineSpec("reference", "float32"), open_checkpoint(path)) as engine:
        return engine.sample(inputs, noise, 10).numpy()


# As LeRobot and peft compute it


def test_actions_are_lerobots(adapter: Path) -> None:
    with np.load(ORACLE / "out.npz") as expected:
        np.testing.assert_allclose(actions(adapter), expected["actions"], atol=1e-4)
        np.testing.assert_allclose(actions(adapter), expected["actions_merged"], atol=1e-4)
        np.testing.assert_allclose(
            actions(adapter.parent / "base"), expected["actions_base"], atol=1e-4
        )
        assert np.abs(expected["actions"] - expected["actions_base"]).max() > 0.1


@pytest.mark.parametrize("slab", [64, 300, 64 << 20])
def test_merged_weights(adapter: Path, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SLAB_BYTES", slab)
    tensors = load_file(adapter / "adapter_model.safetensors")
    base, merged = weights(adapter.parent / "base"), weights(adapter)
    product = tensors[f"{Q}.lora_B.weight"].double() @ tensors[f"{Q}.lora_A.weight"].double()
    expected = base["expert.blocks.0.q_proj.weight"].double() + 8 / 4 * product
    torch.testing.assert_close(merged["expert.blocks.0.q_proj.weight"], expected.float())
    same = [name for name, value in base.items() if torch.equal(value, merged[name])]
    assert len(base) - len(same) == len(tensors) / 2


def scale_of(adapter: Path) -> float:
    """By how much q_proj's product is multiplied, from the weights."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    product = tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
    name = "expert.blocks.0.q_proj.weight"
    added = weights(adapter)[name] - weights(adapter.parent / "base")[name]
    return float((added * product).sum() / (product * product).sum())


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"lora_alpha": 3}, 3 / 4),
        ({"lora_alpha": None}, 8 / 4),
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 2}}, 2 / 4),
        ({"alpha_pattern": {"proj": 2}}, 8 / 4),  # the end of a name, from a dot on
        ({"alpha_pattern": {r".*\.0\.self_attn\.q_proj": 2, "q_proj": 1}}, 2 / 4),
        ({"alpha_pattern": {r"layers\.1\..*": 2}, "use_rslora": True}, 8 / math.sqrt(4)),
        ({"r": 7, "rank_pattern": {".*": 4}}, 8 / 4),
        ({"r": 7, "rank_pattern": {".*": 4}, "use_rslora": True}, 8 / math.sqrt(4)),
    ],
)
def test_scale(adapter: Path, fields: dict[str, Any], scale: float) -> None:
    configure(adapter, **fields)
    assert scale_of(adapter) == pytest.approx(scale, rel=1e-4)


def test_trained_tensors_replace_those_of_the_base(adapter: Path) -> None:
    bias, weight = torch.randn(32), torch.randn(32)
    configure(adapter, modules_to_save=["gemma_expert.model.norm"], bias="lora_only")

    def add(tensors: dict[str, Tensor]) -> None:
        for name in ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in"):
            tensors[f"{PREFIX}{name}.base_layer.bias"] = bias.clone()
        tensors[f"{PREFIX}action_time_mlp_out.bias"] = bias
        tensors[f"{PREFIX}paligemma_with_expert.gemma_expert.model.norm.weight"] = weight
        tensors[f"{PREFIX}paligemma_with_expert.gemma_expert.lm_head.weight"] = torch.ones(2, 2)

    rewrite(adapter, add)
    merged, opened = weights(adapter), open_checkpoint(adapter)
    assert torch.equal(merged["state_proj.bias"], bias)
    assert torch.equal(merged["expert.norm.weight"], weight)
    assert opened.adapter
    assert len(opened.adapter.replaced) == 6
    assert len(opened.tensors) == len(open_checkpoint(adapter.parent / "base").tensors)


def test_embedding_that_was_trained(adapter: Path) -> None:
    table = torch.randn(512, 64)
    key = f"{PREFIX}paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    rewrite(adapter, lambda tensors: tensors.update({key: table}))
    opened = open_checkpoint(adapter)
    assert opened.names.embeddings[0] == key
    assert torch.equal(load_model(opened).token_embedding.weight, table)


def test_base_of_another_layout_and_dtype(adapter: Path) -> None:
    """Values in bfloat16 are added to in float32, and stay so."""
    for name in ("openpi", "transformers"):
        base = adapter.parent / name
        synthesise(base, PRESETS["tiny"], LAYOUTS[name], seed=0, dtype=torch.bfloat16)
        (adapter / "config.json").unlink(missing_ok=True)
        opened = open_checkpoint(adapter, base=base)
        assert opened.settings == open_checkpoint(base).settings
        read: list[int] = []
        model = load_model(opened, progress=read.append)
        assert sum(read) == opened.read_bytes
        merged = model.state_dict()["expert.blocks.0.q_proj.weight"]
        assert not torch.equal(merged, merged.bfloat16().float())


def test_fast_engine_reads_it_too(adapter: Path) -> None:
    with np.load(ORACLE / "in.npz") as arrays:
        inputs, noise = from_npz(open_checkpoint(adapter).config, dict(arrays))
    with (
        np.load(ORACLE / "out.npz") as expected,
        make_engine(EngineSpec("cpu", "float32"), open_checkpoint(adapter)) as engine,
    ):
        got = engine.sample(inputs, noise, 10).numpy()
        np.testing.assert_allclose(got, expected["actions"], atol=1e-4)


def test_fast_engine_does_not_round_what_is_merged(tmp_path: Path) -> None:
    """Into tensors that fast engines otherwise keep as they are stored."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    synthesise(base, PRESETS["pi05_tiny"], LAYOUTS["lerobot"], seed=0, dtype=torch.bfloat16)
    write_adapter(adapter, "base")
    configure(adapter, target_modules=["gemma_expert.model.layers.0.input_layernorm.dense"])
    dense = EXPERT + "0.input_layernorm.dense"
    factors = {f"{dense}.lora_A.weight": torch.ones(2, 32) / 300}
    save_file(
        factors | {f"{dense}.lora_B.weight": torch.ones(96, 2)},
        adapter / "adapter_model.safetensors",
    )
    name = "expert.blocks.0.norm1.dense.weight"
    packed = pack(open_checkpoint(adapter, base=base), Scheme(torch.float32))[name]
    assert torch.equal(packed, weights(adapter, base)[name])
    assert not torch.equal(packed, packed.bfloat16().float())


# Where the base lies


def test_places_of_the_base(adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    for declared in ("../base", "base", "somebody/base", str(base)):
        configure(adapter, base_model_name_or_path=declared)
        assert open_checkpoint(adapter).base == (adapter / declared if ".." in declared else base)
    other = shutil.copytree(base, tmp_path / "elsewhere" / "pi0")
    assert open_checkpoint(adapter, base=other).base == other
    assert open_checkpoint(adapter / "adapter_model.safetensors").path == adapter


def test_base_as_it_was_called_in_the_current_folder(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where peft and LeRobot look for it."""
    base = shutil.move(tmp_path / "base", tmp_path / "work" / "bases" / "pi0")
    configure(adapter, base_model_name_or_path="bases/pi0")
    assert "--base DIR" in refused(adapter)
    monkeypatch.chdir(tmp_path / "work")
    assert open_checkpoint(adapter).base == base


@pytest.mark.parametrize("declared", ["lerobot/pi0_base", "somebody/adapter", "a/000200", None, ""])
def test_base_that_is_not_found(adapter: Path, declared: str | None) -> None:
    """Nor is it the adapter's own folder, nor another step of it, which may have its name."""
    shutil.copytree(adapter, adapter.parent / "000200")
    configure(adapter, base_model_name_or_path=declared)
    assert "--base DIR" in refused(adapter)


def test_base_in_the_hubs_cache(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(adapter.parent))
    snapshot = adapter.parent / "hub" / "models--lerobot--pi0_base" / "snapshots" / "abc"
    shutil.copytree(adapter.parent / "base", snapshot)
    configure(adapter, base_model_name_or_path="lerobot/pi0_base")
    assert f"--base {snapshot}." in refused(adapter)


def test_step_of_a_training_run(adapter: Path) -> None:
    step = adapter.parent / "run" / "005000"
    shutil.copytree(adapter, step / "pretrained_model")
    base = adapter.parent / "base"
    opened = open_checkpoint(step, base=base)
    assert opened.path == opened.folder == step / "pretrained_model"
    assert opened.folder_of("nothing") == opened.folder
    assert opened.folder_of("model.safetensors") == base


def test_base_that_is_none(adapter: Path, tiny_path: Path) -> None:
    assert "found nothing there" in refused(adapter, adapter.parent / "no")
    assert "found a PEFT adapter. Name the full model" in refused(adapter, adapter)
    assert "expected only with a PEFT adapter, found no adapter" in refused(tiny_path, tiny_path)


def test_adapter_beside_a_full_model(adapter: Path) -> None:
    """It is ignored, with a finding, unless the model is named as its base."""
    both = adapter.parent / "base"
    plain = weights(both)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, both)
    (found,) = open_checkpoint(both).findings
    assert found.code == "adapter-ignored"
    assert f"--base {both}" in found.sentence
    name = "state_proj.weight"
    assert torch.equal(weights(both)[name], plain[name])
    assert torch.equal(weights(both, both)[name], weights(adapter)[name])
    assert not open_checkpoint(both, base=both).findings


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type: expected LORA, found 'LOHA'"),
        ({"peft_type": None}, "peft_type: expected LORA, found None"),
        ({"use_dora": True}, "use_dora: expected it unset"),
        ({"lora_bias": True}, "lora_bias: expected it unset"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: expected it unset"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens: expected it unset"),
        ({"of_the_future": {"x": 1}}, "of_the_future: expected it unset"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: expected a start that leaves"),
        ({"r": 0}, "r: expected a number from 0 to 1e+06, found 0"),
        ({"r": "4"}, "r: expected a number from 0 to 1e+06, found 4"),
        ({"lora_alpha": math.inf}, "lora_alpha: expected a number from 0 to 1e+06, found inf"),
        ({"alpha_pattern": [1]}, r"alpha_pattern: expected an object, found [1]"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: expected regular expressions, found '('"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern.q_proj: expected a number from 0"),
        ({"r": 8}, "expected rank 8, as it states, found lora_A of rank 4"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj: expected rank 2, as it states"),
        (
            {"modules_to_save": ["state_proj"]},
            "state_proj.bias: expected the whole tensor, as modules_to_save of "
            "adapter_config.json says, found none",
        ),
        ({"target_modules": None}, "target_modules: expected names of modules or a regular expr"),
        ({"target_modules": [1]}, "target_modules: expected names of modules or a regular expr"),
        ({"target_modules": "("}, "target_modules: expected regular expressions, found '('"),
        (
            {"target_modules": ["q_proj", "v_proj"]},
            "action_in_proj.weight: expected no lora_A",
        ),
        ({"target_modules": "all-linear"}, "blocks.0.down_proj.weight: expected lora_A and"),
        ({"exclude_modules": ["state_proj"]}, "state_proj.weight: expected no lora_A and lora_B"),
        ({"exclude_modules": {"q": 1}}, "exclude_modules: expected names of modules or a regular"),
        ({"layers_to_transform": [0]}, "layers_to_transform: expected it unset, since target_mod"),
        ({"layers_pattern": ["h"]}, "layers_pattern: expected it unset, since target_modules"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": "0"},
            "layers_to_transform: expected a number or a list of numbers, found '0'",
        ),
        (
            {"target_modules": ["q_proj"], "layers_pattern": "layers"},
            "layers_to_transform: expected numbers beside layers_pattern, found None",
        ),
        ({"modules_to_save": "state_proj"}, "modules_to_save: expected a list of names"),
        ({"modules_to_save": 5}, "modules_to_save: expected a list of names"),
        ({"use_rslora": "false"}, "use_rslora: expected true or false, found 'false'"),
        ({"bias": ["all"]}, "bias: expected one of none, all, lora_only, found ['all']"),
        ({"lora_alpha": 10**400}, "lora_alpha: expected a number from 0 to 1e+06"),
        ({"bias": "lora_only"}, "expected it in the adapter, whose bias is 'lora_only'"),
        ({"bias": "all"}, "expected it in the adapter, whose bias is 'all', found it missing"),
    ],
)
def test_fields(adapter: Path, fields: dict[str, Any], message: str) -> None:
    configure(adapter, **fields)
    assert message in refused(adapter)


def test_a_module_that_is_saved_in_part(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if "action_out_proj.lora" not in k}
    save_file(tensors | {f"{PREFIX}action_out_proj.weight": torch.ones(32, 32)}, path)
    configure(adapter, modules_to_save=["action_out_proj"])
    assert "action_out_proj.bias: expected the whole tensor, as modules_to_save" in refused(adapter)


def test_truncated_adapter(adapter: Path) -> None:
    """peft loads the rest without a word."""
    rewrite(adapter, lambda tensors: [tensors.pop(f"{Q}.lora_{f}.weight") for f in "AB"])
    message = refused(adapter)
    assert "expert.blocks.0.q_proj.weight: expected lora_A and lora_B, as target_modules" in message


def drop(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(key)


def put(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[..., object]:
    return lambda tensors: tensors.update({key: torch.ones(shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{Q}.lora_A.weight"), "expected lora_A and lora_B, found lora_B alone"),
        (put(f"{Q}.lora_A.weight", 3, 32), "of one rank, found [3, 32] and [128, 4]"),
        (put(f"{Q}.lora_A.weight", 4), "of one rank, found [4] and [128, 4]"),
        (put(f"{Q}.lora_A.weight", 4, 31), "expected factors of a weight [128, 32], found of"),
        (put(f"{Q}.lora_B.weight", 127, 4), "weight [128, 32], found of [127, 32]"),
        (put(f"{Q}.lora_magnitude_vector", 128), "1 others, such as"),
        (
            put("base_model.model.state_proj.lora_A.weight", 4, 32),
            "expected one tensor for each place",
        ),
        (put("model.x.weight", 2), "1 others, such as model.x.weight"),
        (put(f"{Q}.lora_embedding_A", 4, 8), "1 others, such as"),
        (put(f"{PREFIX}state_proj.bias", 31), "state_proj.bias: expected shape [32], found [31]"),
        (put(f"{PREFIX}state_proj.weight", 32, 32), "expected factors or the whole tensor, found"),
        (put(f"{PREFIX}time_mlp_in.bias", 32), "time_mlp_in.bias: expected the base to have it"),
        (
            put(f"{EXPERT}7.self_attn.q_proj.weight", 128, 32),
            "expert.blocks.7.q_proj.weight: expected the base to have it",
        ),
        (
            put(f"{PREFIX}state_proj.bias", 32, dtype=torch.float64),
            "expected BF16, F32 or F16, found F64",
        ),
        (dict.clear, "found none. It is not an adapter of this model"),
        (
            lambda tensors: tensors[f"{Q}.lora_B.weight"].fill_(math.nan),
            "expected finite weights, found 512 NaN",
        ),
    ],
)
def test_tensors(adapter: Path, change: Callable[..., object], message: str) -> None:
    rewrite(adapter, change)
    assert message in refused(adapter)


def test_files(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    assert "truncated or damaged" in refused(adapter)
    path.unlink()
    assert "expected adapter_model.safetensors of a PEFT adapter, found it missing" in refused(
        adapter
    )
    (adapter / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    assert "found adapter_model.bin. Pickled weights are not read" in refused(adapter)
    path.write_bytes(data)
    (adapter / "adapter_config.json").write_text("[]")
    assert "expected a JSON object" in refused(adapter)
    (adapter / "adapter_config.json").unlink()
    assert "expected adapter_config.json of a PEFT adapter" in refused(adapter)


def test_config_json_and_processors_are_the_adapters_first(adapter: Path) -> None:
    base = adapter.parent / "base"
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"chunk_size": 9}))
    assert open_checkpoint(adapter).config.horizon == 50
    (adapter / "config.json").unlink()
    assert open_checkpoint(adapter).config.horizon == 9
    for name in (base, adapter):
        save_file({"x": torch.ones(1)}, name / "policy_x.safetensors")
        assert open_checkpoint(adapter).folder_of("policy_*") == name


def test_adapter_of_pi05(adapter: Path, tmp_path: Path) -> None:
    """Time's MLP and an adaptive norm; the adapter of a π0 does not fit."""
    base = tmp_path / "pi05"
    synthesise(base, PRESETS["pi05_tiny"], LAYOUTS["lerobot"], seed=0, dtype=torch.float32)
    (adapter / "config.json").unlink()
    assert "action_time_mlp_in.weight: expected the base to have it" in refused(adapter, base)
    modules = {f"{PREFIX}time_mlp_in": (32, 32), f"{EXPERT}0.input_layernorm.dense": (96, 32)}
    configure(adapter, target_modules=["time_mlp_in", "0.input_layernorm.dense"])

    def replace_all(tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        for module, (out, into) in modules.items():
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, into)
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, 4)

    rewrite(adapter, replace_all)
    plain, merged = weights(base), weights(adapter, base)
    changed = {name for name, value in plain.items() if not torch.equal(value, merged[name])}
    assert changed == {"time_mlp_in.weight", "expert.blocks.0.norm1.dense.weight"}
