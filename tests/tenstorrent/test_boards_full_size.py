"""Every published size on every board in every precision: the whole models, dry.

Runs of one board and precision share a process, which is started once and compiles a kernel once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pi0.engines.tenstorrent.precision import PRESETS
from pi0.engines.tenstorrent.stub_compiler import has_compiler
from pi0.engines.tenstorrent.ttnn_import import MOCK

pytestmark = [
    pytest.mark.ttnn,
    pytest.mark.slow,
    pytest.mark.skipif(
        not has_compiler(), reason="no riscv64-unknown-elf-gcc: apt install gcc-riscv64-unknown-elf"
    ),
]
SIZES = ((2, 384), (3, 224), (1, 224))
# Model, cameras, pixels, observations at once.
RUNS = [(model, *size, 1) for model in ("pi0_base", "pi05_base") for size in SIZES]
RUNS += [("pi0_base", 2, 224, 4)]
SCRIPT = f"""
import dataclasses, json, sys
from pi0.config import PRESETS
from pi0.engines.tenstorrent.dryrun import dry_run
board, precision = sys.argv[1:]
for model, cameras, size, batch in {RUNS}:
    config = PRESETS[model].with_image_size(size)
    found = dry_run(config, board, precision, cameras, batch=batch)
    print(json.dumps(dataclasses.asdict(found)))
"""
# Programs of one step's 18 blocks and the final norm; of the prefix's 18, the last one without its
# output; of the 27 of vision beside patches, positions and the final norm, where patches are whole.
LAST = 6
TEXT = {"accurate": 2, "fast": 1}  # tokens become float32 in a program of its own
LOOP = {"accurate": 18 * 13 + 1, "fast": 18 * 11 + 1}
PREFIX = {"accurate": 17 * 14 + LAST, "fast": 17 * 13 + LAST}
VISION = {"accurate": 2 + 27 * 10 + 1, "fast": 2 + 27 * 8 + 1}


@pytest.mark.parametrize("precision", PRESETS)
@pytest.mark.parametrize("board", ["n150", "n300", "p150"])
def test_fits(board: str, precision: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != MOCK}
    words = [sys.executable, "-c", SCRIPT, board, precision]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for run, (_, _, size, batch) in zip(found, RUNS, strict=True):
        assert (run["board"], run["batch"]) == (board, batch)
        assert run["peak_l1"] <= run["l1"]
        assert run["weights"] < run["peak_dram"] < run["dram"]
        stages = {stage["stage"]: stage for stage in run["times"]}
        assert stages["expert_transformer"]["programs"] == LOOP[precision]
        assert stages["expert_transformer"]["on_few_cores"] == 0
        assert stages["vlm_transformer"]["programs"] == PREFIX[precision]
        assert stages["token_embedding"]["programs"] == TEXT[precision]
        padded = size == 384  # a mask beside a scale costs a program
        assert stages["vision_tower"]["programs"] == VISION[precision] + 27 * padded
