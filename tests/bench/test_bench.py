"""The verb from end to end on the tiny preset: what it prints, writes and refuses. No test asks how
long something took."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fakes import FakeEngine
from PIL import Image
from processes import is_running, wait_until

from pi0.bench import roofline
from pi0.bench.run import run_worker
from pi0.bench.scaling import workloads_around
from pi0.bench.task import WorkerTask, Workload, workload_inputs
from pi0.bench.worker import part_times, sample_times
from pi0.cli.main import main
from pi0.config import PRESETS
from pi0.engines.spec import EngineSpec
from pi0.errors import ConfigError, EngineError

POINT = Workload(cameras=3, masked=1, tokens=12, valid=9, steps=2)
SIZES = ("--masked", 1, "--tokens", 12, "--valid", 9, "--steps", 2, "--repeat", 2, "--seeds", 2)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SECONDS", 0.01)
    monkeypatch.setitem(roofline.SIZES, "cpu", 64)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `pi0 bench` in this process."""
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pi0", "bench", *map(str, words)])
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, *capsys.readouterr()


def test_two_engines(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "new" / "results.json", tmp_path / "bench.png"
    engines = ("--engines", "reference", "--engines", "reference:bfloat16")
    code, stdout, _ = run(capsys, tiny_path, *engines, *SIZES, "--out", out, "--plot", plot)
    assert code == 0, stdout
    data = json.loads(out.read_text())
    assert data["command"].startswith(f"pi0 bench {tiny_path} --engines reference")
    assert data["command"] in stdout
    assert data["machine"]["torch"] == torch.__version__
    assert data["baseline"] == "reference:float32"
    exact, rounded = data["engines"]
    assert (exact["pcc"], exact["rel_l2"]) == (pytest.approx(1), 0)
    assert 1e-6 < rounded["rel_l2"] < 0.05  # bfloat16 rounds, and that is seen
    assert exact["displacement_error"] == 0
    assert rounded["rel_l2"] < rounded["displacement_error"] < 0.2
    for engine in (exact, rounded):
        assert len(engine["visits"]) == 2
        assert all(len(visit["sample_ms"]) == 1 for visit in engine["visits"])
        assert engine["min_ms"] <= engine["ms"] <= engine["max_ms"]
        assert min(engine["vision_ms"], engine["prefill_ms"], engine["step_ms"]) > 0
        assert engine["first_action_s"] > engine["load_s"] > 0
        assert engine["peak_bytes"] > 1e8
        parts = [stage["stage"] for stage in engine["stages"]]
        assert parts == ["vision", "rest of prefill", "one step", "all"]
        # The rest of prefill is a difference of two timings, which noise may turn round.
        timed = [stage for stage in engine["stages"] if stage["stage"] != "rest of prefill"]
        assert all(stage["times_roofline"] > 0 for stage in timed)
    assert "baseline" in stdout
    with Image.open(plot) as image:
        assert image.width > image.height


def test_one_engine_fails_and_the_rest_goes_on(
    tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = ("--engines", "reference@abacus", "--engines", "reference")
    code, stdout, _ = run(capsys, tiny_path, *engines, *SIZES, "--rounds", 1, "--json")
    data = json.loads(stdout)
    assert code == 1
    failed, done = data["engines"]
    assert failed["failure"] == (
        "reference:float32@abacus: device: expected cpu or cuda, found 'abacus'."
    )
    assert failed["ms"] is None
    assert done["ms"] > 0
    assert done["pcc"] is None  # without the baseline


def test_scaling(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "bench.png"
    words = ("--rounds", 1, "--scaling", "--plot", plot, "--json")
    code, stdout, _ = run(capsys, tiny_path, *SIZES, *words)
    assert code == 0
    scaling = json.loads(stdout)["scaling"]
    assert len(scaling) == 14
    assert all(point["ms"]["reference:float32"] > 0 for point in scaling)
    work = [point["gflop"] for point in scaling if point["varied"] == "batch"]
    assert [value / work[0] for value in work] == [1, 2, 4]
    assert (tmp_path / "bench-scaling.png").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--engines", "reference", "--engines", "warp"), "engine: expected one of reference, "),
        (("--engines", "reference:int3"), "dtype: expected one of float32, bfloat16"),
        (("--against", "warp"), "engine: expected one of reference, "),
        (("--masked", 3), "masked: expected fewer than the 3 cameras, found 3."),
        (("--valid", 49), "valid: expected at most the 48 text tokens, found 49."),
        (("--out", "."), ".: expected the name of a file to write, found a folder."),
        (("--plot", "."), ".: expected the name of a file to write, found a folder."),
        (("--repeat", 0), "Invalid value for '--repeat'"),
    ],
)
def test_refuses_before_it_works(
    tiny_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[object, ...],
    sentence: str,
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a worker was started"))
    code, stdout, stderr = run(capsys, tiny_path, *words)
    assert (code, stdout) == (2, "")
    assert sentence in stderr


def test_a_checkpoint_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, stderr = run(capsys, "nowhere")
    assert code == 2
    assert "nowhere: expected a checkpoint folder" in stderr


def test_a_worker_that_is_killed(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system does with the largest process when memory is short."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(EngineError, match="reference:float32: expected a measurement, found that "):
        run_worker(job(tiny_path), tmp_path)


def test_a_worker_that_breaks(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback\necho RuntimeError: no memory\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(EngineError, match=r"ended with code 1 \(RuntimeError: no memory\)"):
        run_worker(job(tiny_path), tmp_path)


def test_interrupt_stops_the_worker(tiny_path: Path) -> None:
    words = [sys.executable, "-m", "pi0", "bench", str(tiny_path)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (workers := children.read_text().split()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    wait_until(lambda: not any(is_running(int(worker)) for worker in workers))


def job(path: Path, **changes: object) -> WorkerTask:
    spec = EngineSpec("reference", "float32", None)
    return WorkerTask(str(path), spec, POINT, repeat=1, seeds=1, seed=0, **changes)  # type: ignore[arg-type]


def test_job_survives_json(tiny_path: Path) -> None:
    given = job(tiny_path, sweep=tuple(workloads_around(POINT)["steps"]))
    assert WorkerTask.from_json(given.to_json()) == given


def test_inputs() -> None:
    inputs, noise = workload_inputs(PRESETS["tiny"], Workload(3, 1, 12, 9, 10, batch=2), seed=0)
    assert inputs.image_mask.tolist() == [[True, True, False]] * 2
    assert inputs.token_mask.sum(1).tolist() == [9, 9]
    assert noise.shape == (2, 50, 32)


def test_what_is_varied_is_valid() -> None:
    around = workloads_around(POINT)
    assert [point.masked for point in around["cameras"]] == [0, 0, 0]
    assert all(point.valid == point.tokens for point in around["tokens"])
    assert all(point.masked == 1 and point.valid == 9 for point in around["steps"])


def test_points_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="masked: expected fewer than the 2 cameras, found 2."):
        Workload(cameras=2, masked=2, tokens=9, valid=9, steps=1)


def test_pictures_differ_in_every_call() -> None:
    """An engine that keeps the prefix of the last pictures gains nothing."""
    engine = FakeEngine(torch.zeros(1, 50, 32))
    inputs, noise = workload_inputs(engine.config, POINT, seed=0)
    assert len(sample_times(engine, inputs, noise, steps=2, repeat=3)) == 3
    seen = [these.images for these in engine.seen]
    assert len(seen) == 4  # the first does not count
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_an_engine_that_shows_no_vision() -> None:
    engine = FakeEngine(torch.zeros(1, 50, 32))
    _, vision_ms, _ = part_times(engine, *workload_inputs(engine.config, POINT, seed=0), steps=2)
    assert vision_ms is None


@pytest.mark.parametrize("order", [0, 1])
def test_several_engines_after_one_option(
    tiny_path: Path, capsys: pytest.CaptureFixture[str], order: int
) -> None:
    engines = ["--engines", "reference", "cpu"]
    words = [*engines, tiny_path] if order else [tiny_path, *engines]
    code, stdout, stderr = run(capsys, *words)
    assert (code, stdout) == (2, "")
    (sentence,) = stderr.splitlines()
    assert "expected one checkpoint and one engine after each --engines or --against" in sentence
    assert "Repeat the option: --engines cpu --engines lerobot." in sentence


def test_a_peer_that_is_not_installed(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """Its row says what to install; the other engines are measured."""
    monkeypatch.setenv("PI0_LEROBOT_PYTHON", str(tmp_path / "none"))
    words = (tiny_path, "--against", "lerobot", *SIZES, "--rounds", 1)
    code, stdout, _ = run(capsys, *words, "--json")
    assert code == 1
    ours, peer = json.loads(stdout)["engines"]
    assert ours["ms"] > 0
    assert peer["failure"].startswith("lerobot:float32: PI0_LEROBOT_PYTHON: expected an interpr")
