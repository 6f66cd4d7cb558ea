"""`convert`: every source, every target, both models; nothing is lost and nothing is half-written.

Weights are copied, so actions are compared bit for bit where the dtype stays.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jax_folder import ORACLES, copy_oracle, edit, odd_config, remove, synthesise_jax
from peft_folder import copy_case
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pi0.checkpoint import convert as module
from pi0.checkpoint import orbax
from pi0.checkpoint.convert import TARGETS, convert
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.lerobot import POSTPROCESSOR, PREPROCESSOR
from pi0.checkpoint.load import Checkpoint, load_model, open_checkpoint
from pi0.checkpoint.orbax import open_folder
from pi0.checkpoint.synth import synthesise, tensor_list
from pi0.config import PRESETS
from pi0.errors import CheckpointError, ConfigError, Pi0Error
from pi0.inputs import from_npz, random_inputs
from pi0.model import Pi0
from pi0.policy import PolicyOptions, prepare
from pi0.policy.export import export_files
from pi0.policy.statistics import read_norm_stats

SOURCES = [*LAYOUTS, "jax"]


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def sources(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of odd sizes in bfloat16, in every form."""
    folder = tmp_path_factory.mktemp(f"sources-{model}")
    config = odd_config(model == "pi05")
    for name, layout in LAYOUTS.items():
        synthesise(folder / name, config, layout, 0, torch.bfloat16)
    same = synthesise_jax(folder / "jax", config, torch.bfloat16)
    shutil.copytree(same / "assets", folder / "jax" / "assets")
    shutil.copy(same / "tokenizer.json", folder / "jax")
    return {name: folder / name for name in SOURCES}


def run(source: Path, out: Path, target: str, **options: object) -> Checkpoint:
    """Converts as the command line does, and opens the result."""
    checkpoint = open_checkpoint(source)
    export = export_files(checkpoint, target, "bfloat16")
    convert(checkpoint, out, target, export.files, **options)  # type: ignore[arg-type]
    return open_checkpoint(out)


def actions(checkpoint: Checkpoint) -> torch.Tensor:
    inputs, noise = random_inputs(checkpoint.config, cameras=2, tokens=8, seed=0)
    return load_model(checkpoint).sample_actions(inputs, noise, 2)


def same(a: Pi0, b: Pi0) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# Source × target × model


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_actions_stay(source: str, target: str, sources: dict[str, Path], tmp_path: Path) -> None:
    before = open_checkpoint(sources[source])
    after = run(sources[source], tmp_path / "out", target)
    assert after.names.layout == target
    assert after.config == before.config
    assert {info.dtype for info in after.tensors.values()} == {"BF16"}
    assert same(load_model(before), load_model(after))
    assert torch.equal(actions(before), actions(after))
    setup = prepare(after, PolicyOptions(robot="generic"))
    assert [f.code for f in setup.findings if f.severity == "error"] == []
    assert setup.pipeline is not None
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        sources[source] / "tokenizer.json"
    ).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_state_of_pi05_that_is_wider_than_an_action(target: str, tmp_path: Path) -> None:
    """Which no tensor tells."""
    config = replace(odd_config(adaptive_norm=True), state_dim=40)
    synthesise(tmp_path / "source", config, LAYOUTS["lerobot"], 0, torch.float32)
    after = run(tmp_path / "source", tmp_path / "out", target)
    assert after.config == config
    assert run(tmp_path / "out", tmp_path / "back", "lerobot").config == config


def test_jax_to_pytorch_to_jax_is_bit_for_bit(sources: dict[str, Path], tmp_path: Path) -> None:
    for step, (source, target) in enumerate(
        [(sources["jax"], "lerobot"), (tmp_path / "0", "openpi"), (tmp_path / "1", "jax")]
    ):
        run(source, tmp_path / str(step), target)
    a, b = (open_folder(path / "params") for path in (sources["jax"], tmp_path / "2"))
    assert a.arrays == b.arrays
    for name in a.arrays:
        with a.open(name) as x, b.open(name) as y:
            assert torch.equal(x.read(), y.read())
    assert (a.folder / "_METADATA").read_bytes() == (b.folder / "_METADATA").read_bytes()


@pytest.mark.parametrize("target", ["openpi", "lerobot"])
def test_names_are_exactly_the_targets(
    target: str, model: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    run(sources["jax"], tmp_path / "out", target)
    expected = tensor_list(odd_config(model == "pi05"), LAYOUTS[target])
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(expected)
        head = next(name for name in expected if name.endswith("gemma_expert.lm_head.weight"))
        assert not file.get_tensor(head).any()


def test_dtype_of_all_weights(sources: dict[str, Path], tmp_path: Path) -> None:
    for target in TARGETS:
        up = run(sources["jax"], tmp_path / f"{target}-up", target, dtype=torch.float32)
        assert {info.dtype for info in up.tensors.values()} == {"F32"}
        down = run(tmp_path / f"{target}-up", tmp_path / target, "jax", dtype=torch.bfloat16)
        assert same(load_model(down), load_model(open_checkpoint(sources["jax"])))


# LoRA


@pytest.mark.parametrize("target", TARGETS)
def test_lora_of_jax_is_merged(target: str, tmp_path: Path) -> None:
    source = copy_oracle("jax_pi0_lora", tmp_path / "lora")
    after = run(source, tmp_path / "out", target)
    assert same(load_model(open_checkpoint(source)), load_model(after))
    arrays, expected = (
        dict(np.load(ORACLES / "jax_pi0_lora" / f"{name}.npz")) for name in ("in", "out")
    )
    inputs, noise = from_npz(after.config, arrays)
    got = load_model(after).sample_actions(inputs, noise, 10).numpy()
    assert np.abs(got - expected["actions"]).max() <= 1e-4


@pytest.mark.parametrize("target", TARGETS)
def test_adapters_are_merged(target: str, tmp_path: Path) -> None:
    adapter = copy_case(tmp_path)
    after = run(adapter, tmp_path / "out", target)
    assert after.adapter is None
    assert same(load_model(open_checkpoint(adapter)), load_model(after))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not settings.get("use_peft")


def test_a_model_that_was_merged_is_no_adapter_any_more(tmp_path: Path) -> None:
    """peft's merge_and_unload leaves the flag, with which LeRobot would look for an adapter."""
    checkpoint = edited(tmp_path, lambda settings, _: settings.update(use_peft=True))
    config = export_files(checkpoint, "lerobot", "bfloat16").files["config.json"]
    assert isinstance(config, bytes)
    assert json.loads(config)["use_peft"] is False


# Files beside the weights


def test_statistics_of_openpi_there_and_back(tmp_path: Path) -> None:
    source = copy_oracle("jax_pi0", tmp_path / "source")
    run(source, tmp_path / "lerobot", "lerobot")
    run(tmp_path / "lerobot", tmp_path / "jax", "jax")
    before = read_norm_stats(source / "assets/tiny_robot/norm_stats.json")
    after = read_norm_stats(tmp_path / "jax/assets/lerobot/norm_stats.json")
    for what, table in before.items():
        assert table.keys() == after[what].keys()
        for name, values in table.items():
            assert np.array_equal(values.astype(np.float32), after[what][name])
    settings = json.loads((tmp_path / "lerobot" / "config.json").read_text())
    assert settings["input_features"]["observation.state"]["shape"] == [7]
    assert settings["output_features"]["action"]["shape"] == [7]


def test_files_of_the_same_project_stay(tmp_path: Path) -> None:
    source = copy_oracle("jax_pi0", tmp_path / "source")
    run(source, tmp_path / "out", "openpi")
    name = "assets/tiny_robot/norm_stats.json"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    theirs = tmp_path / "lerobot"
    shutil.copytree(ORACLES / "lerobot_e2e_pi0" / "pretrained_model", theirs)
    settings = json.loads((theirs / "config.json").read_text())
    for name in ("paligemma_variant", "action_expert_variant"):
        settings.pop(name, None)
    heads = json.loads((ORACLES / "lerobot_e2e_pi0" / "config_heads.json").read_text())
    (theirs / "config.json").write_text(json.dumps(settings | heads))
    run(theirs, tmp_path / "again", "lerobot")
    for path in [*theirs.glob("policy_*"), theirs / "tokenizer.json"]:
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == again | settings | heads


@pytest.mark.parametrize(
    ("place", "found"), [("", "own/"), ("droid/0/", "droid/0/"), ("assets/", "own/")]
)
def test_statistics_name_the_robot_that_they_named(tmp_path: Path, place: str, found: str) -> None:
    """The checkpoint's own name does not, nor does a folder above the last one get lost."""
    source = copy_oracle("jax_pi0", tmp_path / "libero_7")
    (source / place).mkdir(parents=True, exist_ok=True)
    shutil.move(source / "assets/tiny_robot/norm_stats.json", source / place / "norm_stats.json")
    files = export_files(open_checkpoint(source), "openpi", "float32").files
    assert [name for name in files if "assets" in name] == [f"assets/{found}norm_stats.json"]


@pytest.mark.parametrize("steps", [3, None, [None], [{"registry_name": 1}]])
@pytest.mark.parametrize("name", [PREPROCESSOR, POSTPROCESSOR])
def test_processors_that_are_none_are_not_copied(tmp_path: Path, name: str, steps: object) -> None:
    synthesise(tmp_path, odd_config(False), LAYOUTS["lerobot"], 0, torch.bfloat16)
    (tmp_path / name).write_text(json.dumps({"name": "x", "steps": steps}))
    with pytest.raises(Pi0Error, match=f"{name}.*: expected "):
        export_files(open_checkpoint(tmp_path), "lerobot", "bfloat16")


def test_processors_without_statistics_are_copied_with_a_warning(tmp_path: Path) -> None:
    synthesise(tmp_path, odd_config(False), LAYOUTS["lerobot"], 0, torch.bfloat16)
    for name in (PREPROCESSOR, POSTPROCESSOR):
        content = json.loads((tmp_path / name).read_text())
        for step in content["steps"]:
            step.pop("state_file", None)
        (tmp_path / name).write_text(json.dumps(content))
    export = export_files(open_checkpoint(tmp_path), "lerobot", "bfloat16")
    assert {f.code for f in export.findings if f.severity == "warning"} == {"statistics-missing"}
    assert not any(f.severity == "error" for f in export.findings)


@pytest.mark.parametrize("steps", [0, 51, "5"])
@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_more_actions_than_a_chunk_has(tmp_path: Path, layout: str, steps: object) -> None:
    """LeRobot would not load the result."""
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS[layout], 0, torch.bfloat16)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_action_steps": steps}))
    for target in TARGETS:
        with pytest.raises(Pi0Error, match="n_action_steps: expected 1 to 50 actions of a chunk"):
            export_files(open_checkpoint(tmp_path), target, "bfloat16")


def test_a_robot_that_lerobot_cannot_name(tmp_path: Path) -> None:
    """A warning, but for one whose actions would be others."""
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["openpi"], 0, torch.bfloat16)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for robot in ("libero", "aloha"):  # relative actions; the robot's own gripper and signs
        path.write_text(json.dumps(content | {"robot": robot}))
        with pytest.raises(Pi0Error, match=rf"expected a robot .* absolute .* found {robot} in"):
            export_files(open_checkpoint(tmp_path), "lerobot", "bfloat16")
    path.write_text(json.dumps(content | {"robot": "tabletop"}))
    lost = [
        finding.sentence
        for target in TARGETS
        for finding in export_files(open_checkpoint(tmp_path), target, "bfloat16").findings
        if finding.code == "robot-lost"
    ]
    assert len(lost) == 1
    assert "it names robot tabletop, which LeRobot's files cannot say" in lost[0]


def test_what_is_assumed_stays_assumed(tmp_path: Path) -> None:
    source = copy_oracle("jax_pi0", tmp_path / "source")
    (source / "config.json").unlink()
    after = run(source, tmp_path / "out", "openpi")
    assert after.inferred.assumed == ["horizon", "max_tokens"]


def test_a_statistic_that_the_target_needs(tmp_path: Path) -> None:
    source = copy_oracle("jax_pi05", tmp_path / "source")
    path = source / "assets/tiny_robot/norm_stats.json"
    stats = json.loads(path.read_text())
    del stats["norm_stats"]["actions"]["q99"]
    path.write_text(json.dumps(stats))
    checkpoint = open_checkpoint(source)
    for target in TARGETS:
        with pytest.raises(Pi0Error, match="statistics of actions: .*found no q99"):
            export_files(checkpoint, target, "bfloat16")
        export = export_files(checkpoint, target, "bfloat16", norm_stats="none")
        assert "statistics-missing" in [f.code for f in export.findings]


def test_several_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in openpi's base models: those of many robots."""
    source = copy_oracle("jax_pi0", tmp_path / "source")
    shutil.copytree(source / "assets" / "tiny_robot", source / "assets" / "trossen")
    checkpoint = open_checkpoint(source)
    names = set(export_files(checkpoint, "openpi", "float32").files)
    assert names >= {f"assets/{robot}/norm_stats.json" for robot in ("tiny_robot", "trossen")}
    with pytest.raises(Pi0Error, match="found 2 .*Name one with --norm-stats"):
        export_files(checkpoint, "lerobot", "float32")
    one = source / "assets" / "trossen" / "norm_stats.json"
    export_files(checkpoint, "lerobot", "float32", norm_stats=one)
    monkeypatch.chdir(one.parent)  # whose robot they are is kept
    for path in (".", "norm_stats.json"):
        export = export_files(checkpoint, "openpi", "float32", norm_stats=path)
        assert "assets/trossen/norm_stats.json" in export.files


def edited(source: Path, edit: Callable[[dict[str, Any], dict[str, Any]], object]) -> Checkpoint:
    """A LeRobot folder whose config.json and steps (by name, of both processors) are edited."""
    synthesise(source, odd_config(False), LAYOUTS["lerobot"], 0, torch.bfloat16)
    paths = [source / n for n in ("config.json", PREPROCESSOR, POSTPROCESSOR)]
    settings, *files = (json.loads(path.read_text()) for path in paths)
    steps = {step["registry_name"]: step for file in files for step in file["steps"]}
    edit(settings, steps)
    for path, content in zip(paths, (settings, *files), strict=True):
        path.write_text(json.dumps(content))
    return open_checkpoint(source)


def edited_pi05(source: Path, edit: Callable[[list[Any]], object]) -> Checkpoint:
    """A LeRobot folder of a π0.5 whose list of steps before the model is edited."""
    synthesise(source, odd_config(True), LAYOUTS["lerobot"], 0, torch.bfloat16)
    content = json.loads((source / PREPROCESSOR).read_text())
    edit(content["steps"])
    (source / PREPROCESSOR).write_text(json.dumps(content))
    return open_checkpoint(source)


def set_step(name: str, **fields: Any) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda _, steps: steps[name]["config"].update(fields)


def make_relative(_: dict[str, Any], steps: dict[str, Any]) -> None:
    for name in ("relative_actions_processor", "absolute_actions_processor"):
        steps[name]["config"]["enabled"] = True


MIN_MAX = {"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "MEAN_STD"}
LOST = {
    "preprocessing-lost": lambda *_: None,
    "relative-actions-lost": make_relative,
    "norm-mode-lost": set_step("normalizer_processor", norm_map=MIN_MAX),
    "image-statistics-lost": set_step(
        "normalizer_processor", norm_map={k: "MEAN_STD" for k in MIN_MAX}
    ),
    "renames-lost": set_step("rename_observations_processor", rename_map={"front": "top"}),
    "steps-lost": lambda settings, _: settings.update(num_inference_steps=3),
    "executed-lost": lambda settings, _: settings.update(n_action_steps=3),
    "newline-lost": lambda _, steps: steps["pi0_new_line_processor"].update(
        registry_name="to_batch_processor"
    ),
    "eps-lost": set_step("normalizer_processor", eps=1e-3),
    "aloha-lost": lambda settings, _: settings.update(adapt_to_pi_aloha=True),
}


OTHERWISE = {
    "steps-lost": lambda settings, _: settings.update(
        num_steps=settings.pop("num_inference_steps") - 7
    ),
    "norm-mode-lost": set_step("normalizer_processor", normalize_observation_keys=["environment"]),
    "targets-lost": set_step(
        "normalizer_processor", norm_map={"STATE": "MEAN_STD", "ACTION": "MIN_MAX"}
    ),
}


@pytest.mark.parametrize("code", OTHERWISE)
def test_what_openpi_cannot_say_in_other_words(tmp_path: Path, code: str) -> None:
    found = export_files(edited(tmp_path / "source", OTHERWISE[code]), "jax", "bfloat16").findings
    assert {f.code for f in found} == {"preprocessing-lost", code}


def test_a_state_of_another_type_is_normalised_as_that(tmp_path: Path) -> None:
    def as_image(_: dict[str, Any], steps: dict[str, Any]) -> None:
        steps["normalizer_processor"]["config"]["features"]["observation.state"]["type"] = "VISUAL"

    export = export_files(edited(tmp_path / "source", as_image), "openpi", "bfloat16")
    assert "norm-mode-lost" in {finding.code for finding in export.findings}
    assert json.loads(export.files["config.json"])["norm_mode"] == "identity and mean_std"  # type: ignore[arg-type]


def test_what_a_pi05_writes_after_its_prompts_is_lost(tmp_path: Path) -> None:
    def end_in_a_line_break(steps: list[Any]) -> None:
        names = [step["registry_name"] for step in steps]
        at = names.index("tokenizer_processor")
        steps.insert(at, {"registry_name": "pi0_new_line_processor", "config": {}})

    checkpoint = edited_pi05(tmp_path / "source", end_in_a_line_break)
    found = export_files(checkpoint, "openpi", "bfloat16").findings
    assert [f.code for f in found if "with a line break" in f.sentence] == ["newline-lost"]


def test_a_state_that_comes_too_late_is_not_in_the_prompt(tmp_path: Path) -> None:
    def tokenize_first(steps: list[Any]) -> None:
        steps.sort(key=lambda step: step["registry_name"] != "tokenizer_processor")

    export = export_files(edited_pi05(tmp_path / "source", tokenize_first), "openpi", "bfloat16")
    assert json.loads(export.files["config.json"])["discrete_state_input"] is False  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [[[0.5]], [0.5], [[0.5] * 24]])
def test_statistics_of_one_value_or_row_are_written_by_dimension(
    values: list[Any], tmp_path: Path
) -> None:
    checkpoint = edited(tmp_path / "source", lambda *_: None)
    for path in checkpoint.folder.glob("policy_*.safetensors"):
        statistics = load_file(path)
        save_file(statistics | {"action.mean": torch.tensor(values)}, path)
    export = export_files(open_checkpoint(checkpoint.folder), "openpi", "bfloat16")
    content = json.loads(export.files["assets/lerobot/norm_stats.json"])  # type: ignore[arg-type]
    assert content["norm_stats"]["actions"]["mean"] == [0.5] * 24


@pytest.mark.parametrize("norm_stats", [None, "none"])
@pytest.mark.parametrize("code", LOST)
def test_what_openpi_cannot_say(tmp_path: Path, code: str, norm_stats: str | None) -> None:
    """By the processors, which decide in LeRobot, too."""
    checkpoint = edited(tmp_path / "source", LOST[code])
    found = export_files(checkpoint, "jax", "bfloat16", norm_stats).findings
    codes = {f.code for f in found} - {"statistics-missing"}
    assert codes == {"preprocessing-lost", code}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": [math.nan, *[0.0] * 31]}, "finite values of mean, found nan in dimension 0"),
        ({"std": [1.0] * 7}, r"vectors of one length, found mean \[32\] and std \[7\]"),
        ({"std": [-1.0] * 32}, "mean and std with a spread of 0 or more, found -1"),
        ({"q01": [2.0] * 32}, "q01 and q99 with a spread of 0 or more"),
        ({"mean": [0.0] * 40, "std": [1.0] * 40}, "at most the 32 values of the model, found 40"),
    ],
)
@pytest.mark.parametrize("target", ["openpi", "lerobot", "jax"])
def test_statistics_that_nobody_can_use(
    tiny_path: Path, tmp_path: Path, target: str, changes: dict[str, Any], message: str
) -> None:
    source = shutil.copytree(tiny_path, tmp_path / "source")
    (path,) = source.glob("assets/*/norm_stats.json")
    content = json.loads(path.read_text())
    content["norm_stats"]["actions"] |= changes
    path.write_text(json.dumps(content))
    with pytest.raises(Pi0Error, match=f"statistics of actions: expected {message}"):
        export_files(open_checkpoint(source), target, "float32")


def test_statistics_of_processors_that_nobody_can_use(tmp_path: Path) -> None:
    source = tmp_path / "source"
    synthesise(source, PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    (path,) = source.glob("policy_postprocessor_step_*.safetensors")
    save_file(load_file(path) | {"action.std": torch.full((32,), math.nan)}, path)
    for target in ("openpi", "lerobot"):
        with pytest.raises(Pi0Error, match="finite values of std, found nan"):
            export_files(open_checkpoint(source), target, "float32")


def test_steps_of_transformers_are_said(tmp_path: Path) -> None:
    source = tmp_path / "source"
    synthesise(source, PRESETS["tiny"], LAYOUTS["transformers"], 0, torch.float32)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"num_inference_steps": 3}))
    for target in ("openpi", "jax"):
        export = export_files(open_checkpoint(source), target, "float32")
        assert [finding.code for finding in export.findings] == ["steps-lost"]
        assert json.loads(export.files["config.json"])["num_inference_steps"] == 3


def test_fields_of_older_lerobot(tmp_path: Path) -> None:
    """LeRobot 0.6.1 refuses to load a config.json with fields that it does not know."""
    source = tmp_path / "source"
    old = {"proj_width": 1024, "use_cache": True, "adapt_to_pi_aloha": True, "num_steps": 3}

    def edit(settings: dict[str, Any], _: dict[str, Any]) -> None:
        settings.update(old)
        del settings["num_inference_steps"]

    export = export_files(edited(source, edit), "lerobot", "float32")
    settings = json.loads(export.files["config.json"])
    assert not settings.keys() & old.keys()
    assert settings["num_inference_steps"] == 3
    assert [finding.code for finding in export.findings] == ["aloha-lost"]


def test_the_length_of_prompts_is_the_processors(tmp_path: Path) -> None:
    checkpoint = edited(tmp_path / "source", set_step("tokenizer_processor", max_length=40))
    export = export_files(checkpoint, "openpi", "bfloat16")
    assert json.loads(export.files["config.json"])["max_token_len"] == 40


def test_a_step_that_nobody_knows_is_not_left_out(tmp_path: Path) -> None:
    checkpoint = edited(
        tmp_path / "source",
        lambda _, steps: steps["to_batch_processor"].update(registry_name="clip_state_processor"),
    )
    with pytest.raises(Pi0Error, match="found clip_state_processor"):
        export_files(checkpoint, "openpi", "bfloat16")


def test_a_state_in_the_prompt_that_nobody_stated(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(copy_oracle("jax_pi05", tmp_path / "source"))
    codes = [f.code for f in export_files(checkpoint, "lerobot", "float32").findings]
    assert "state-in-prompt-assumed" in codes


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("target", ["lerobot", "openpi"])
def test_a_state_in_the_prompt_that_the_user_states(
    tmp_path: Path, stated: bool, target: str
) -> None:
    checkpoint = open_checkpoint(copy_oracle("jax_pi05", tmp_path / "source"))
    export = export_files(checkpoint, target, "float32", state_in_prompt=stated)
    codes = {f.code for f in export.findings if f.code.startswith("state-in-prompt")}
    assert codes == ({"state-in-prompt"} if target == "lerobot" and not stated else set())
    found = json.loads(export.files["config.json"]).get("discrete_state_input")
    assert found == (stated if target == "openpi" else None)


def test_a_mode_of_normalisation_for_lerobot(tmp_path: Path) -> None:
    """openpi's files do not say it, and LeRobot's have to: both normalise alike after it."""
    source = tmp_path / "source"
    synthesise(source, PRESETS["tiny"], LAYOUTS["openpi"], 0, torch.float32)
    (stats,) = source.glob("assets/*/norm_stats.json")
    content = json.loads(stats.read_text())
    for table in content["norm_stats"].values():
        table |= {"mean": [0.5] * 32, "std": [2.0] * 32, "q01": [-3.0] * 32, "q99": [5.0] * 32}
    stats.write_text(json.dumps(content))
    checkpoint, out = open_checkpoint(source), tmp_path / "out"
    export = export_files(checkpoint, "lerobot", "float32", norm_mode="quantiles")
    convert(checkpoint, out, "lerobot", export.files)
    ours, theirs = (
        prepare(open_checkpoint(path), PolicyOptions(norm_mode=mode)).statistics
        for path, mode in ((source, "quantiles"), (out, None))
    )
    assert ours
    assert theirs
    values = np.linspace(-4, 6, 32)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.normalize(values), b.normalize(values), atol=1e-5)


@pytest.mark.parametrize(
    ("source", "target", "options", "message"),
    [
        ("openpi", "lerobot", {"norm_mode": "x"}, "norm_mode: expected one of mean_std, quant"),
        ("openpi", "jax", {"norm_mode": "quantiles"}, "found target jax, which states none"),
        ("lerobot", "lerobot", {"norm_mode": "quantiles"}, "files, found LeRobot's own"),
        ("openpi", "lerobot", {"state_in_prompt": True}, "expected a π0.5 .* found a π0, which"),
    ],
)
def test_what_has_no_place_in_the_target(
    source: str, target: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    synthesise(tmp_path / "source", PRESETS["tiny"], LAYOUTS[source], 0, torch.bfloat16)
    with pytest.raises(Pi0Error, match=message):
        export_files(open_checkpoint(tmp_path / "source"), target, "float32", **options)


# What does not fit, and failures


def test_out_is_never_overwritten(sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run(sources["jax"], out, "openpi")  # an empty one is taken
    before = sorted(out.iterdir())
    with pytest.raises(Pi0Error, match="expected a new or empty folder"):
        run(sources["jax"], out, "jax")
    assert sorted(out.iterdir()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(Pi0Error, match="expected a new or empty folder"):
        run(sources["jax"], tmp_path / "file", "jax")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_nothing_is_half_written(
    failure: BaseException | type[BaseException],
    target: str,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = module._values

    def fail(*arguments: object) -> Iterator[object]:
        for at, slab in enumerate(values(*arguments)):  # type: ignore[arg-type]
            if at == 20:
                raise failure
            yield slab

    monkeypatch.setattr(module, "_values", fail)
    expected = Pi0Error if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as error:
        run(sources["openpi"], tmp_path / "deep" / "out", target)
    assert list(tmp_path.iterdir()) == []
    if isinstance(failure, OSError):  # of the name that was asked for, not of a temporary one
        assert str(error.value).startswith(f"{tmp_path}/deep/out")
        assert ".part" not in str(error.value)


def test_out_that_somebody_else_has_filled_meanwhile(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, values = tmp_path / "out", module._values

    def write_too(*arguments: object) -> Iterator[object]:
        yield from values(*arguments)  # type: ignore[arg-type]
        out.mkdir()
        (out / "theirs").write_text("")

    monkeypatch.setattr(module, "_values", write_too)
    with pytest.raises(Pi0Error, match="out: expected a new or empty folder, found a full one"):
        run(sources["openpi"], out, "openpi")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_full_disk_in_our_words(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(pending: list[object]) -> None:
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "d/0": Failed writing')

    monkeypatch.setattr(orbax, "_wait", fill)
    with pytest.raises(Pi0Error, match=r"^\S*/out: expected room for \S+ kB, found: No space left"):
        run(sources["openpi"], tmp_path / "out", "jax")
    assert list(tmp_path.iterdir()) == []


def test_room_is_compared_before(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(Pi0Error, match=r"out: expected room for .*Make room"):
        run(sources["openpi"], tmp_path / "out", "jax")
    assert list(tmp_path.iterdir()) == []


def test_a_mount_point_is_refused_before_the_work(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be replaced, and what is beside it is on another disk."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    monkeypatch.setattr(module, "_values", None)
    with pytest.raises(Pi0Error, match="out: expected a new or empty folder, found a mount point"):
        run(sources["openpi"], out, "openpi")


def test_a_database_that_cannot_be_written(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(pending: list[object]) -> None:
        raise ValueError("PERMISSION_DENIED: read-only")

    monkeypatch.setattr(orbax, "_wait", full)
    with pytest.raises(Pi0Error, match="expected a place where JAX arrays can be written.*Make"):
        run(sources["openpi"], tmp_path / "out", "jax")
    assert list(tmp_path.iterdir()) == []


def test_sources_that_are_damaged(tmp_path: Path) -> None:
    source = copy_oracle("jax_pi0", tmp_path / "source")
    data = max((source / "params/ocdbt.process_0/d").iterdir(), key=lambda p: p.stat().st_size)
    with open(data, "r+b") as file:
        file.truncate(1000)
    for target in TARGETS:
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            run(source, tmp_path / "out", target)
    edit(copy_oracle("jax_pi0", tmp_path / "other"), lambda s: remove(s, "params.state_proj"))
    with pytest.raises(CheckpointError, match="2 missing"):
        run(tmp_path / "other", tmp_path / "out", "openpi")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "source"]


def test_targets_have_names(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--to: expected one of openpi, lerobot, jax, found"):
        convert(open_checkpoint(sources["jax"]), tmp_path / "out", "transformers", {})
