"""Options that several verbs share: each verb has all of them, and hands them on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from pi0.bench import worker
from pi0.bench.run import BenchPlan
from pi0.bench.task import WorkerTask, Workload
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.cli import options
from pi0.cli.act import act
from pi0.cli.checkpoint import inspect
from pi0.cli.diff import diff
from pi0.cli.doctor import doctor
from pi0.cli.eval import evaluate
from pi0.cli.main import app
from pi0.cli.serve import serve
from pi0.config import PRESETS
from pi0.engines.spec import EngineSpec
from pi0.errors import ConfigError, EngineError
from pi0.inputs import random_inputs, to_npz
from pi0.policy import PolicyOptions

FLAGS = {f"--{name.replace('_', '-')}" for name in options.POLICY}


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("verb", [act, inspect, diff, doctor, evaluate, serve])
def test_verbs_with_a_policy_have_all_of_its_options(verb: Callable[..., None]) -> None:
    single = typer.Typer()
    single.command()(verb)
    command = typer.main.get_command(single)
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert flags > FLAGS | {"--horizon", "--max-tokens", "--base"}


def test_options_of_a_policy_arrive_as_one() -> None:
    given: list[tuple[int, PolicyOptions]] = []

    @options.with_policy
    def verb(wishes: options.PolicyOptions, steps: int = 3) -> None:
        given.append((steps, wishes))

    single = typer.Typer()
    single.command()(verb)
    words = ["--robot", "droid", "--prompt-mode", "lerobot", "--image-size", "28"]
    done = CliRunner().invoke(single, [*words, "--no-state-in-prompt", "--steps", "4"])
    assert done.exit_code == 0, done.output
    expected: dict[str, Any] = {"robot": "droid", "prompt": "lerobot", "image_size": 28}
    assert given == [(4, PolicyOptions(**expected, state_in_prompt=False))]


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "--engines", "reference", "reference", "--oracle", "none"),
        ("bench", "--repeat", "1"),
        ("ttnn", "dry-run"),
    ],
)
@pytest.mark.parametrize("option", ["horizon", "max-tokens"])
def test_sizes_that_contradict_config_json(words: Any, option: str, tiny_path: Path) -> None:
    done = run(*words, tiny_path, f"--{option}", 7)
    assert isinstance(done.exception, ConfigError), done.output
    assert option.replace("-", "_") in str(done.exception)


@pytest.mark.parametrize(
    ("words", "takes"),
    [
        (("verify", "--engines", "reference"), "--engines, which takes 2 engines"),
        (("bench", "--engines"), "--engines, which takes an engine"),
        (("bench", "--against"), "--against, which takes an engine"),
        (("trace", "--engine"), "--engine, which takes an engine"),
        (("sample", "--engine"), "--engine, which takes an engine"),
        (("act", "--engine"), "--engine, which takes an engine"),
    ],
)
def test_an_option_that_takes_the_checkpoint(words: Any, takes: str) -> None:
    done = run(*words, "lerobot/pi0_base")
    assert isinstance(done.exception, EngineError), done.output
    assert f"'lerobot/pi0_base'. It stands after {takes}: if it is the" in str(done.exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sample", "--engine", "auto:int8"), "'auto:int8'. Only commands with a policy choose"),
        (("act", "--engine", "int8"), "lerobot, auto, found 'int8'."),
        (("act", "--engine", ""), "lerobot, auto, found ''."),
        (("verify", "--engines", "cpu", "--engines", "cpu"), "Name 2 engines after one --engines."),
    ],
)
def test_words_that_are_no_engine(words: Any, message: str) -> None:
    done = run(*words, "CKPT")
    assert isinstance(done.exception, EngineError), done.output
    assert message in str(done.exception)


def test_act_takes_the_checkpoints_steps(tmp_path: Path) -> None:
    """As `Policy`, eval and serve do; an option counts before them."""
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"num_inference_steps": 3}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    Image.new("RGB", (28, 28)).save(tmp_path / "base.png")
    camera = f"base_0_rgb={tmp_path / 'base.png'}"
    words = ("act", tmp_path, "--image", camera, "--prompt", "go", "--state", "0 " * 32, "--json")
    for given, steps in ((), 3), (("--steps", 2), 2):
        done = run(*words, *given)
        assert json.loads(done.stdout)["policy"]["steps"] == steps


@pytest.mark.parametrize(
    "words",
    [("trace",), ("verify",), ("bench", "--engines", "reference"), ("sample", "--out", "out.npz")],
)
def test_the_model_alone_takes_the_checkpoints_sampling(
    tmp_path: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `act` does: periods of time that the model does not have are refused."""
    monkeypatch.chdir(tmp_path)
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["transformers"], 0, torch.float32)
    settings = json.loads((tmp_path / "config.json").read_text())
    config = open_checkpoint(tmp_path).config
    np.savez("in.npz", **to_npz(*random_inputs(config, 1, 4, 0)))
    inputs = () if words[0] in ("trace", "verify", "bench") else ("--inputs", "in.npz")
    for key, value in (("max_period", 1.0), ("num_inference_steps", "x")):
        (tmp_path / "config.json").write_text(json.dumps(settings | {key: value}))
        done = run(words[0], tmp_path, *words[1:], *inputs)
        assert isinstance(done.exception, ConfigError), done.output
        assert f"config.json {key}: expected" in str(done.exception)
    assert not (tmp_path / "out.npz").exists()


def test_sample_takes_the_checkpoints_steps(tmp_path: Path) -> None:
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["transformers"], 0, torch.float32)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"num_inference_steps": 3}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    np.savez(tmp_path / "in.npz", **to_npz(*random_inputs(PRESETS["tiny"], 1, 4, 0)))
    out = []
    for steps in ((), ("--steps", 3)):
        words = ("sample", tmp_path, "--inputs", tmp_path / "in.npz", "--out", tmp_path / "o.npz")
        assert run(*words, *steps).exit_code == 0
        out.append(np.load(tmp_path / "o.npz")["actions"])
    np.testing.assert_array_equal(*out)


def test_sizes_of_a_preset_are_known() -> None:
    done = run("ttnn", "dry-run", "--preset", "tiny", "--horizon", 7)
    assert "expected with a checkpoint, found --preset" in str(done.exception)


def test_horizon_reaches_the_workers_of_bench(tiny_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "ckpt")
    settings = json.loads((folder / "config.json").read_text())
    del settings["horizon"]
    (folder / "config.json").write_text(json.dumps(settings))
    spec, point = EngineSpec("reference", "float32"), Workload(1, 0, 4, 4, 1)
    plan = BenchPlan(folder, [spec], 0, point, 1, 1, 1, 0, False, None, 7, 30)
    job = WorkerTask.from_json(plan.job(spec, first=True).to_json())
    assert (job.horizon, job.max_tokens) == (7, 30)
    with worker.load(replace(job, max_tokens=None)) as engine:
        assert engine.config.horizon == 7


def test_bench_asks_for_memory_before_the_work(tiny_path: Path) -> None:
    spec, point = EngineSpec("cpu", "float32"), Workload(3, 0, 4, 4, 1)
    plan = BenchPlan(tiny_path, [spec], 0, replace(point, batch=10**9), 1, 1, 1, 0, False)
    with pytest.raises(
        ConfigError, match="3 images of 28 px and 4 tokens, .* 1000000000 at a time"
    ):
        worker.load(plan.job(spec, first=True))
    job = BenchPlan(tiny_path, [spec], 0, point, 1, 1, 1, 0, False).job(spec, first=True)
    (found,) = worker.sweep(replace(job, sweep=(plan.point,)))["points"]
    assert "memory: expected enough for engine cpu" in found["error"]
