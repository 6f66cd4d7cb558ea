"""Peak memory of converting a checkpoint to JAX and back and of loading JAX folders, each in a
process of its own; then whether every weight that came back has the same bits.

"of one chunk" is a folder whose leaves are single chunks, as openpi's are, which was written from
the first one; ours has a chunk for each layer.

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
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.checkpoint.orbax import ArraySpec, open_folder, write_folder

GB = 1e9
PI0 = (sys.executable, "-c", "from pi0.cli.main import main; main()")
LOAD = (sys.executable, __file__, "--load")
ONE_CHUNK = (sys.executable, __file__, "--one-chunk")


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


def in_one_chunk(params: Path, out: Path) -> None:
    """Writes a folder of arrays again with one chunk for each."""
    source = open_folder(params)
    specs = {name: ArraySpec(a.shape, a.shape, a.dtype) for name, a in source.arrays.items()}

    def parts() -> Iterator[tuple[str, tuple[()], torch.Tensor]]:
        for name in specs:
            with source.open(name) as array:
                yield name, (), array.read()

    write_folder(out, specs, parts())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path, help="a new folder")
    options = parser.parse_args()
    source, work = options.checkpoint, options.work
    work.mkdir(parents=True)
    jax, one, back = work / "jax", work / "one", work / "back"
    try:
        to_jax = peak(*PI0, "convert", source, jax, "--to", "jax")
        sizes = [array.bytes for array in open_folder(jax / "params").arrays.values()]
        largest, held = max(sizes), sum(sizes)
        bound = 1.2 * largest + GB
        print(f"largest leaf {largest / GB:.2f} GB, all leaves {held / GB:.2f} GB")
        within = [
            report("convert --to jax", to_jax, bound),
            report("load_model", peak(*LOAD, jax), held + bound),
        ]
        # In a process of its own: what this one had at most would count in those it starts later.
        peak(*ONE_CHUNK, jax / "params", one / "params")
        shutil.copy(jax / "config.json", one)
        shutil.rmtree(jax)
        within += [
            report("load_model of one chunk", peak(*LOAD, one), held + bound),
            report(
                "convert of one chunk", peak(*PI0, "convert", one, back, "--to", "openpi"), bound
            ),
        ]
        count, different = differing(source / "model.safetensors", back / "model.safetensors")
    finally:
        shutil.rmtree(work)
    print(f"{count - len(different)} of {count} tensors have the same bits {different[:3] or ''}")
    if different or not all(within):
        sys.exit(1)


def report(name: str, found: float, limit: float) -> bool:
    """Prints a peak at once, since the next takes minutes; returns whether it is within."""
    print(f"{name:24} peak {found / GB:6.2f} GB, bound {limit / GB:6.2f} GB", flush=True)
    return found <= limit


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load_model(open_checkpoint(sys.argv[2]), torch.bfloat16)
    elif sys.argv[1:2] == ["--one-chunk"]:
        in_one_chunk(*map(Path, sys.argv[2:]))
    else:
        main()
