"""Paths that people name as a checkpoint: what is found, and the hint where it is none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.errors import CheckpointError, ConfigError

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7022134\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy to do as one likes with."""
    return shutil.copytree(tiny_path, tmp_path / "ckpt")


def refused(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    return str(error.value)


def test_home_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_checkpoint("~/ckpt").path == folder
    assert "found nothing there" in refused("~nobody-of-that-name/ckpt")


def test_a_bare_name_says_where_checkpoints_come_from() -> None:
    """The examples of the docs name checkpoints that a reader does not have yet."""
    assert refused("pi0_bas").endswith("; pi0 synth pi0_bas writes a random one there.")
    assert refused("some/where/pi0_bas").endswith("found nothing there.")


@pytest.mark.parametrize("link", [False, True])
def test_step_of_a_lerobot_run(folder: Path, tmp_path: Path, link: bool) -> None:
    step = tmp_path / "run" / "checkpoints" / "005000"
    shutil.copytree(folder, step / "pretrained_model")
    (step / "training_state").mkdir()
    save_file(load_file(folder / "model.safetensors"), step / "training_state" / "opt.safetensors")
    if link:
        (step.parent / "last").symlink_to("005000")
        step = step.parent / "last"
    opened = open_checkpoint(step)
    assert opened.path == opened.folder == step / "pretrained_model"
    assert opened.settings["horizon"] == 50
    for above in (step.parent, step.parent.parent):
        assert f"Name one, such as {step}." in refused(above)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("lerobot/pi0_base", "hf download lerobot/pi0_base --local-dir pi0_base"),
        ("lerobot/pi0_base", "google/paligemma-3b-pt-224"),
        ("lerobot/pi0_base", "gsutil -m cp -r gs://openpi-assets/checkpoints/pi0_base ."),
        ("hf://lerobot/pi0_base", "hf download lerobot/pi0_base"),
        ("https://huggingface.co/lerobot/pi0_base/tree/main", "hf download lerobot/pi0_base "),
        ("https://example.org/pi0.safetensors", "found an address. Download it first."),
        ("gs://openpi-assets/checkpoints/pi0_base", "gs://openpi-assets/checkpoints/pi0_base . ("),
        (Path("s3://bucket/run/pi0"), "s3://bucket/run/pi0: expected"),
        ("s3://bucket/run/pi0", "aws s3 cp --recursive s3://bucket/run/pi0 pi0"),
    ],
)
def test_hub_ids_and_addresses(path: str, message: str) -> None:
    assert message in refused(path)


def test_hub_id_in_the_local_cache(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    snapshot = tmp_path / "hub" / "models--lerobot--pi0_base" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    assert f"The hub's cache has it: name {snapshot}." in refused("lerobot/pi0_base")
    assert f"such as {snapshot}" in refused(snapshot.parents[1])


def test_paths_that_are_no_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/pi0", "a/model.safetensors", tmp_path / "x", "base"):
        assert "hf download" not in refused(path)
    assert "nothing there, and no folder train either. Is it" in refused("train/pi0")


def test_jax(tmp_path: Path) -> None:
    for name in ("a/params/_METADATA", "b/manifest.ocdbt", "c/params/ocdbt.process_0/d"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    for path in ("a", "a/params", "c"):
        assert "expected a JAX checkpoint with manifest.ocdbt" in refused(tmp_path / path)
    assert "a truncated or damaged one" in refused(tmp_path / "b")
    assert f"Name its folder: {tmp_path}/a/params." in refused(tmp_path / "a/params/_METADATA")


def test_steps_of_an_openpi_run(tmp_path: Path) -> None:
    for step in ("5000", "10000"):
        (tmp_path / "pi0_libero" / "mine" / step / "params").mkdir(parents=True)
        (tmp_path / "pi0_libero" / "mine" / step / "params" / "_METADATA").touch()
    for above in (tmp_path, tmp_path / "pi0_libero", tmp_path / "pi0_libero" / "mine"):
        assert "2 in folders below. Name one, such as" in refused(above)
        assert f"{tmp_path}/pi0_libero/mine/10000." in refused(above)


def test_runs_far_below(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "train" / "2026-11-26" / "12-00-00_pi0" / "checkpoints"
    shutil.copytree(folder, run / "000200" / "pretrained_model")
    adapter = run / "000100" / "pretrained_model" / "adapter_model.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.touch()
    (tmp_path / "outputs" / "again").symlink_to(tmp_path / "outputs")  # leads in a circle
    assert f"but 2 in folders below. Name one, such as {run / '000200'}." in refused(
        tmp_path / "outputs"
    )
    shutil.rmtree(run / "000200")
    assert f"Name one, such as {run / '000100'}." in refused(run)


def test_parts_of_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    for part in ("assets", "assets/synthetic"):
        assert f"Name the checkpoint that it is a part of: {folder}." in refused(folder / part)
    step = tmp_path / "005000"
    state = step / "training_state"
    shutil.copytree(folder, step / "pretrained_model")
    state.mkdir()
    for name in ("optimizer_state.safetensors", "rng_state.safetensors"):
        (state / name).touch()
    assert f"Name the checkpoint that it is a part of: {step}." in refused(state)


def test_link_above_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "last").symlink_to("020000")
    for path in ("last", "last/pretrained_model"):
        assert "link to 020000, which is not there" in refused(tmp_path / path)


@pytest.mark.parametrize("name", ["pi0_base.tar", "pi0_base.tar.gz", "pi0.zip"])
def test_archives(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04rest")
    for path in (tmp_path, tmp_path / name):
        assert f"found the archive {name}. Unpack it" in refused(path)


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (b"\x1f\x8b\x08", "a compressed file. Unpack it"),
        (b"PK\x03\x04", "a pickle of PyTorch or another zip archive"),
    ],
)
def test_files_of_other_kinds(folder: Path, start: bytes, found: str) -> None:
    (folder / "model.safetensors").write_bytes(start + bytes(100))
    assert f"expected a complete safetensors file, found {found}" in refused(folder)


def test_errors_name_the_checkpoint(folder: Path) -> None:
    weights = folder / "model.safetensors"
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"type": "pi0_fast"}')
    with pytest.raises(ConfigError) as error:
        open_checkpoint(folder)
    assert str(error.value).startswith(
        f"{folder}: config.json type: expected one of pi0, pi05, found 'pi0_fast'. Other models "
    )
    save_file({"x": load_file(weights)["action_out_proj.bias"]}, weights)
    with pytest.raises(ConfigError, match="config.json type"):  # before the tensors of that model
        open_checkpoint(folder)
    (folder / "config.json").write_text(config)
    for path in (folder, weights):
        assert refused(path).startswith(f"{path}: tensor names: expected")


def test_params_beside_safetensors(folder: Path) -> None:
    (folder / "params").mkdir()
    assert not open_checkpoint(folder).findings
    (folder / "params" / "manifest.ocdbt").touch()
    (found,) = open_checkpoint(folder).findings
    assert (found.severity, found.code) == ("warning", "params-ignored")
    assert f"name them: {folder}/params." in found.sentence


def test_files_that_macos_adds(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pi0.safetensors")
    (folder / "._pi0.safetensors").write_bytes(b"\0\5\26\7" * 20)
    assert {info.file.name for info in open_checkpoint(folder).tensors.values()} == {
        "pi0.safetensors"
    }


def test_adapters(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "base_model_name_or_path": "lerobot/pi0_base",
                "peft_type": "LORA",
                "target_modules": ["q_proj"],
            }
        )
    )
    (found,) = open_checkpoint(folder).findings
    assert (found.severity, found.code) == ("warning", "adapter-ignored")
    (folder / "model.safetensors").unlink()
    for path in (folder, folder / "adapter_model.safetensors"):
        assert "not an adapter of this model" in refused(path)


def test_adapter_under_another_name(folder: Path) -> None:
    values = load_file(folder / "model.safetensors")["action_out_proj.bias"]
    save_file({"base_model.model.x.lora_A.weight": values}, folder / "model.safetensors")
    assert "of an adapter: call the file adapter_model.safetensors" in refused(folder)


def test_an_adapter_that_was_not_merged(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj."
    factor = tensors["action_out_proj.bias"].clone()
    save_file({**tensors, f"{name}lora_A.weight": factor}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)unexpected: .*lora_A.*LoRA was not merged"):
        load_model(open_checkpoint(folder))
    wrapped = {
        f"base_model.model.{key.replace('.q_proj.', '.q_proj.base_layer.')}": values
        for key, values in tensors.items()
    }
    wrapped[f"base_model.model.{name}lora_A.default.weight"] = factor
    save_file(wrapped, folder / "model.safetensors")
    assert "LoRA was not merged. Save what peft's merge_and_unload returns" in refused(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pi0.pth", "last.ckpt"])
def test_pickles(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04rest")
    for path in (tmp_path, tmp_path / name):
        assert f"found {name}. Pickled weights are not read" in refused(path)
    (tmp_path / name).rename(tmp_path / "model.safetensors")
    assert "found a pickle of PyTorch" in refused(tmp_path)


def test_files_that_are_no_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    for content, message in (
        (LFS, "found a Git LFS pointer. Fetch the file that it stands for: git lfs pull"),
        ("", "found an empty file. Copy or download it again"),
        ("<!DOCTYPE html>\n<html>not found</html>", "found a web page"),
        ("# A read-me in its place", "found another kind of file. Name a checkpoint's folder"),
        ("\7\0\0\0\0\0\0\0{", "found 9 bytes of a truncated or damaged one ("),
    ):
        path.write_text(content)
        assert f"{path}: expected a complete safetensors file, {message}" in refused(folder)
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).touch()
    path.unlink()
    assert "found an empty file" in refused(folder)


def test_config_json_named_as_the_checkpoint(folder: Path) -> None:
    assert f"Name the folder that it lies in: {folder}." in refused(folder / "config.json")


def test_folder_and_link_in_place_of_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    path.symlink_to(folder / "blobs" / "abc")
    assert "found a link to a file that is not there" in refused(folder)
    assert "found a link to" in refused(path)
    path.unlink()
    path.mkdir()
    assert f"{path}: expected a file, found a folder" in refused(folder)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_files_that_may_not_be_read(folder: Path) -> None:
    for path in (folder / "config.json", folder / "model.safetensors", folder):
        mode = path.stat().st_mode
        path.chmod(0)
        assert "Permission denied" in refused(folder)
        path.chmod(mode)


def test_error_of_the_system_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_access(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pi0.checkpoint.files.safe_open", no_access)
    assert "expected a safetensors file that can be read, found: Permission" in refused(folder)


@pytest.fixture
def sharded(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for part, shard in ((names[::2], "a.safetensors"), (names[1::2], "b.safetensors")):
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["../b.safetensors", "/tmp/b.safetensors", 3, None])
def test_index_that_names_other_places(sharded: Path, name: object) -> None:
    write_index(sharded, {"x": name})
    assert f"expected the names of files beside it, found {name!r}" in refused(sharded)
    write_index(sharded, {})
    assert "expected an object `weight_map` of tensors" in refused(sharded)


def test_index_and_shards_that_differ(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    write_index(sharded, {**weight_map, "lost.weight": "a.safetensors"})
    assert "found 1 that are not in the shard it names, such as lost.weight (a.s" in refused(
        sharded
    )
    first = next(iter(weight_map))
    write_index(sharded, {name: file for name, file in weight_map.items() if name != first})
    assert f"found 1 not listed, such as {first}" in refused(sharded)


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    for old, new in zip("ab", names, strict=True):
        (sharded / f"{old}.safetensors").rename(sharded / new)
    assert {info.file.name for info in open_checkpoint(sharded).tensors.values()} == {*names}
    assert f"found one of 2 shards. Name the folder that it lies in: {sharded}." in refused(
        sharded / names[0]
    )
    (sharded / names[1]).unlink()
    assert f"expected 2 shards as {names[0]} says, found no {names[1]}. Copy" in refused(sharded)


def test_index_decides_between_copies(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    a, b = (load_file(sharded / f"{name}.safetensors") for name in "ab")
    name = next(iter(a))
    save_file({**b, name: a[name]}, sharded / "b.safetensors")
    assert open_checkpoint(sharded).tensors[name].file.name == weight_map[name]
