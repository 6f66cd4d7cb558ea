"""Runs other implementations of π0 and π0.5 and ours on the same numbers; writes docs/parity.md.

    python parity/run.py                          # minutes, 17 GiB of memory, 7.3 GB of disk
    python parity/run.py --sizes tiny pi05_tiny   # seconds
    python parity/run.py --sizes pi05_wide        # the published widths, two layers: 7 GiB
    python parity/run.py --dtypes float32         # for processors that emulate bfloat16, slowly

One process at a time. Checkpoints that lie in the work folder already (WORKDIR/pi05_base) are used
and stay; a full-size one that was made here is removed when it is done. Exits 1 if an
implementation is further from ours than its tolerance.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from pi0 import __version__
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS, Pi0Config
from pi0.engines.base import make_engine
from pi0.engines.registry import find_peers
from pi0.engines.spec import EngineSpec
from pi0.errors import EngineError
from pi0.inputs import ModelInputs, random_inputs
from pi0.model.precision import parse_dtype

ROOT = Path(__file__).parents[1]
CAMERAS, MASKED = 3, 1  # the second camera is masked
TEXT = {"π0": 9, "π0.5": 60}  # valid tokens, of 48 and of 200


@dataclass(frozen=True)
class Size:
    """A checkpoint, the dtypes ours runs in, and how far apart float32 results may be."""

    name: str
    model: str
    config: Pi0Config
    weights: str
    dtypes: tuple[str, ...]
    tolerance: float


def two_layers(config: Pi0Config) -> Pi0Config:
    """The same widths and vocabulary, with towers of two layers."""
    names = ("vision", "vlm", "expert")
    return replace(config, **{name: replace(getattr(config, name), depth=2) for name in names})


BOTH = ("float32", "bfloat16")
SIZES = {
    "tiny": Size("tiny", "π0", PRESETS["tiny"], "float32", ("float32",), 1e-4),
    "pi0_base": Size("full", "π0", PRESETS["pi0_base"], "bfloat16", BOTH, 1e-5),
    "pi05_tiny": Size("tiny", "π0.5", PRESETS["pi05_tiny"], "float32", ("float32",), 1e-4),
    "pi05_base": Size("full", "π0.5", PRESETS["pi05_base"], "bfloat16", BOTH, 1e-5),
}
SIZES |= {
    name.replace("base", "wide"): replace(size, name="wide", config=two_layers(size.config))
    for name, size in SIZES.items()
    if size.name == "full"
}
DEFAULT = [name for name, size in SIZES.items() if size.name != "wide"]


@dataclass(frozen=True)
class Run:
    """What one implementation made of the inputs, and what it took."""

    actions: np.ndarray
    implementation: str
    torch: str
    seconds: float
    peak_gib: float


@dataclass(frozen=True)
class Row:
    """Ours beside another."""

    size: Size
    dtype: str
    theirs: Run
    ours: Run

    @property
    def max_difference(self) -> float:
        return float(np.abs(self.ours.actions - self.theirs.actions).max())

    @property
    def too_far(self) -> bool:
        return self.dtype == "float32" and self.max_difference > self.size.tolerance

    def cells(self) -> list[str]:
        a, b = self.ours.actions, self.theirs.actions
        return [
            self.size.model,
            self.size.name,
            self.theirs.implementation,
            self.dtype,
            f"{self.max_difference:.1e}",
            f"{np.linalg.norm(a - b) / np.linalg.norm(b):.1e}",
            f"{correlation(a, b):.9f}",
            f"{b.std():.2f}",
            f"{self.theirs.seconds:.2f}",
            f"{self.ours.seconds:.2f}",
            f"{self.theirs.peak_gib:.1f}",
            f"{self.ours.peak_gib:.1f}",
        ]


HEADINGS = ["model", "size", "implementation", "ours in", "largest Δ", "relative L2", "PCC",
            "σ of actions", "s, theirs", "s, ours", "GiB, theirs", "GiB, ours"]  # fmt: skip


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, of float64 arrays that are not constant."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean()))


def observation(config: Pi0Config) -> tuple[ModelInputs, torch.Tensor]:
    """Noise; what is masked holds noise too, so that reading it would show."""
    inputs, noise = random_inputs(config, CAMERAS, config.max_tokens, seed=0)
    image_mask = torch.arange(CAMERAS)[None] != MASKED
    valid = TEXT["π0.5" if config.adaptive_norm else "π0"]
    token_mask = torch.arange(config.max_tokens)[None] < valid
    return replace(inputs, image_mask=image_mask, token_mask=token_mask), noise


def run(engine: str, checkpoint: Path, dtype: str) -> Run | str:
    """One implementation, or why it cannot be run here. Called in a process of its own."""
    try:
        made = make_engine(EngineSpec.parse(engine, dtype), open_checkpoint(checkpoint))
    except EngineError as error:
        return str(error)
    inputs, noise = observation(made.config)
    start = time.perf_counter()
    actions = made.sample(inputs, noise).double().numpy()
    seconds = made.own_seconds or time.perf_counter() - start
    info, (peak, _) = made.info, made.peak_memory()
    if actions.std() == 0:
        sys.exit(f"parity: {engine}: expected actions that differ, found a constant.")
    made.close()
    return Run(actions, info["implementation"], info["torch"], seconds, peak / 2**30)


def run_alone(engine: str, size: Size, checkpoint: Path, dtype: str) -> Run | str:
    """`run` in a fresh process, whose peak of memory is its own."""
    print(f"parity: {size.model} {engine} {size.name} {dtype} ...", file=sys.stderr)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, engine, checkpoint, dtype).result()


def compare(size: Size, checkpoint: Path) -> tuple[list[Row], dict[str, str]]:
    """Rows of the table for a size, and which implementations were skipped and why."""
    ours: dict[str, Run] = {}
    for dtype in size.dtypes:
        result = run_alone("reference", size, checkpoint, dtype)
        if isinstance(result, str):
            sys.exit(f"parity: ours: {result}")
        ours[dtype] = result
    rows, skipped = [], {}
    for name in reversed(find_peers()):
        theirs = run_alone(name, size, checkpoint, "float32")
        if isinstance(theirs, str):
            skipped[name] = theirs
        else:
            rows += [Row(size, dtype, theirs, ours[dtype]) for dtype in size.dtypes]
    return rows, skipped


@contextmanager
def checkpoint_of(size: Size, folder: Path) -> Iterator[Path]:
    """A checkpoint of the size; if it has to be made and is a large one, it is removed again."""
    made = not (folder / "model.safetensors").exists()
    if made:
        dtype = parse_dtype(size.weights)
        synthesise(folder, size.config, LAYOUTS["openpi"], 0, dtype)
    yield folder
    if made and size.name != "tiny":
        shutil.rmtree(folder)


def machine() -> str:
    """The processor, as the kernel calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else 'unknown processor'}, {os.cpu_count()} cores"


def page(rows: list[Row], skipped: dict[str, str]) -> str:
    """docs/parity.md."""
    table = [HEADINGS, ["---"] * 4 + ["---:"] * (len(HEADINGS) - 4), *(row.cells() for row in rows)]
    runs = {run.implementation: run.torch for row in rows for run in (row.ours, row.theirs)}
    sizes = {row.size.name: row.size for row in rows}.values()  # the same for both models
    tolerances = ", ".join(f"{size.tolerance:.0e} at size {size.name}" for size in sizes)
    return TEMPLATE.format(
        version=__version__,
        cameras=CAMERAS,
        tolerances=tolerances,
        table="\n".join(f"| {' | '.join(cells)} |" for cells in table),
        skipped="".join(f"\nSkipped: {name}: {reason}\n" for name, reason in skipped.items()),
        machine=machine(),
        torch=", ".join(f"{torch} for {name}" for name, torch in runs.items()),
    )


TEMPLATE = """\
# Parity with other implementations

Two implementations of π0, one of them also of π0.5, that we did not write get the same weights, the
same inputs and the same noise as pi0 {version}; the table says how far the actions are apart after
ten denoising steps.
This page is written by

    make parity

**What is compared.** The checkpoint is one of `pi0 synth`: random values in exactly the published
names and shapes. At size tiny it is the preset `tiny` or `pi05_tiny` in float32, at full size
`pi0_base` or `pi05_base` (the published sizes) in bfloat16, which every implementation reads into
float32 without loss. Size wide (`--sizes pi0_wide pi05_wide`) has the published widths and
vocabulary and two layers a tower, for machines with less memory. There are {cameras} cameras, the
second of them masked, and 9 valid tokens of 48, in π0.5 60 of 200; what is masked holds noise too.
All of it is model-level, as for `pi0 sample`: no tokenizer, no image resizing, no normalisation.

**How.** The others compute in float32, ours in float32 and, at full size, in bfloat16 too.
Largest Δ is the largest absolute difference of any of the 50 × 32 actions, relative L2 the norm of
the difference by the norm of theirs, PCC Pearson's correlation in float64, σ the standard deviation
of their actions.

**Tolerance.** In float32 the largest Δ may be {tolerances}.
What is left there is the order in which float32 sums are taken, which adds up over 63 layers (27
vision, 18 VLM, 18 expert; at other sizes 6) and ten steps. Planted in ours, the exact GELU in place
of its tanh form moved the actions by 1.5e-4 (tiny) and 5.4e-5 (full), one padding token shown by
0.14 and 7e-3: the tolerances catch both. bfloat16 rows have none: they show what rounding costs.

{table}
{skipped}
Seconds are one call for a chunk of actions without warm-up, loading left out; GiB is the peak
memory of the whole process, loading included. Both are of a single run and no benchmark.

Known differences: transformers drops a masked camera from the sequence, LeRobot and ours keep its
place and mask it. transformers computes the angles of the time embedding, up to 1571 rad, in
float32, the other two in float64: that is most of its distance at size tiny. LeRobot holds both
output heads, which π0 never reads: hence its memory.

Machine: {machine}.
PyTorch: {torch}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=DEFAULT)
    help_folder = "of checkpoints, which are made where `pi0 synth` did not make them earlier"
    default = ROOT / "out" / "parity"
    parser.add_argument("--workdir", type=Path, default=default, metavar="FOLDER", help=help_folder)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "parity.md", metavar="PAGE.md")
    help_dtypes = "that ours runs in; default: float32, at full size bfloat16 too"
    parser.add_argument("--dtypes", nargs="+", choices=BOTH, default=BOTH, help=help_dtypes)
    options = parser.parse_args()
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for name in options.sizes:
        size = SIZES[name]
        size = replace(size, dtypes=tuple(d for d in size.dtypes if d in options.dtypes))
        with checkpoint_of(size, options.workdir / name) as checkpoint:
            more, why = compare(size, checkpoint)
        rows, skipped = rows + more, skipped | why
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(page(rows, skipped), encoding="utf-8")
    temporary.replace(options.out)
    print(options.out.read_text(encoding="utf-8"))
    far = [
        f"{row.theirs.implementation} ({row.size.model}, {row.size.name})"
        for row in rows
        if row.too_far
    ]
    if far or not rows:
        sys.exit(f"parity: beyond the tolerance: {', '.join(far)}." if far else "parity: no rows.")


if __name__ == "__main__":
    main()
