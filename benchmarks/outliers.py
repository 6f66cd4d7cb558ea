"""Outliers at full width: `python benchmarks/outliers.py [--preset pi05_base] [--blocks 3]`.

Writes a model of the published widths with a few blocks, with and without outliers in its norms,
and prints the error of `cpu:int8`, ‖a − a_ref‖ / ‖a_ref − noise‖, as the engine is and with norms
left as they are. Takes 3 GB of memory and 0.8 of disk with three blocks.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from pi0 import make_engine
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.checkpoint.synth import FLAT, synthesise
from pi0.config import PRESETS, Pi0Config
from pi0.engines.fast.weight_cache import find_equalisers
from pi0.inputs import random_inputs
from pi0.verify.compare import displacement_error

TOKENS, SEEDS = 9, 2


def shallow(config: Pi0Config, blocks: int) -> Pi0Config:
    return replace(
        config,
        vision=replace(config.vision, depth=min(2, blocks)),
        vlm=replace(config.vlm, depth=blocks),
        expert=replace(config.expert, depth=blocks),
        vocab_size=512,
    )


def actions(checkpoint: Checkpoint, engine: str) -> list[tuple[Tensor, Tensor]]:
    """(noise, actions) of some seeds."""
    config = checkpoint.config
    inputs, _ = random_inputs(config, 1, TOKENS, 0)
    shape = 1, config.horizon, config.action_dim
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(SEEDS)]
    with make_engine(engine, checkpoint) as made:
        return [(noise, made.sample(inputs, noise)) for noise in noises]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="pi0_base")
    parser.add_argument("--blocks", type=int, default=3)
    args = parser.parse_args()
    config = shallow(PRESETS[args.preset], args.blocks)
    print("| norms' outliers | smoothed | displacement error |\n|---|---|---|")
    for factor in (1, 30):
        with tempfile.TemporaryDirectory() as folder:
            layout, dtype = LAYOUTS["openpi"], torch.bfloat16
            statistics = replace(FLAT, outliers=factor)
            synthesise(Path(folder), config, layout, 0, dtype, statistics=statistics)
            checkpoint = open_checkpoint(folder)
            exact = actions(checkpoint, "cpu")
            for evened_out in (True, False):
                with patch(
                    "pi0.engines.fast.weight_cache.find_equalisers",
                    find_equalisers if evened_out else lambda *_: {},
                ):
                    pairs = zip(exact, actions(checkpoint, "cpu:int8"), strict=True)
                    errors = [displacement_error(a, b, noise) for (noise, a), (_, b) in pairs]
                figures = ", ".join(f"{100 * error:.2f} %" for error in errors)
                print(f"| × {factor} | {'yes' if evened_out else 'no'} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
