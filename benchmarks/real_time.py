"""What real-time chunking does to a policy in closed loop: `python benchmarks/real_time.py [CKPT]`.

Runs the same seeds of the tabletop with and without it, for several settings and latencies, and
prints the table of docs/chunking.md. Everything is counted in ticks of the simulation, so that a
busy machine changes nothing but the time it takes.
"""

from __future__ import annotations

import argparse

import numpy as np

from pi0 import Policy, RealTimeChunking
from pi0.eval import EvalPlan, evaluate

SEEDS = 8_002_000  # no demonstration has them, and none of docs/results.md
WAYS = {
    "none": None,
    "identity": RealTimeChunking(jacobian="identity"),
    "identity, schedule zeros": RealTimeChunking(jacobian="identity", schedule="zeros"),
    "exact": RealTimeChunking(),
}


def engine_of(real_time: RealTimeChunking | None) -> str:
    """The fastest that computes it."""
    return "reference" if real_time and real_time.jacobian == "exact" else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="tabletop")
    parser.add_argument("--tasks", nargs="+", default=["lift"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--latencies", nargs="+", type=int, default=[0, 100, 300], metavar="MS")
    parser.add_argument("--episodes", type=int, default=20, help="of each task")
    parser.add_argument("--execute", type=int, default=2)
    arguments = parser.parse_args()
    print("| latency, ms | real-time chunking | success | steps of an episode | jump |")
    print("|---:|---|---:|---:|---:|")
    for latency in arguments.latencies:
        plan = EvalPlan(
            tasks=tuple(arguments.tasks),
            episodes=arguments.episodes,
            seed_start=SEEDS,
            execute=arguments.execute,
            injected_latency=latency,
        )
        for way in arguments.ways:
            real_time = WAYS[way]

            def make(real_time: RealTimeChunking | None = real_time) -> Policy:
                return Policy.from_checkpoint(
                    arguments.checkpoint,
                    engine=engine_of(real_time),
                    on_limit="clamp",
                    real_time=real_time,
                )

            results = evaluate(make, plan)
            success = sum(episode.success for episode in results.episodes)
            steps = np.mean([episode.steps for episode in results.episodes])
            jump = f"{np.sqrt(np.mean(np.square(results.jumps))):.2f}" if results.jumps else ""
            total = len(results.episodes)
            print(
                f"| {latency} | {way} | {success} of {total} | {steps:.1f} | {jump} |", flush=True
            )


if __name__ == "__main__":
    main()
