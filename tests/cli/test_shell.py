"""Paths, streams and memory at the command line: what people type, and what a shell does to it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import pi0, refused

from pi0.cli.act import print_actions
from pi0.config import PRESETS
from pi0.errors import install_hint
from pi0.inputs import random_inputs

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs a Linux shell and /dev/full")


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy to do as one likes with."""
    return shutil.copytree(tiny_path, tmp_path / "ckpt")


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    inputs, noise = random_inputs(PRESETS["tiny"], cameras=2, tokens=8, seed=0)
    path = tmp_path / "in.npz"
    np.savez(
        path, images=inputs.images, img_masks=inputs.image_mask, tokens=inputs.tokens,
        token_masks=inputs.token_mask, state=inputs.state, noise=noise,
    )  # fmt: skip
    return path


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Runs a line in bash, where `pi0` stands for this package's command line."""
    command = f"set -o pipefail; {line.replace('pi0 ', f'{sys.executable} -m pi0 ')}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


def test_a_terminal_without_our_letters(tiny_path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_path, tmp_path / "é")
    assert "\\u03c0" in shell("PYTHONIOENCODING=ascii pi0 --help").stdout
    assert "\\xe9" in shell(f"PYTHONIOENCODING=ascii pi0 inspect {copy}").stdout
    done = shell(f"PYTHONIOENCODING=ascii pi0 inspect {copy} --json")
    assert json.loads(done.stdout)["path"] == str(copy)


@linux
def test_streams(tiny_path: Path) -> None:
    for line, code, message in (
        (f"pi0 inspect {tiny_path} >&-", 2, "pi0: stdout: expected it open, found it closed."),
        (f"pi0 inspect {tiny_path} > /dev/full", 2, "pi0: stdout: expected room to print, found"),
        (f"pi0 inspect {tiny_path} --json > /dev/full", 2, "pi0: stdout: expected room to print"),
        (f"pi0 inspect {tiny_path} | true", 141, ""),
        (f"pi0 inspect {tiny_path} --json | true", 141, ""),
        (f"pi0 inspect {tiny_path} <&- 2>&-", 0, ""),
        ("pi0 inspect nothing-there 2> /dev/full", 2, ""),
        ("pi0 inspect nothing-there 2>&-", 2, ""),
    ):
        done = shell(line)
        assert (line, done.returncode) == (line, code)
        assert done.stderr.startswith(message)
        assert done.stderr or not message
        assert len(done.stderr.splitlines()) <= 1


@linux
def test_closed_streams_do_not_end_up_in_files(tiny_path: Path, npz: Path, tmp_path: Path) -> None:
    """A file that got the number of a closed stdout would get what is printed, too."""
    out = tmp_path / "out.npz"
    done = shell(f"pi0 sample {tiny_path} --inputs {npz} --out {out} --steps 1 <&- 2>&-")
    assert done.returncode == 0
    with np.load(out) as file:
        assert file["actions"].shape == (1, 50, 32)


@linux
def test_memory_is_asked_for_first(tiny_path: Path, npz: Path, monkeypatch) -> None:
    monkeypatch.setattr("pi0.checkpoint.memory.available_bytes", lambda: 10**9)
    message = refused("trace", tiny_path, "--tokens", "100000")
    assert "expected enough for engine reference in float32 with 2 images of 28 px and" in message
    assert "at least 640.13 GB, found 1.00 GB free" in message
    assert "image_size: expected at most" in refused("trace", tiny_path, "--image-size", 10**9)
    monkeypatch.setattr("pi0.checkpoint.memory.available_bytes", lambda: 1000)
    for words in (("--engine", "cpu"), ("--dtype", "bf16")):
        sample = ("sample", tiny_path, "--inputs", npz, "--out", npz.with_name("out.npz"))
        assert "with 2 images of 28 px and 8 tokens" in refused(*sample, *words)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
def test_memory_that_runs_out(tiny_path: Path, monkeypatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("pi0.checkpoint.load.open_checkpoint", fail)
    assert "memory: expected enough for this model" in refused("inspect", tiny_path)


def test_outputs_are_tried_first(tiny_path: Path, npz: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pi0.engines.base.make_engine", None)  # nothing is computed
    file = tmp_path / "file"
    file.touch()
    for out, message in (
        (tmp_path, "found a folder"),
        (file / "out.npz", f"expected {file} to be a folder, found a file"),
        (tmp_path / ("x" * 300), "found: File name too long"),
    ):
        text = refused("sample", tiny_path, "--inputs", npz, "--out", out)
        assert text.startswith(f"pi0: {out}: expected ")
        assert message in text


@linux
def test_full_device_is_named_and_stays(tiny_path: Path, npz: Path, tmp_path: Path) -> None:
    for verb in (["sample", tiny_path, "--inputs", npz, "--steps", 1], act(tiny_path, tmp_path)):
        text = refused(*verb, "--out", "/dev/full")
        assert text.startswith("pi0: /dev/full: expected room for the file, found: ")
        assert len(text.splitlines()) == 1
    assert Path("/dev/full").is_char_device()


def act(checkpoint: Path, folder: Path) -> list[str | Path]:
    image = folder / "base.png"
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(image)
    return [
        "act",
        checkpoint,
        "--image",
        f"base={image}",
        "--prompt",
        "go",
        "--state",
        "0",
        "--robot",
        "generic",
    ]


def test_outputs_do_not_replace_inputs(folder: Path, npz: Path, tmp_path: Path) -> None:
    weights, picture = folder / "model.safetensors", tmp_path / "top.png"
    Image.new("RGB", (20, 10)).save(picture)
    inputs = [weights, folder / "config.json", folder / "tokenizer.json", npz, picture]
    before = [path.read_bytes() for path in inputs]
    act = ("act", folder, "--image", f"base={picture}", "--prompt", "go", "--state", "0,0")
    for words in (
        *((*act, "--out", path) for path in (*inputs[:3], picture)),
        (*act, "--plot", weights),
        ("sample", folder, "--inputs", npz, "--out", npz),
        ("sample", weights, "--inputs", npz, "--out", weights),
        ("verify", folder, "--inputs", npz, "--report", npz),
        ("bench", folder, "--out", folder / "config.json"),
    ):
        assert "expected a file that is not read, found one of the inputs" in refused(*words)
    assert [path.read_bytes() for path in inputs] == before
    link = tmp_path / "link.npy"
    link.symlink_to(tmp_path / "a.npy")
    words = (*act, "--out", tmp_path / "a.npy", "--save-inputs", link)
    assert "expected different files to write, found the same one twice" in refused(*words)
    for _ in range(2):  # results in the checkpoint's folder may be written anew
        for words in (
            ("sample", folder, "--inputs", npz, "--steps", "1", "--out", folder / "out.npz"),
            (*act, "--robot", "generic", "--plot", folder / "chunk.svg"),
            ("bench", folder, "--engines", "cpu", "--repeat", "1", "--out", folder / "bench.json"),
            ("sample", folder, "--inputs", npz, "--steps", "1", "--out", folder / "_out.npz"),
        ):
            assert pi0(*words).returncode == 0


def test_home_directory(folder: Path, npz: Path, monkeypatch) -> None:
    home = folder.parent
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(Path(__file__).parent)
    assert pi0("inspect", "~/ckpt").returncode == 0
    done = pi0("sample", "~/ckpt", "--inputs", "~/in.npz", "--out", "~/a/out.npz", "--steps", 1)
    assert done.returncode == 0, done.stderr
    assert (home / "a" / "out.npz").exists()
    act(folder, home)
    np.save(home / "state.npy", np.zeros(3))
    done = pi0(
        "act", "~/ckpt", "--robot", "generic", "--image", "base=~/base.png", "--prompt", "go",
        "--state", "~/state.npy", "--out", "~/a/actions.npy",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (home / "a" / "actions.npy").exists()
    assert pi0("synth", "--preset", "tiny", "~/new").returncode == 0
    assert (home / "new" / "config.json").exists()
    assert not (Path(__file__).parent / "~").exists()


def test_inspect_says_what_is_assumed(folder: Path) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    del settings["horizon"]
    path.write_text(json.dumps(settings))
    text = pi0("inspect", folder).stdout
    assert "horizon 50 (assumed)" in text
    assert "warning horizon-assumed: horizon: neither the tensors nor config.json say how" in text
    data = json.loads(pi0("inspect", folder, "--horizon", 10, "--json").stdout)
    assert data["config"]["horizon"] == 10
    assert data["assumed"] == []
    assert [row["code"] for row in data["policy"]["findings"]] == ["robot-assumed"]
    stages = json.loads(pi0("trace", folder, "--horizon", 10, "--json").stdout)["stages"]
    assert stages[-1]["shape"] == [1, 10, 32]
    assert "max_tokens (--max-tokens): expected 48 as config.json says, found 9" in refused(
        "inspect", folder, "--max-tokens", 9
    )


def test_act_says_what_is_assumed(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    heads = {key: value for key, value in settings.items() if isinstance(value, dict)}
    path.write_text(json.dumps({"type": "pi0", **heads}))
    done = pi0(*act(folder, folder.parent), "--steps", 1)
    assert done.returncode == 0
    assert "pi0: warning: horizon: neither the tensors nor config.json say how" in done.stderr
    assert "pi0: warning: max_tokens: " in done.stderr


def test_a_title_wider_than_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    timing = {"infer_ms": 1.0, "total_ms": 1.0}
    print_actions(np.zeros((50, 3), np.float32), ("x", "y", "z"), timing, "cpu")
    assert capsys.readouterr().out.startswith("Actions [50, 3]: the first 5 steps\nstep")


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_weights_that_are_not_finite(folder: Path, precision: str) -> None:
    """Every engine reads through the same check, also for what it would never compute with."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "paligemma_with_expert.paligemma.model.language_model.layers.0.self_attn.q_proj.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, path)
    for words in (("--engine", "cpu", "--dtype", precision), ("--engine", "reference")):
        text = refused("trace", folder, *words)
        assert f"{path}: {name}: expected finite weights, found 1 NaN or infinite in " in text


def test_where_weights_and_tokenizer_come_from() -> None:
    text = refused("inspect", "lerobot/pi0_base")
    for part in ("hf download lerobot/pi0_base", "gs://openpi-assets", "paligemma_tokenizer.model"):
        assert part in text


def test_install_hint_needs_no_index() -> None:
    assert install_hint("plot") == "In the folder of this repository: pip install '.[plot]'."


ENDS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)


def expect_silent_end(code: int) -> None:
    """Of a command that a signal reaches."""
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests run with nohup
    try:
        done = pi0("inspect", "anything")
    finally:
        signal.signal(signal.SIGHUP, ignored)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


@ENDS
def test_a_signal_that_a_library_swallows(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    """What fails because a signal broke an import off is not a fault of ours to show."""

    def swallow(*_: object) -> None:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), number)
        raise AttributeError("module 'numpy' has no attribute 'matrix'")

    monkeypatch.setattr("pi0.checkpoint.load.open_checkpoint", swallow)
    before = signal.getsignal(signal.SIGINT)
    expect_silent_end(code)
    assert signal.getsignal(signal.SIGINT) is before


@ENDS
def test_a_signal_that_python_drops(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    """What a handler raises while an object is removed goes nowhere."""

    class Removed:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)

    def work(*_: object) -> None:
        Removed()
        time.sleep(20)

    monkeypatch.setattr("pi0.checkpoint.load.open_checkpoint", work)
    expect_silent_end(code)
