"""`pi0 eval`: what it prints, writes and refuses, with a random policy."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pi0.cli.main import main

DOTS = Path(__file__).parents[1] / "eval"
ENV = ("--env", "dots:test/Dots-v0")


@pytest.fixture
def robot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(DOTS)
    from dots import ROBOT_FILE

    path = tmp_path / "dots.toml"
    path.write_text(ROBOT_FILE)
    return path


def words(checkpoint: Path, robot: Path, *more: object) -> list[str]:
    policy = ("--robot", robot, "--norm-stats", "none", "--preprocessing", "openpi")
    return list(map(str, ["eval", checkpoint, *policy, "--engine", "reference", *more]))


def run(*options: str) -> tuple[int, str, str]:
    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", ["pi0", *options])
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, stdout.getvalue(), stderr.getvalue()


def test_table_json_and_films(
    tiny_path: Path, robot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pi0.policy.policy._without_limits", set())  # said once in a process
    monkeypatch.setenv("MUJOCO_GL", "egl")
    out, films = tmp_path / "new" / "results.json", tmp_path / "films"
    more = ["--episodes", "2", "--on-limit", "clamp", "--steps", "2", "--max-steps", "5"]
    more += ["--sampler", "midpoint", "--env-arg", "render_mode=rgb_array"]
    options = words(tiny_path, robot, *ENV, *more, "--out", out)
    code, stdout, stderr = run(
        *options, "--video", str(films), "--video-episodes", "1", "--video-format", "gif"
    )
    assert code == 0, stderr
    assert "95 % interval" in stdout
    assert "0.0% to 65.8%" in stdout
    assert "robot dots, 2 denoising steps (midpoint), 50 actions executed of each chunk" in stdout
    assert "states no limits" not in stderr  # the action space has them
    assert len(list(films.iterdir())) == 3
    data = json.loads(out.read_text())
    assert list(data["tasks"]) == ["red", "blue"]
    assert data["episodes"] == 4
    assert data["mujoco_gl"] == "egl"
    assert data["env_arguments"] == {"render_mode": "rgb_array"}
    assert "of each task, rendered by MuJoCo with egl\n" in stdout
    assert data["sampler"] == "midpoint"
    assert data["checkpoint"] == str(tiny_path)
    assert data["engine"]["name"] == "reference"
    assert [r["seed"] for r in data["rollouts"]] == [9_000_000, 9_000_001] * 2
    again = json.loads(run(*options, "--json")[1])
    assert again["rollouts"] == data["rollouts"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--env", "pi0/Nothing-v0"), "expected one of pi0/Tabletop-v0, found 'pi0/Nothing-v0'"),
        ((*ENV, "--robot", "libero"), "in its observations for robot libero, found clock, image"),
        ((*ENV, "--tasks", "red,"), "tasks: expected different names"),
        ((*ENV, "--env-arg", "speed"), "--env-arg: expected NAME=VALUE, found 'speed'"),
        ((*ENV, "--env-arg", "speed=2"), "got an unexpected keyword argument 'speed'"),
        ((*ENV, "--tasks", "red, pink"), "expected one of the tasks red, blue, found 'pink'"),
        ((*ENV, "--prompt", "go", "--prompt-swap"), "Leave out --prompt or --prompt-swap"),
        ((*ENV, "--video", "x", "--video-format", "avi"), "expected one of mp4, gif"),
        (
            (*ENV, "--video-format", "gif"),
            "--video-format: expected --video DIR beside them, found",
        ),
        (
            (*ENV, "--api-key-file", "key"),
            "--api-key-file: expected --server beside it, found none",
        ),
        ((*ENV, "--on-limit", "ignore"), "on_limit: expected one of error, clamp, warn"),
        ((*ENV, "--on-limit", "error"), "task red, seed 9000000: action y: expected at"),
        ((*ENV, "--out", "/proc/results.json"), "expected a place where a file can be written"),
    ],
)
def test_refused(more: tuple[str, ...], sentence: str, tiny_path: Path, robot: Path) -> None:
    code, stdout, stderr = run(*words(tiny_path, robot, *more))
    assert code == 2
    assert sentence in stderr
    assert "Traceback" not in stderr
    assert stdout == ""


def test_interrupt(tiny_path: Path, robot: Path, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group of processes: one quiet end, and nothing half-written."""
    films = tmp_path / "films"
    more = ("--episodes", 1000, "--workers", 2, "--video", films, "--on-limit", "clamp")
    process = subprocess.Popen(
        [sys.executable, "-m", "pi0", *words(tiny_path, robot, *ENV, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(DOTS), *sys.path])},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not list(films.glob("*.mp4")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing is left, as it should be
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    assert not list(films.glob(".*"))
    assert not list(films.glob("*.png"))


def test_through_a_server(
    tiny_path: Path, robot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rollouts are those of the in-process run; what the server decides cannot be said."""
    monkeypatch.syspath_prepend(DOTS.parent / "serve")
    from serving import running

    from pi0.policy import Policy, RealTimeChunking

    how = {"norm_stats": "none", "preprocessing": "openpi", "engine": "reference", "steps": 2}
    real_time = RealTimeChunking(jacobian="identity")
    common = [*ENV, "--episodes", "1", "--max-steps", "6", "--execute", "2", "--latency", "300"]
    common += ["--real-time", "identity", "--json"]
    with (
        Policy.from_checkpoint(tiny_path, robot=robot, real_time=real_time, **how) as policy,
        running(policy) as served,
    ):
        server = ("eval", "--server", f"ws://{served.address}")
        code, stdout, stderr = run(*server, *common)
        assert code == 0, stderr
        table = run(*server, *common[:-1])[1]
        assert "identity real-time chunking, 300 ms of added latency (2 ticks)\nactions" in table
        for more in (("--steps", "3"), ("--norm-stats", "none"), (str(tiny_path),)):
            code, _, stderr = run(*server, *ENV, *more)
            assert code == 2
            assert "--server: expected alone, found a checkpoint or options of a policy" in stderr
        code, _, stderr = run(*server, *ENV, "--real-time", "exact")
        assert code == 2
        assert "started with --real-time exact, found identity" in stderr
    here = json.loads(run(*words(tiny_path, robot, *common, "--steps", "2"))[1])
    there = json.loads(stdout)
    assert there["rollouts"] == here["rollouts"]
    assert there["border_jump"] == here["border_jump"]
    assert there["border_jump"]["borders"] == 4
    assert run("eval", *ENV)[2] == "pi0: eval: expected a checkpoint or --server, found neither.\n"
