"""The full-size models, as `make test-full` runs them: π0 with its 777 tensors, π0.5 with its 812.

Each command is a process of its own, so that its peak memory can be told. The files of π0 are
removed before those of π0.5 are written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
CAMERAS = ROOT / "examples" / "cameras"
TOKENIZER = ROOT / ".cache" / "gemma" / "tokenizer.json"
# Measured 13.9 GB for 13.0 GB of float32 weights; a second copy of anything large would show. π0.5
# has 13.4 GB.
PEAK_BYTES = 16e9
DISK_BYTES = 8e9  # a checkpoint of 7 GB, and what tests write beside it
MEASURED = (
    "import json, resource, sys\n"
    "from pi0.cli.main import main\n"
    "sys.argv = ['pi0', *json.loads(sys.argv[1])]\n"
    "try:\n"
    "    main()\n"
    "finally:\n"
    "    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
    "    print(json.dumps({'peak': peak}), file=sys.stderr)\n"
)


def pi0(*words: str | Path) -> tuple[str, float]:
    """Standard output and peak memory in bytes of a command that must succeed."""
    command = [sys.executable, "-c", MEASURED, json.dumps([str(word) for word in words])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stderr.splitlines()[-1])["peak"]


def synthesised(preset: str) -> Iterator[Path]:
    """A checkpoint, which is removed afterwards if it was not there before."""
    folder = Path(os.environ.get("PI0_FULL", "out/full")) / preset
    made = not (folder / "model.safetensors").exists()
    if made:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < DISK_BYTES:
            pytest.skip(f"needs {DISK_BYTES / 1e9:.0f} GB of disk, found {free / 1e9:.1f} free")
        _, peak = pi0("synth", "--preset", preset, "--dtype", "bfloat16", folder)
        assert peak < 5e9, "synthesis streams"
    yield folder
    if made:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Of the preset that a test names; one at a time."""
    yield from synthesised(request.param)


pi0_base = pytest.mark.parametrize("folder", ["pi0_base"], indirect=True)
pi05_base = pytest.mark.parametrize("folder", ["pi05_base"], indirect=True)


@pi0_base
def test_inspect(folder: Path) -> None:
    out, peak = pi0(
        "inspect", folder, "--json", "--cameras", 2, "--image-size", 384, "--tokens", 32
    )
    data = json.loads(out)
    assert data["tensors"] == 777
    assert (data["layout"], data["model"]) == ("openpi", "pi0")
    assert sum(row["parameters"] for row in data["modules"]) == 3_501_372_176
    sequence = data["sequence"]
    assert (sequence["prefix"], sequence["suffix"], sequence["total"]) == (1490, 51, 1541)
    assert peak < 1e9, "only headers are read"


@pi0_base
def test_trace(folder: Path) -> None:
    """The brief's case: two cameras of 384 px and 32 tokens."""
    words = ("--image-size", 384, "--cameras", 2, "--tokens", 32, "--json")
    out, peak = pi0("trace", folder, *words)
    data = json.loads(out)
    shapes = {row["stage"]: row["shape"] for row in data["stages"]}
    assert shapes == {
        "vision_tower": [2, 729, 1152],
        "projector": [2, 729, 2048],
        "token_embedding": [1, 32, 2048],
        "prefix": [1, 1490, 2048],
        "vlm_transformer": [1, 1490, 2048],
        "suffix": [1, 51, 1024],
        "sequence": [1, 1541, 1541],
        "expert_transformer": [1, 51, 1024],
        "action_tokens": [1, 50, 1024],
        "action_projection": [1, 50, 32],
        "velocity": [1, 50, 32],
    }
    assert {part["name"]: part["shape"] for part in data["slices"]} == {
        "prefix→prefix": [1490, 1490],
        "suffix→suffix": [51, 51],
        "suffix→prefix+suffix": [51, 1541],
    }
    for row in data["stages"]:
        numbers = [row[key] for key in ("min", "max", "mean", "std")]
        assert np.isfinite(numbers).all(), row
        assert 0.1 < row["std"] < 10, row
    assert peak < PEAK_BYTES


@pytest.mark.parametrize(
    ("folder", "dtype"),
    [("pi0_base", "float32"), ("pi0_base", "bfloat16"), ("pi05_base", "float32")],
    indirect=["folder"],
)
def test_act(folder: Path, tmp_path: Path, dtype: str) -> None:
    """Three cameras of 640 × 480, resized to 224."""
    if not TOKENIZER.exists():
        pytest.skip(f"Gemma's tokenizer.json is not in {TOKENIZER} (make tokenizer, needs npm)")
    out = tmp_path / "actions.npy"
    _, peak = pi0(
        "act", folder, "--prompt", "put the red cube into the blue bowl", "--state", "0.1,0.2,0.3",
        "--image", f"base={CAMERAS / 'base.png'}", "--image", f"wrist={CAMERAS / 'wrist.png'}",
        "--image", f"right_wrist={CAMERAS / 'wrist.png'}", "--tokenizer", TOKENIZER,
        "--dtype", dtype, "--out", out,
    )  # fmt: skip
    actions = np.load(out)
    assert actions.shape == (50, 32)
    assert np.isfinite(actions).all()
    assert 0.1 < actions.std() < 10
    assert peak < (PEAK_BYTES if dtype == "float32" else PEAK_BYTES / 2)


@pi0_base
def test_loading_memory(folder: Path) -> None:
    """Peak while loading: at most the parameters as held + 10 %."""
    script = (
        "import resource, sys, torch\n"
        "from pi0 import load_model, open_checkpoint\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "checkpoint = open_checkpoint(sys.argv[1])\n"
        "before = peak()\n"
        "model = load_model(checkpoint, torch.bfloat16)\n"
        "print(sum(p.nbytes for p in model.parameters()), peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held, grown = map(int, done.stdout.split())
    assert held == pytest.approx(6.48e9, rel=0.01)
    assert grown < 1.10 * held


@pi05_base
def test_inspect_pi05(folder: Path) -> None:
    out, peak = pi0("inspect", folder, "--json")
    data = json.loads(out)
    assert data["tensors"] == 812
    assert (data["layout"], data["model"]) == ("openpi", "pi05")
    assert sum(row["parameters"] for row in data["modules"]) == 3_616_757_520
    sequence = data["sequence"]
    assert (sequence["prefix"], sequence["suffix"], sequence["total"]) == (968, 50, 1018)
    assert peak < 1e9, "only headers are read"


@pi05_base
def test_trace_pi05(folder: Path) -> None:
    """As openpi feeds it: three cameras, 200 tokens, no token of the state."""
    out, peak = pi0("trace", folder, "--cameras", 3, "--json")
    data = json.loads(out)
    shapes = {row["stage"]: row["shape"] for row in data["stages"]}
    assert shapes["prefix"] == [1, 968, 2048]
    assert shapes["suffix"] == [1, 50, 1024]
    assert shapes["sequence"] == [1, 1018, 1018]
    assert shapes["velocity"] == [1, 50, 32]
    for row in data["stages"]:
        numbers = [row[key] for key in ("min", "max", "mean", "std")]
        assert np.isfinite(numbers).all(), row
        assert 0.1 < row["std"] < 10, row
    assert peak < PEAK_BYTES
