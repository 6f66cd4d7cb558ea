"""Reading that refuses what is damaged, and writing that leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pi0.checkpoint import files
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.checkpoint.outputs import new_folder, replacing, require_writable
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.errors import CheckpointError, ConfigError, Pi0Error

LAYER_NORM = "paligemma_with_expert.paligemma.model.language_model.norm.weight"


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy to do as one likes with."""
    return shutil.copytree(tiny_path, tmp_path / "ckpt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(
    folder: Path, dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor that is read, also in a later slab, names itself and its file."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    checkpoint = open_checkpoint(folder)
    monkeypatch.setattr(files, "SLAB_BYTES", 2000)
    for name in sorted(checkpoint.names.ours)[::5]:
        damaged = tensors[name].clone()
        damaged.view(-1)[-1] = value
        save_file({**tensors, name: damaged}, path)
        with pytest.raises(CheckpointError) as error:
            load_model(open_checkpoint(folder))
        assert str(error.value).startswith(f"{path}: {name}: expected finite weights, found 1 NaN ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_are_finite(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    greatest = torch.finfo(dtype).max
    tensors[LAYER_NORM] = torch.full_like(tensors[LAYER_NORM], greatest)
    tensors[LAYER_NORM][::3] = -greatest
    save_file(tensors, path)
    assert float(load_model(open_checkpoint(folder)).vlm.norm.weight[1]) == greatest


@given(st.lists(st.floats(width=32), min_size=1, max_size=70))
def test_check_is_exact(values: list[float]) -> None:
    """Vectorised minimum and maximum must not lose a NaN, wherever it stands."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
        damaged = not torch.isfinite(tensor).all()
        try:
            files.require_finite(Path("x"), "x", tensor)
            assert not damaged
        except CheckpointError:
            assert damaged


def test_config_json(folder: Path) -> None:
    path = folder / "config.json"
    text = path.read_text(encoding="utf-8")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert open_checkpoint(folder).config == PRESETS["tiny"]
    settings = json.loads(text)
    path.write_text(json.dumps({**settings, "dropout": float("nan"), "type": None, "1": None}))
    assert open_checkpoint(folder).config == PRESETS["tiny"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "expected JSON, found"),
        (b"{", "expected JSON, found"),
        (b"", "expected JSON, found"),
        (b"[]", "expected a JSON object, found a list"),
        (b"null", "expected a JSON object, found a NoneType"),
        ('{"type": "pi0"}'.encode("utf-16"), "expected JSON, found"),
        (b'{"horizon": ' + b"9" * 5000 + b"}", "expected JSON, found"),
        (b'{"vlm": {"depth": 2, "depth": 3}}', "expected JSON, found the key 'depth' twice"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b'{"horizon": NaN}', "config.json horizon: expected a count, found nan"),
        (b'{"horizon": Infinity}', "config.json horizon: expected a count, found inf"),
        (b'{"horizon": ' + b"9" * 400 + b"}", "horizon: expected a count, found 9999"),
        (b'{"vlm": {"head_dim": 1e400}}', "config.json vlm.head_dim: expected a count"),
    ],
)
def test_config_json_that_is_wrong(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises((CheckpointError, ConfigError)) as error:
        open_checkpoint(folder)
    assert message in str(error.value)
    assert "config.json" in str(error.value)
    assert len(str(error.value)) < 400


def test_config_json_that_is_no_file(folder: Path) -> None:
    path = folder / "config.json"
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="config.json: expected a JSON file, found: No such"):
        open_checkpoint(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="config.json: expected a JSON file, found: Is a dir"):
        open_checkpoint(folder)


def test_names_of_layers_that_are_absurd(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "paligemma_with_expert.paligemma.model.language_model.layers.{}.mlp.up_proj.weight"
    save_file({**tensors, name.format(99_999_999): tensors[name.format(0)].clone()}, path)
    with pytest.raises(CheckpointError, match="layers one after the other, found 99999999"):
        open_checkpoint(folder)


def test_empty_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "action_in_proj.weight": torch.empty(32, 0)}, path)
    with pytest.raises(CheckpointError, match="action_in_proj.weight: expected values, found sha"):
        open_checkpoint(folder)


@pytest.mark.parametrize("size", [28.5, "28", 0, -28, 13, 10**30])
def test_image_size(tiny_path: Path, size: object) -> None:
    with pytest.raises(ConfigError, match="image_size: expected"):
        load_model(open_checkpoint(tiny_path), image_size=size)  # type: ignore[arg-type]


def test_image_size_of_numpy(tiny_path: Path) -> None:
    model = load_model(open_checkpoint(tiny_path), image_size=np.int64(56))  # type: ignore[arg-type]
    assert model.config.vision.image_size == 56


def test_home_directory_of_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    require_writable(Path("~/a/x.npy"))
    assert not list(tmp_path.iterdir())
    with replacing(Path("~/a/x.npy")) as temporary:
        temporary.write_text("x")
    assert (tmp_path / "a" / "x.npy").read_text() == "x"


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path, message in (
        (tmp_path, "expected the name of a file to write, found a folder"),
        (file / "x.npy", f"expected {file} to be a folder, found a file"),
        (file / "a" / "x.npy", f"expected {file} to be a folder, found a file"),
        (tmp_path / ("x" * 300), "expected a place where a file can be written, found: File name"),
    ):
        with pytest.raises(Pi0Error) as error:
            require_writable(None, path)
        assert str(error.value).startswith(f"{path}: ")
        assert message in str(error.value)
        with pytest.raises(Pi0Error), replacing(path) as temporary:
            temporary.write_text("x")
    with pytest.raises(Pi0Error, match=r"expected room for 1000000000\.00 GB, found: No space"):
        require_writable(tmp_path / "x", size=10**18)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_read_only_place() -> None:
    path = Path("/proc/pi0/x.npy")
    with pytest.raises(Pi0Error, match=r"^/proc/pi0/x.npy: expected a place where"):
        require_writable(path)


def fail_half_way(path: Path, stop: BaseException | type[BaseException]) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise stop


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    before = tmp_path / "there.npy"
    before.write_text("before")
    for stop in (KeyboardInterrupt, ValueError, OSError(errno.EIO, "I/O error")):
        for path in (tmp_path / "a" / "b" / "new.npy", before):
            with pytest.raises((KeyboardInterrupt, ValueError, Pi0Error)):
                fail_half_way(path, stop)
    assert list(tmp_path.rglob("*")) == [before]
    assert before.read_text() == "before"


def test_what_a_killed_process_of_the_same_number_left_is_passed_by(tmp_path: Path) -> None:
    """In a container every process may be number 1."""
    (tmp_path / f".out.{os.getpid()}.part").mkdir()
    require_writable(tmp_path / "out")
    with new_folder(tmp_path / "out", 1) as temporary:
        (temporary / "file").write_text("")
    assert (tmp_path / "out/file").is_file()


def test_links_stay_links(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    for text in ("first", "second"):
        with replacing(link) as temporary:
            temporary.write_text(text)
        assert link.is_symlink()
        assert target.read_text() == text


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_place_without_a_size_is_not_full() -> None:
    with pytest.raises(Pi0Error, match=r"^/proc/x/out: expected a place where a file can be wri"):
        require_writable(Path("/proc/x/out"), size=1000)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_devices_are_not_replaced() -> None:
    path = Path("/dev/full")
    require_writable(path)
    with (
        pytest.raises(Pi0Error, match="^/dev/full: expected room for 6.4 kB, found: No space"),
        replacing(path, 6400) as temporary,
    ):
        temporary.write_bytes(bytes(6400))
    assert path.is_char_device()


def test_pipes_are_written_to(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with replacing(path) as temporary:
        temporary.write_text("x")
    assert os.read(reader, 10) == b"x"
    os.close(reader)


def test_interrupted_synthesis_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt):
        synthesise(folder, PRESETS["tiny"], LAYOUTS["openpi"], 0, torch.bfloat16, interrupt)
    assert not folder.exists()


def test_synthesis_asks_for_room_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(Pi0Error, match=r"model.safetensors: expected room for .* kB, found: No sp"):
        synthesise(tmp_path / "new", PRESETS["tiny"], LAYOUTS["openpi"], 0, torch.bfloat16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["pi0.safetensors", "model.safetensors.index.json"])
def test_synthesis_does_not_mix_models(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="expected a folder without a model, found one"):
        synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["openpi"], 0, torch.bfloat16)
