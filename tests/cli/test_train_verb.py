"""`pi0 train` on a real dataset's folder, from its first picture to an action."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dataset_folder import pictures
from episodes import SIZES
from PIL import Image
from test_cli import pi0, refused

from pi0.checkpoint.infer import to_config_json
from pi0.cli.main import main
from pi0.data import Recording, Schema, finish, write_shard
from pi0.data.lock import locked
from pi0.policy import Policy
from pi0.train.log import read_log
from pi0.train.processes import Processes
from pi0.train.save import STATE_FILE, load_state

ROBOT = """
name = "arm"
control_hz = 10

[[cameras]]
key = "observation/image"
names = ["base"]

[[state]]
key = "observation/state"
length = 5

[[actions]]
name = "x"
relative = true

[[actions]]
name = "gripper"
"""
BASE = "observation.images.base"
COLUMNS = {"observation.state": tuple("abcde"), "action": ("x", "gripper"), "aux.place": ("p",)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, a robot's file and one of sizes."""
    folder = tmp_path_factory.mktemp("verb")
    rng = np.random.default_rng(0)
    recordings = [
        Recording(
            task=task,
            images={BASE: pictures(rng, 6, 32, 48)},
            columns={
                k: rng.normal(size=(6, len(v))).astype(np.float32) for k, v in COLUMNS.items()
            },
        )
        for task in ("lift the cube", "push the ball")
    ]
    schema = Schema(fps=10, robot="arm", cameras={BASE: (32, 48)}, columns=COLUMNS)
    write_shard(folder / "data", 0, 0, recordings, schema)
    finish(folder / "data", schema)
    (folder / "arm.toml").write_text(ROBOT)
    (folder / "sizes.json").write_text(json.dumps(to_config_json(SIZES)))
    return folder


def words(place: Path, out: Path, *more: object) -> list[object]:
    return [
        "train", place / "sizes.json", "--data", place / "data", "--out", out,
        "--robot", place / "arm.toml", "--batch-size", 4, "--warmup", 1, "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.mark.filterwarnings("default")
def test_from_pictures_to_actions(place: Path, tmp_path: Path) -> None:
    """Trained in two halves; then an action, by an engine, from the files alone."""
    out = tmp_path / "run"
    options = ["--steps", 4, "--learning-rate", "1e-3", "--aux", "aux.place@0", "--log-every", 2]
    options += ["--execute", 2]
    done = pi0(*words(place, out, *options, "--save-every", 2, "--draws", 2))
    assert done.returncode == 0, done.stderr
    assert "training from random weights on cpu: 2 episodes, 12 frames" in done.stdout
    assert "step 4 of 4: loss flow " in done.stdout
    assert "; learning rate 5.50e-04; " in done.stdout
    assert "aux.place " in done.stdout
    assert done.stdout.endswith(f"wrote {out}/checkpoints/000004\n")
    assert [entry["step"] for entry in read_log(out / "log.jsonl")] == [2, 4]
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "base.png")
    acted = pi0(
        "act", out / "last", "--robot", place / "arm.toml", "--image", f"base={tmp_path}/base.png",
        "--prompt", "lift the cube", "--state", "0,0,0,0,0", "--json",
    )  # fmt: skip
    assert acted.returncode == 0, acted.stderr
    assert np.array(json.loads(acted.stdout)["actions"]).shape == (6, 2)
    settings = json.loads((out / "last" / "config.json").read_text())
    assert (settings["robot"], settings["n_action_steps"]) == ("arm", 2)
    policy = Policy.from_checkpoint(out / "last", robot=place / "arm.toml")
    assert policy.n_action_steps == 2
    assert "expected a folder without a run" in refused(*words(place, out, *options))
    done = pi0(*words(place, out, *options, "--save-every", 2, "--draws", 2, "--resume"))
    assert f"resuming {out}, which began from random weights on cpu: 2 episodes" in done.stdout


def test_estimate_names_what_takes_memory(place: Path) -> None:
    done = pi0("train", place / "sizes.json", "--robot", place / "arm.toml", "--estimate")
    assert done.returncode == 0, done.stderr
    names = ["weights", "gradients", "optimizer", "moving average", "forward and backward", "total"]
    assert [re.split("  +", line)[0] for line in done.stdout.splitlines()[-7:-1]] == names


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("column", ["aux.place", "action"])
def test_only_columns_that_are_used_matter(place: Path, tmp_path: Path, column: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    (path,) = data.glob("data/*/*.parquet")
    table = pq.read_table(path)
    values = np.full(len(table) * len(COLUMNS[column]), np.nan, np.float32)
    broken = pa.FixedSizeListArray.from_arrays(values, 2) if column == "action" else values
    number = table.column_names.index(column)
    pq.write_table(table.set_column(number, column, pa.array(broken)), path)
    more = ("--data", data, "--steps", 1)
    done = pi0(*words(place, tmp_path / "run", *more))
    assert done.returncode == (2 if column == "action" else 0), done.stderr
    assert f"frame 0: {column}: expected finite numbers" in done.stderr
    assert ("It is not used." in done.stderr) == (column == "aux.place")


@pytest.mark.filterwarnings("default")
def test_the_first_process_speaks_for_all(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Other(Processes):
        first = False

    second = contextlib.nullcontext(Other(0, 1, torch.device("cpu")))
    monkeypatch.setattr("pi0.train.processes.join_processes", lambda device: second)
    monkeypatch.setattr(sys, "argv", ["pi0", *map(str, words(place, tmp_path, "--steps", 1))])
    with contextlib.suppress(SystemExit):
        main()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "checkpoints").exists()


def test_sigterm_saves_and_resumes(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    long = [str(word) for word in words(place, out, "--steps", 100_000, "--log-every", 1)]
    command = [sys.executable, "-m", "pi0", *long]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3"):
                process.send_signal(signal.SIGTERM)
            if line.startswith("stopped"):
                assert "Go on with the same command and --resume." in line
        assert process.wait() == 128 + signal.SIGTERM
    step = load_state(out / STATE_FILE)["done"]
    assert step >= 3
    assert (out / "checkpoints" / f"{step:06d}" / "model.safetensors").is_file()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--robot", "libero"], "cameras: expected observation.images.NAME for the cameras image"),
        (["--aux", "aux.goal"], "aux.goal: expected this column in the dataset"),
        (["--aux", "aux.place@9"], "expected a block from 0 to 1"),
        (["--aux", "action@0", "--point", "action"], "expected different columns, found action mo"),
        (["--batch-size", "0"], "batch-size"),
        (["--ema", "1"], "ema: expected 0 to"),
        (["--crop", "7"], "crop: expected 0.1 to 1, found 7"),
        (["--execute", "7"], "--execute: expected at most the 6 actions of a chunk, found 7"),
        (["--layout", "jax"], "--layout: expected one of openpi, lerobot, found 'jax'"),
        (["--layout", "lerobot"], "expected a robot whose actions are absolute"),
        (["--max-tokens", "3"], "task 'lift the cube': prompt: expected at most 3 tokens"),
        (["--lora", "4"], "--lora: expected the checkpoint of a full model"),
        (["--resume"], "expected a run to resume, found no training_state.pt"),
        (["--freeze", "eyes"], "--freeze eyes: expected a pattern"),
        (["--seed", str(2**63)], f"--seed: expected 0 to {2**63 - 1}, found {2**63}"),
        (["--aux-weight", "-1"], "--aux-weight: expected 0 or more, found -1"),
        (["--lora-alpha", "3"], "expected --lora RANK beside them, found none"),
        (["--lora", "3", "--lora-alpha", "nan"], "--lora-alpha: expected more than 0, found nan"),
        (["--shard"], "--shard: expected several processes, found one"),
    ],
)
def test_refused(more: list[str], message: str, place: Path, tmp_path: Path) -> None:
    assert message in refused(*words(place, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_two_runs_in_one_folder(place: Path, tmp_path: Path) -> None:
    """The second is refused before it decodes pictures; the first one's folder stays."""
    with locked(tmp_path / "out"):
        assert "no other process is writing into" in refused(*words(place, tmp_path / "out"))
        assert (tmp_path / "out").is_dir()


def test_a_run_that_fails_at_its_first_step_leaves_nothing(place: Path, tmp_path: Path) -> None:
    done = pi0(*words(place, tmp_path / "out", "--aux", "aux.place", "--aux-weight", "1e300"))
    assert done.returncode == 2
    assert "step 0: total: expected a finite number, found inf" in done.stderr
    assert not (tmp_path / "out").exists()
