"""Is engine cuda right, and how fast: `python benchmarks/gpu/parts.py CKPT --out parts.json`.

For every precision, in one load: actions beside the float32 reference on the same device, then the
times of vision, prefill, a step and the whole call, each replayed as a graph, and of `Graphs`, with
inputs from the CPU and actions back. Last the eager reference, for the speed-up.
"""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from common import attempt, make_call, make_network, make_parser, make_stream, show, write
from torch import Tensor

from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.engines.base import make_engine
from pi0.engines.fast.cuda.graph import Call, Graphs
from pi0.engines.fast.cuda.parts import make_parts, time_run

PRECISIONS = ("bfloat16", "fp8", "float32")
CAMERAS, TOKENS, STEPS = (2, 3), 16, 10
SEEDS = 3
EAGER_CALLS = 5


class Parts:
    """One checkpoint on one device; `result` grows as it goes."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, repeat: int) -> None:
        self.checkpoint, self.device, self.repeat = checkpoint, device, repeat
        self.calls = {
            (cameras, seed): make_call(checkpoint.config, cameras, TOKENS, STEPS, seed)
            for cameras in CAMERAS
            for seed in range(SEEDS)
        }
        self.wanted: dict[tuple[int, int], Tensor] = {}
        self.result: dict[str, Any] = {"accuracy": [], "times": [], "notes": {}}

    def reference(self, precision: str) -> None:
        """Its actions in float32 are what others are compared with; its time is eager."""
        spec = f"reference:{precision}@{self.device.type}"
        with make_engine(spec, self.checkpoint) as engine:
            for (cameras, seed), call in self.calls.items():
                actions = engine.sample(call.inputs, call.noise, STEPS)
                if precision == "float32":
                    self.wanted[cameras, seed] = actions
                else:
                    self.add_accuracy(f"eager {precision}", cameras, seed, actions)
            for cameras in CAMERAS:
                call, times = self.calls[cameras, 0], []
                for _ in range(EAGER_CALLS):
                    start = time.perf_counter()
                    engine.sample(call.inputs, call.noise, STEPS)
                    times.append((time.perf_counter() - start) * 1e3)
                self.add_times(f"eager {precision}", cameras, "call from the CPU", times)
        clean()

    def precision(self, precision: str) -> None:
        start = time.perf_counter()
        network, notes = make_network(self.checkpoint, precision, self.device)
        load_s = time.perf_counter() - start
        self.result["notes"][precision] = [*notes, f"packed in {load_s:.1f} s"]
        graphs = Graphs(network, self.device)
        for (cameras, seed), call in self.calls.items():
            self.add_accuracy(precision, cameras, seed, graphs(call))
        for cameras in CAMERAS:
            self.time_call(graphs, self.calls[cameras, 0], precision, cameras)
        del graphs, network
        clean()

    def time_call(self, graphs: Graphs, call: Call, precision: str, cameras: int) -> None:
        stream = make_stream(self.device)
        for part, run in make_parts(graphs.network, call, self.device).items():
            self.add_times(precision, cameras, part, time_run(run, stream, self.repeat))
        times = []
        for i in range(self.repeat):
            images = call.inputs.images.roll(i, dims=-1)
            other = replace(call, inputs=replace(call.inputs, images=images))
            start = time.perf_counter()
            graphs(other)
            times.append((time.perf_counter() - start) * 1e3)
        self.add_times(precision, cameras, "call from the CPU", times)

    def add_accuracy(self, precision: str, cameras: int, seed: int, actions: Tensor) -> None:
        """Error as a part of how far the model moved the noise."""
        wanted, noise = self.wanted[cameras, seed], self.calls[cameras, seed].noise
        error = float((actions - wanted).norm() / (wanted - noise).norm())
        row = {"precision": precision, "cameras": cameras, "seed": seed, "error": error}
        self.result["accuracy"].append(row)

    def add_times(self, precision: str, cameras: int, part: str, times: list[float]) -> None:
        row = {"precision": precision, "cameras": cameras, "part": part, "median ms": median(times)}
        row["p99 ms"] = sorted(times)[min(len(times) - 1, int(0.99 * len(times)))]
        self.result["times"].append(row)


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@torch.inference_mode()
def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("checkpoint")
    options = parser.parse_args()
    device = torch.device(options.device)
    parts = Parts(open_checkpoint(options.checkpoint), device, 3 if options.tiny else 100)
    parts.reference("float32")
    for run, precision in (
        *((parts.precision, precision) for precision in PRECISIONS),
        (parts.reference, "bfloat16"),
    ):
        failed = attempt(lambda run=run, precision=precision: run(precision))
        if failed:
            parts.result["notes"].setdefault(precision, []).append(failed)
            print(precision, failed)
        write(options.out, parts.result)
    print(*show(parts.result["accuracy"]), sep="\n")
    print(*show(parts.result["times"]), sep="\n")
    print(parts.result["notes"])


if __name__ == "__main__":
    main()
