"""What is free, as Linux reports it; and that the estimate which refuses is a lower bound."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pi0.checkpoint import memory
from pi0.checkpoint.estimate import estimate, required_bytes
from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.config import PRESETS
from pi0.engines.memory import require_memory
from pi0.engines.registry import find_engine
from pi0.engines.spec import EngineSpec
from pi0.errors import ConfigError

MEMINFO = "MemTotal: 9000 kB\nMemAvailable:    4000 kB\nSwapFree:  1000 kB\n"
V2 = ("0::/a/b\n", "a/b", "memory.max", "memory.current", "")
V1 = ("4:cpu,memory:/a/b\n0::/\n", "memory/a/b", "memory.limit_in_bytes", "memory.usage_in_bytes",
      "total_")  # fmt: skip


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc with 4000 kB available and 1000 kB of swap, and an empty /sys/fs/cgroup."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    return tmp_path


def limit(system: Path, version: tuple[str, ...], limit: str, usage: int, cache: int) -> None:
    lines, folder, limit_file, usage_file, prefix = version
    (system / "proc" / "self" / "cgroup").write_text(lines)
    group = system / "cgroup" / folder
    group.mkdir(parents=True, exist_ok=True)
    (group / limit_file).write_text(limit + "\n")
    (group / usage_file).write_text(f"{usage}\n")
    (group / "memory.stat").write_text(
        f"anon 5\n{prefix}active_file {cache}\n{prefix}inactive_file 2000\n"
    )


def test_machine(system: Path) -> None:
    assert memory.available_bytes() == 5000 * 1024
    (system / "proc" / "meminfo").unlink()
    assert memory.available_bytes() is None
    memory.require_memory(10**18, "anything")  # nothing is known, so nothing is refused


@pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])
def test_control_groups(system: Path, version: tuple[str, ...]) -> None:
    limit(system, version, "1000000", 900_000, 50_000)
    assert memory.available_bytes() == 152_000 + 1000 * 1024
    limit(system, version, "max", 900_000, 50_000)
    assert memory.available_bytes() == 5000 * 1024


def test_limit_of_an_outer_group(system: Path) -> None:
    limit(system, V2, "max", 900_000, 0)
    limit(system, ("0::/a/b\n", "a", *V2[2:]), "1000000", 900_000, 0)
    assert memory.available_bytes() == 102_000 + 1000 * 1024


def test_refusal_names_both_numbers(system: Path) -> None:
    memory.require_memory(5000 * 1024, "anything")
    with pytest.raises(ConfigError) as error:
        memory.require_memory(10**12, "a model")
    assert str(error.value).startswith(
        "memory: expected enough for a model: at least 1000.00 GB, found 5.1 MB free. Use "
    )


def test_loading_is_refused(tiny_path: Path, system: Path) -> None:
    (system / "proc" / "meminfo").write_text("MemAvailable: 100 kB\n")
    with pytest.raises(ConfigError, match="memory: expected enough for the weights in float32"):
        load_model(open_checkpoint(tiny_path))


def test_work_is_refused(tiny_path: Path, system: Path) -> None:
    opened = open_checkpoint(tiny_path)
    require_memory(opened, EngineSpec("reference", "float32"), cameras=2, tokens=48)
    with pytest.raises(ConfigError, match=r"engine reference in float32 with 2 images of 28 px"):
        require_memory(opened, EngineSpec("reference", "float32"), cameras=2, tokens=5000)
    with pytest.raises(ConfigError, match="enough for 20 replicas of engine reference in float32"):
        require_memory(
            opened, EngineSpec("reference", "float32"), cameras=2, tokens=48, replicas=20
        )
    # An engine that may never hold all logits at once is not refused for them.
    require_memory(opened, EngineSpec("cpu", "float32"), cameras=2, tokens=5000)
    with pytest.raises(ConfigError, match="image_size: expected at least one patch"):
        require_memory(opened, EngineSpec("cpu", "float32"), cameras=2, tokens=48, image_size=0)


def test_engines_say_whether_they_hold_whole_logits() -> None:
    """The compiled model fuses the softmax, and takes half as much."""
    names = ("reference", "compiled", "cpu", "cuda", "ttnn")
    holding = [name for name in names if find_engine(name).capabilities.whole_logits]
    assert holding == ["reference"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_published_sizes(precision: str) -> None:
    """A bound below the full estimate, and not so far below that it would refuse nothing."""
    config, dtype = PRESETS["pi0_base"], getattr(torch, precision)
    bound = required_bytes(config, precision, cameras=3, tokens=48, whole_logits=True)
    assert 0.85 < bound / estimate(config, dtype, 3, 48).total < 1
    assert required_bytes(config, "int8", cameras=3, tokens=48) < 4e9


def test_keys_and_values_count() -> None:
    """Of 3 million tokens, which no engine can do without: 18 layers of 2 · 256 numbers each."""
    config = PRESETS["pi0_base"]
    few, many = (
        required_bytes(config, "float32", cameras=2, tokens=tokens) for tokens in (48, 3_000_000)
    )
    assert many - few > 18 * 2 * 256 * 4 * (3_000_000 - 48)
    loaded = required_bytes(config, "float32", cameras=2, tokens=48, loaded=True)
    assert loaded < 1e8 < few


def test_long_chunks_count() -> None:
    config = replace(PRESETS["tiny"], horizon=1_000_000)
    # The mask of the whole sequence, and logits of eight heads.
    assert required_bytes(config, "float32", cameras=2, tokens=48, whole_logits=True) > 65e12
    assert required_bytes(config, "float32", cameras=2, tokens=48) > 128e6


def test_linear_layers_of_adaptive_norms_may_stay_as_they_are_stored() -> None:
    """In π0.5, whatever the precision: 37 times [3072, 1024] and biases in bfloat16."""
    norms = 37 * 3 * 1024 * (1024 + 1) * 2
    for precision, size in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
        pi0, pi05 = (
            required_bytes(PRESETS[name], precision, cameras=3, tokens=48)
            for name in ("pi0_base", "pi05_base")
        )
        # In place of weights of norms, the projection of the state and half a matrix of time.
        without = 37 * 1024 + 33 * 1024 + 1024 * 1024
        assert pi05 - pi0 == norms - without * size


MEASURE = """
import resource, sys, torch
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.estimate import required_bytes
from pi0.engines.base import make_engine
from pi0.inputs import random_inputs
engine, precision, cameras, tokens, size = sys.argv[2], sys.argv[3], *map(int, sys.argv[4:])
checkpoint = open_checkpoint(sys.argv[1])
held = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
made = make_engine(f"{engine}:{precision}", checkpoint, image_size=size)
inputs, noise = random_inputs(made.config, cameras, tokens, 0)
made.prefill(inputs)
print(
    required_bytes(
        made.config, precision, cameras, tokens, whole_logits=made.capabilities.whole_logits),
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory as Linux counts it")
@pytest.mark.parametrize(
    "words",
    [
        ("reference", "float32", 1, 4000, 28),
        ("reference", "bfloat16", 1, 4000, 28),
        ("reference", "float32", 2, 8, 700),
        ("cpu", "float32", 2, 3000, 700),
    ],
)
def test_nothing_is_refused_that_runs(tiny_path: Path, words: tuple[str | int, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tiny_path), *map(str, words)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    bound, grown = map(int, done.stdout.split())
    assert bound < grown
