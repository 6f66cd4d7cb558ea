"""Several processes on one machine (gloo) give what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.errors import ConfigError
from pi0.train.processes import Processes

WORKER = Path(__file__).with_name("together.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(folder: Path, *words: str) -> None:
    command, arguments = [w for w in words if w != "shard"], [w for w in words if w == "shard"]
    paths = [str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(
        [*command, str(WORKER), str(folder), *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _, errors = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun passes it on to its workers; a kill would leave them
            raise
    assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(folder, sys.executable)
    return folder


def test_two_processes_equal_one(alone: Path, tmp_path: Path) -> None:
    """Losses within 1e-4 (sums in another order, over six steps), weights within 1e-3."""
    run(tmp_path, *TORCHRUN)
    _compare(alone, tmp_path)


def test_sharded_processes_equal_one(alone: Path, tmp_path: Path) -> None:
    run(tmp_path, *TORCHRUN, "shard")
    _compare(alone, tmp_path)


def _compare(alone: Path, together: Path) -> None:
    for name in ("pi0", "pi05"):
        ours, theirs = (
            json.loads((f / name / "losses.json").read_text()) for f in (alone, together)
        )
        assert len(ours) == len(theirs) == 6
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert ours[0] != ours[-1]
        a, b = (
            load_model(open_checkpoint(folder / name / "last")).state_dict()
            for folder in (alone, together)
        )
        for key, value in a.items():
            torch.testing.assert_close(value, b[key], atol=1e-3, rtol=0)


def test_shares_are_equal_or_refused() -> None:
    parts = [Processes(rank, 4, torch.device("cpu")).share(8) for rank in range(4)]
    assert [list(range(8))[part] for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ConfigError, match="multiple of the 4 processes, found 6"):
        Processes(0, 4, torch.device("cpu")).share(6)
