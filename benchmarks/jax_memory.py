"""Peak memory of converting a checkpoint to JAX and back and of loading the JAX folder, each in a
process of its own; then whether every weight that came back has the same bits.

    python benchmarks/jax_memory.py pi0_base out/jax    # 7 + 7 GB of disk there, removed at the end

The bound is 1.2 × the largest leaf + 1 GB, for loading besides the parameters as held. CKPT is
a folder in openpi's PyTorch layout, such as `pi0 synth` writes. Linux only. Exits 1 if a bound is
passed or a weight differs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from pi0.checkpoint.load import load_model, open_checkpoint

GB = 1e9
PI0 = (sys.executable, "-c", "from pi0.cli.main import main; main()")
LOAD = (sys.executable, __file__, "--load")


def peak(*words: object) -> float:
    """Bytes that a command had resident at most; it must succeed."""
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"jax_memory: {' '.join(map(str, words))}: it failed.")
    return usage.ru_maxrss * 1024


def differing(before: Path, after: Path) -> tuple[int, list[str]]:
    """How many tensors of a file were compared, and the names of those that are not the same; left
    out is what the model never reads, which a conversion writes as zeros."""
    unread = set(open_checkpoint(before).names.unread)
    with safe_open(before, framework="pt") as a, safe_open(after, framework="pt") as b:
        names = [name for name in a.keys() if name not in unread]  # noqa: SIM118 - no dict
        return len(names), [n for n in names if not torch.equal(a.get_tensor(n), b.get_tensor(n))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path, help="a new folder")
    options = parser.parse_args()
    source, work = options.checkpoint, options.work
    work.mkdir(parents=True)
    jax, back = work / "jax", work / "back"
    try:
        to_jax = peak(*PI0, "convert", source, jax, "--to", "jax")
        params = open_checkpoint(jax).params
        assert params is not None
        largest = max(array.bytes for array in params.source.arrays.values())
        held = sum(array.bytes for array in params.source.arrays.values())
        bound = 1.2 * largest + GB
        rows = [
            ("convert --to jax", to_jax, bound),
            ("convert --to openpi", peak(*PI0, "convert", jax, back, "--to", "openpi"), bound),
            ("load_model", peak(*LOAD, jax), held + bound),
        ]
        count, different = differing(source / "model.safetensors", back / "model.safetensors")
    finally:
        shutil.rmtree(work)
    print(f"largest leaf {largest / GB:.2f} GB, all leaves {held / GB:.2f} GB")
    for name, found, limit in rows:
        print(f"{name:20} peak {found / GB:6.2f} GB, bound {limit / GB:6.2f} GB")
    print(f"{count - len(different)} of {count} tensors have the same bits {different[:3] or ''}")
    if different or any(found > limit for _, found, limit in rows):
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load_model(open_checkpoint(sys.argv[2]), torch.bfloat16)
    else:
        main()
