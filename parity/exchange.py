"""What the implementations have in common: their command line, weights, inputs and report.

Each is run as `python NAME.py CKPT IN.npz OUT.npz --preset tiny|pi0_base [--dtype ...]`, writes
OUT.npz and prints one line of JSON last. Exit status 77 says that it cannot be run here, and
standard error why.

Runs in several environments: needs torch, numpy and safetensors, and of pi0 only the sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from pi0.config import PRESETS, Pi0Config

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

SKIPPED = 77
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
EMBEDDING_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"


@dataclass
class Task:
    """One run: what to compute, and what was recorded while computing it."""

    checkpoint: Path
    inputs: Path
    out: Path
    preset: str
    dtype: str
    seconds: float = 0.0
    recorded: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def config(self) -> Pi0Config:
        return PRESETS[self.preset]

    def read(self) -> dict[str, Tensor]:
        """The arrays of the inputs file, as `pi0 sample` reads them."""
        with np.load(self.inputs) as file:
            return {name: torch.from_numpy(array) for name, array in file.items()}

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to `seconds`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return wrapped

    def record(
        self, name: str, function: Callable[..., Any], pick: Callable[[Any], Tensor]
    ) -> Callable[..., Any]:
        """The function, with what `pick` finds in each of its results kept under a name."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.recorded.setdefault(name, []).append(pick(result).float())
            return result

        return wrapped

    def finish(self, implementation: str, actions: Tensor | None = None) -> None:
        """Writes OUT.npz, unless the implementation has done so, and prints the report."""
        if actions is not None:
            arrays = {name: torch.stack(values) for name, values in self.recorded.items()}
            arrays["actions"] = actions.float()
            np.savez(self.out, **{name: value.numpy() for name, value in arrays.items()})
        report = {
            "implementation": implementation,
            "torch": torch.__version__,
            "seconds": round(self.seconds, 3),
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
        print(json.dumps(report))


def parse_task(description: str | None) -> Task:
    """The task that the command line asks for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="folder or .safetensors file")
    parser.add_argument("inputs", metavar="IN.npz", type=Path, help="inputs as for `pi0 sample`")
    parser.add_argument("out", metavar="OUT.npz", type=Path, help="written: actions (B,50,32)")
    parser.add_argument("--preset", choices=("tiny", "pi0_base"), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return Task(**vars(parser.parse_args()))


def skip(reason: str) -> NoReturn:
    """Ends the process: this implementation cannot be run here."""
    print(reason, file=sys.stderr)
    sys.exit(SKIPPED)


@torch.no_grad()
def fill(
    places: dict[str, Tensor], checkpoint: Path, places_of: Callable[[str], tuple[str, ...]]
) -> None:
    """Copies a checkpoint into the tensors of a model: all of them, and nothing left over.

    Args:
        places: the model's tensors by its names, each of which has to be filled.
        places_of: the names of the places that a tensor of the checkpoint fills; none: not read.
    """
    left = dict(places)
    for name, value in stream(checkpoint):
        for place in places_of(name):
            if place not in left:
                sys.exit(f"{name}: expected a place {place} that is still empty, found none.")
            target = left.pop(place)
            if target.shape != value.shape:
                sys.exit(f"{name}: expected {list(target.shape)}, found {list(value.shape)}.")
            target.copy_(value)
    if left:
        sys.exit(f"{checkpoint}: expected tensors for {', '.join(left)}, found none.")


def stream(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint one by one.

    The file is opened anew for each: what was read through its memory map counts as memory of this
    process until it is closed.
    """
    from safetensors import safe_open

    path = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    for name in names:
        with safe_open(path, framework="pt") as file:
            yield name, file.get_tensor(name)
