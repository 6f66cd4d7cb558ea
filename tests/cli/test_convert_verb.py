"""`pi0 convert`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jax_folder import copy_oracle
from safetensors.torch import load_file
from test_cli import pi0, refused

from pi0.checkpoint.load import Checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy_oracle("jax_pi0", tmp_path / "source")


@pytest.mark.filterwarnings("default")
def test_verb(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = pi0("convert", source, out, "--to", "lerobot", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "expected cameras and relative joints, which LeRobot declares" in done.stderr
    assert done.stdout.startswith(f"{out}: lerobot, ")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert "expected a new or empty folder" in refused("convert", source, out, "--to", "openpi")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "torch"], "--to: expected one of openpi, lerobot, jax, found 'torch'"),
        (["--to", "jax", "--tokenizer", "no.model"], "no.model: expected a file, found none"),
        (["--to", "jax", "--tokenizer", __file__], f"{__file__}: expected a SentencePiece model"),
        (["--to", "jax", "--dtype", "int8"], "int8"),
        (["--to", "jax", "--horizon", "10"], "expected 50 as config.json says, found 10"),
    ],
)
def test_refused(words: list[str], message: str, source: Path, tmp_path: Path) -> None:
    assert message in refused("convert", source, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("target", "number", "code"),
    [
        ("openpi", signal.SIGINT, 130),
        ("lerobot", signal.SIGINT, 130),
        ("jax", signal.SIGINT, 130),
        ("jax", signal.SIGHUP, 129),  # the terminal was closed
    ],
)
def test_interrupted_in_the_middle(
    target: str,
    number: signal.Signals,
    code: int,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Checkpoint.stream

    def interrupted(self: Checkpoint) -> Iterator[tuple[str, slice, torch.Tensor]]:
        for count, part in enumerate(stream(self)):
            if count == 40:
                os.kill(os.getpid(), number)
            yield part

    monkeypatch.setattr(Checkpoint, "stream", interrupted)
    heard = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, heard)  # may be ignored
    try:
        done = pi0("convert", source, tmp_path / "out", "--to", target)
    finally:
        signal.signal(number, before)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_horizon_that_is_stated_is_written(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    out = tmp_path / "out"
    done = pi0("convert", source, out, "--to", "jax", "--horizon", "16", "--max-tokens", "48")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert '"action_horizon": 16' in (out / "config.json").read_text()
