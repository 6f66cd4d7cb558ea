"""A policy beside a recorded episode: `python examples/replay.py CKPT DATASET [--out PLOT.png]`.

Shows the policy every picture and state of a LeRobot dataset's first episode and compares the first
action of each chunk with the recorded one. Nothing moves: it tells whether a policy is wired up
right (cameras, state, statistics), not whether it succeeds. Needs the extras [sim] and [plot].
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from pi0 import Policy
from pi0.data import Dataset
from pi0.errors import Pi0Error
from pi0.train.checks import match_cameras


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--robot", help="default: the one that the checkpoint names")
    parser.add_argument("--out", type=Path, default=Path("replay.png"))
    arguments = parser.parse_args()

    policy = Policy.from_checkpoint(arguments.checkpoint, robot=arguments.robot, on_limit="warn")
    dataset = Dataset.open(arguments.dataset)
    rows = range(dataset.episode_starts[1])
    states, recorded = dataset.column("observation.state"), dataset.column("action")[: len(rows)]
    with tempfile.TemporaryDirectory() as cache:
        pictures = {
            ours: dataset.frames(theirs, cache=Path(cache))
            for ours, theirs in match_cameras(dataset, policy.robot).items()
        }
        (key, _), *_ = policy.robot.state
        sampled = np.stack(
            [
                policy.infer(
                    {
                        **{name: frames[row] for name, frames in pictures.items()},
                        key: states[row],
                        "prompt": str(dataset.tasks[row]),
                    }
                )["actions"][0]
                for row in rows
            ]
        )
    if sampled.shape != recorded.shape:
        raise Pi0Error(
            f"{arguments.dataset}: expected {sampled.shape[1]} values in an action, as robot "
            f"{policy.robot.name} has them, found {recorded.shape[1]}. Name the robot with --robot."
        )
    names = policy.robot.action_names or [str(n) for n in range(recorded.shape[1])]
    figure, axes = plt.subplots(len(names), sharex=True, figsize=(7, 1.5 * len(names)))
    for name, axis, ours, theirs in zip(names, axes, sampled.T, recorded.T, strict=True):
        axis.plot(theirs, label="recorded")
        axis.plot(ours, label="policy")
        axis.set_ylabel(name)
        spread = np.abs(theirs - theirs.mean()).mean()
        error = np.abs(ours - theirs).mean()
        print(f"{name}: off by {error:.2f} on average; a constant would be by {spread:.2f}")
    axes[0].set_title(str(dataset.tasks[0]))
    axes[0].legend()
    axes[-1].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    try:
        main()
    except Pi0Error as error:
        sys.exit(str(error))
