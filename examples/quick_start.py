"""From a checkpoint to a moving robot in one file: `python examples/quick_start.py [CKPT]`.

Without an argument a small random checkpoint is made, whose actions mean nothing. The robot is a
LIBERO arm that is not there: its cameras show the two sample pictures, its joints do not move.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pi0 import PRESETS, ActionBuffer, Policy
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.synth import synthesise

CAMERAS = Path(__file__).parent / "cameras"
TICKS, RATE = 60, 20.0  # of the loop below, and Hz


def observe():
    """What the robot sees and where it is, in the keys of `--robot libero`."""
    return {
        "observation/image": np.asarray(Image.open(CAMERAS / "base.png").convert("RGB")),
        "observation/wrist_image": np.asarray(Image.open(CAMERAS / "wrist.png").convert("RGB")),
        "observation/state": np.zeros(8),
        "prompt": "put the red cube into the blue bowl",
    }


def load(folder):
    """1. The policy: weights, statistics, tokenizer and the robot's table, checked together."""
    if len(sys.argv) > 1:
        return Policy.from_checkpoint(sys.argv[1], robot="libero")
    path = Path(folder) / "demo"
    synthesise(path, PRESETS["tiny"], LAYOUTS["openpi"], seed=0, dtype=torch.float32)
    return Policy.from_checkpoint(
        path, robot="libero", norm_stats="none", preprocessing="openpi", engine="reference"
    )


with tempfile.TemporaryDirectory() as folder, load(folder) as policy:
    # 2. One observation in, a chunk of actions out.
    result = policy.infer(observe())
    print(f"a chunk: {result['actions'].shape}, in {result['policy_timing']['total_ms']:.0f} ms")

    # 3. A loop at the robot's rate, in which the next chunk is computed in the background.
    with ActionBuffer(policy, execution_horizon=25, overlap="average") as buffer:
        for tick in range(TICKS):
            began = time.perf_counter()
            action = buffer.step(observe())
            if tick % 20 == 0:
                print(f"tick {tick}: {np.round(action, 3)}")  # here the robot would get it
            time.sleep(max(0.0, 1 / RATE - (time.perf_counter() - began)))

# 4. The same over the network: pi0 serve CKPT --robot libero, and examples/robot_client.py.
