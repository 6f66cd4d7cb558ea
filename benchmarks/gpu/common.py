"""What the scripts of this folder share: their options, the engine's network, and times.

`--device cpu` tries a script where there is no GPU: nothing is captured, and times mean nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint
from pi0.config import Pi0Config
from pi0.engines.fast.cuda.engine import choose_bucket, choose_kernels, choose_scheme
from pi0.engines.fast.cuda.graph import Call
from pi0.engines.fast.cuda.parts import time_run
from pi0.engines.fast.network import Network
from pi0.engines.fast.plan import make_token_plan
from pi0.engines.fast.weights import pack
from pi0.inputs import random_inputs

CALLS = 20  # of a short kernel, in one graph


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Options of every script; `doc` is its docstring."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    return parser


def make_stream(device: torch.device) -> torch.cuda.Stream | None:
    """One for captures, of which one lives at a time; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def microseconds(
    runs: Sequence[Callable[[], object]], stream: torch.cuda.Stream | None, repeat: int = 20
) -> float:
    """Median time of a call. Several runs take turns, as with weights that no cache is to hold."""

    def several() -> None:
        for _, run in zip(range(max(CALLS, len(runs))), cycle(runs), strict=False):
            run()

    return 1e3 * median(time_run(several, stream, repeat)) / max(CALLS, len(runs))


def attempt(run: Callable[[], Any]) -> Any:
    """The result, or the first line of what went wrong: one failure is not to hide the rest."""
    try:
        return run()
    except Exception as error:
        return f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def make_network(
    checkpoint: Checkpoint, precision: str, device: torch.device
) -> tuple[Network, list[str]]:
    """The network of engine cuda, made as the engine makes it, and its notes."""
    scheme, kept = choose_scheme(checkpoint, precision)
    kernels, chosen = choose_kernels(device, scheme, checkpoint.config)
    weights = pack(checkpoint, scheme).to(device)
    return Network(weights, kernels), [*chosen, *kept]


def make_call(config: Pi0Config, cameras: int, tokens: int, steps: int, seed: int) -> Call:
    """A random call of engine cuda, on the CPU."""
    inputs, noise = random_inputs(config, cameras, tokens, seed)
    bucket = choose_bucket(config)
    plan = make_token_plan(inputs, config.vision.num_patches, config.suffix_len, bucket)
    return Call(inputs, plan, noise, steps)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 error."""
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm())


def write(path: Path, result: Any) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def show(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Rows with the same keys as lines of a Markdown table."""
    if rows:
        yield "| " + " | ".join(rows[0]) + " |"
        yield "|" + "---|" * len(rows[0])
    for row in rows:
        yield "| " + " | ".join(map(cell, row.values())) + " |"


def cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
