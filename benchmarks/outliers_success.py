"""Outliers in closed loop: `python benchmarks/outliers_success.py [--episodes 30]`.

The policy that ships, rewritten exactly so that every hundredth channel of its norms, at least one
in each, is 32 times as large and the matrices that read it as much smaller. Prints how far
that moves the actions in float32 and in int8, with norms evened out and as they are, of what the
model moves, and what each achieves on the tabletop.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from pi0 import make_engine, open_checkpoint
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.synth import tensor_list
from pi0.engines.fast.weight_cache import find_equalisers
from pi0.engines.fast.weights import norm_before
from pi0.inputs import random_inputs
from pi0.verify.compare import displacement_error

FACTOR = 32.0  # a power of two, so that dividing by it is exact
AS_IT_IS = """
import sys
from unittest.mock import patch
from pi0.__main__ import main
with patch("pi0.engines.fast.weight_cache.find_equalisers", lambda *_: {}):
    main()
"""


def rewrite(source: Path, folder: Path) -> None:
    """Copies a checkpoint, with outliers in the norms of its blocks."""
    shutil.copytree(source, folder)
    checkpoint = open_checkpoint(source)
    pieces: dict[str, list[Tensor]] = {}
    for name, _, values in checkpoint.stream():
        pieces.setdefault(name, []).append(values.float())
    tensors = {name: torch.cat(parts) for name, parts in pieces.items()}
    channels: dict[str, Tensor] = {}
    for name in tensors:
        norm = norm_before(name)
        if norm is None or not name.endswith("weight"):
            continue
        width = tensors[name].shape[1]
        if norm not in channels:
            generator = torch.Generator().manual_seed(len(channels))
            channels[norm] = torch.randperm(width, generator=generator)[: max(1, width // 100)]
        tensors[name][:, channels[norm]] /= FACTOR
    for norm, chosen in channels.items():
        if norm.startswith("vision_tower"):
            tensors[f"{norm}.weight"][chosen] *= FACTOR
            tensors[f"{norm}.bias"][chosen] *= FACTOR
        else:  # Gemma's norms multiply by 1 + weight
            weight = tensors[f"{norm}.weight"]
            weight[chosen] = FACTOR * (1 + weight[chosen]) - 1
    names = tensor_list(checkpoint.config, LAYOUTS["openpi"])
    written = {
        theirs: tensors[ours].clone() for theirs, (ours, _) in names.items() if ours in tensors
    }
    save_file(written, folder / "model.safetensors")


def error(source: Path, folder: Path, engine: str, evened_out: bool) -> str:
    """Of the rewritten policy's actions beside the source's in float32, worst of three noises."""
    equalisers = find_equalisers if evened_out else lambda *_: {}
    worst = 0.0
    with (
        patch("pi0.engines.fast.weight_cache.find_equalisers", equalisers),
        make_engine("cpu", open_checkpoint(source)) as before,
        make_engine(engine, open_checkpoint(folder)) as after,
    ):
        for seed in range(3):
            inputs, noise = random_inputs(before.config, 1, 8, seed)
            one, other = before.sample(inputs, noise), after.sample(inputs, noise)
            worst = max(worst, displacement_error(one, other, noise))
    return f"{worst:.1e}"


def succeed(checkpoint: Path, engine: str, evened_out: bool, episodes: int, out: Path) -> str:
    """The cells of a row: successes of each verb."""
    entry = "from pi0.__main__ import main; main()" if evened_out else AS_IT_IS
    command = [sys.executable, "-c", entry, "eval", str(checkpoint), "--engine", engine]
    command += ["--tasks", "lift,put,push", "--episodes", str(episodes), "--execute", "2"]
    # One worker is this very process, in which the patch holds.
    command += ["--seed-start", "9000000", "--workers", "1", "--robot", "tabletop"]
    subprocess.run([*command, "--out", str(out)], check=True)
    found = json.loads(out.read_text())
    counts = [str(found["tasks"][task]["success"]) for task in ("lift", "put", "push")]
    return " | ".join([*counts, str(found["wrong"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=30)
    args = parser.parse_args()
    source = open_checkpoint("tabletop").path
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary) / "outliers", Path(temporary) / "results.json"
        rewrite(source, folder)
        print("| engine | norms smoothed | error | lift | put | push | wrong |")
        print("|---|---|---|---|---|---|---|")
        for engine, evened_out in (("cpu", True), ("cpu:int8", True), ("cpu:int8", False)):
            off = error(source, folder, engine, evened_out)
            cells = succeed(folder, engine, evened_out, args.episodes, out)
            print(f"| {engine} | {'yes' if evened_out else 'no'} | {off} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
