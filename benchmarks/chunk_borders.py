"""How far actions jump where chunks meet: `python benchmarks/chunk_borders.py CKPT`.

Chunks follow each other as in an `ActionBuffer`: each starts from the observation half a chunk
after the last one's and takes over some ticks later. The plan before it had an action for that
tick, too: the jump is the distance between the two, root mean square over dimensions and borders,
in units of the action's spread within the chunks. Images and noise differ from chunk to chunk.
Counts ticks, times nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from pi0 import Policy, RealTimeChunking, make_engine, open_checkpoint
from pi0.policy.chunking import Plan, merge

ROWS = {
    "replace": ("replace", None),
    "average": ("average", None),
    "ensemble": ("ensemble", None),
    "inpaint, LeRobot's settings": (
        "inpaint",
        RealTimeChunking(max_guidance=10, schedule="linear", overlap=10, jacobian="identity"),
    ),
    "inpaint, identity": ("inpaint", RealTimeChunking(jacobian="identity")),
    "inpaint, exact": ("inpaint", RealTimeChunking()),
}
DECAY = 0.01
IMAGE = 64  # pixels


def border_jump(policy: Policy, overlap: str, delay: int, borders: int) -> float:
    """See above."""
    rng = np.random.default_rng(0)
    keys = [camera.key for camera in policy.robot.cameras]
    width = policy.pipeline.state_stats.width
    every = policy.engine.config.horizon // 2
    plan, jumps, chunks = None, [], []
    for start in range(0, every * (borders + 1), every):
        pixels = rng.integers(0, 256, (len(keys), IMAGE, IMAGE, 3), np.uint8)
        images = dict(zip(keys, pixels, strict=True))
        observation = policy.robot.observation(images, np.zeros(width), "pick up the red cube")
        if plan is None:
            chunk = policy.infer(observation)["actions"]
            plan = Plan.of_chunk(start, chunk.astype(np.float64))
        else:
            rest = plan.from_tick(start).actions
            asked = {"previous": rest, "delay": delay} if overlap == "inpaint" else {}
            chunk = policy.infer(observation, **asked)["actions"]
            new = Plan.of_chunk(start, chunk.astype(np.float64)).from_tick(start + delay)
            old = plan.from_tick(start + delay)
            plan = merge(old, new, overlap, DECAY)
            jumps.append(plan.actions[0] - old.actions[0])
        chunks.append(chunk)
    spread = np.std(np.concatenate(chunks), axis=0)
    moving = spread > 0
    return float(np.sqrt(np.mean(np.square(np.array(jumps)[:, moving] / spread[moving]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--robot", default="generic")
    parser.add_argument("--delays", type=int, nargs="+", default=[1, 5, 15])
    parser.add_argument("--borders", type=int, default=40)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.checkpoint)
    print("| overlap | " + " | ".join(f"delay {d}" for d in args.delays) + " |")
    print("|---|" + "---:|" * len(args.delays))
    with make_engine("reference", checkpoint) as engine:
        for name, (overlap, real_time) in ROWS.items():
            jumps = []
            for delay in args.delays:
                policy = Policy.from_checkpoint(
                    checkpoint, robot=args.robot, engine=engine, real_time=real_time
                )
                jumps.append(border_jump(policy, overlap, delay, args.borders))
            print(f"| {name} | " + " | ".join(f"{jump:.3f}" for jump in jumps) + " |", flush=True)


if __name__ == "__main__":
    main()
