"""What each step of engine `cpu` gains: `python benchmarks/steps.py CKPT [--dtype float32]`.

Takes one step back at a time and measures a sampling call, in turn with all others.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pi0.checkpoint.load import open_checkpoint
from pi0.engines.base import EngineOptions
from pi0.engines.fast.cpu import engine as cpu
from pi0.engines.fast.cpu.engine import CpuEngine
from pi0.engines.fast.cpu.int8 import Int8Kernels
from pi0.engines.fast.cpu.native_kernels import NativeKernels
from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.network import Cache, Network
from pi0.inputs import ModelInputs, random_inputs
from pi0.model.flow import integrate

CAMERAS, VALID_TOKENS, STEPS = 3, 9, 10
UNSPLIT = 2**31


class TorchAttention(NativeKernels):
    attend = Kernels.attend


class TorchRotation(NativeKernels):
    split = Kernels.split


class StateInEveryStep(Network):
    def velocity(self, x_t: Tensor, t: Tensor, cache: Cache, *_: object) -> Tensor:
        cache.has_state_token = False
        return super().velocity(x_t, t, cache)


class TimeInEveryStep(Network):
    def denoise(self, noise: Tensor, times: Tensor, cache: Cache, *_: object) -> Tensor:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.velocity(x, self.times(t), cache)

        return integrate(velocity, noise, len(times))


def sample(engine: CpuEngine, inputs: ModelInputs, noise: Tensor, again: bool = False) -> float:
    """Seconds of a call, with other pictures than the last one's or with the same `again`."""
    if again:
        engine.sample(inputs, noise, 1)
    else:
        inputs.images.copy_(inputs.images.roll(1, dims=-1))
    start = time.perf_counter()
    engine.sample(inputs, noise, STEPS)
    return time.perf_counter() - start


def variants(path: Path, dtype: str) -> dict[str, Callable[[ModelInputs, Tensor], float]]:
    checkpoint = open_checkpoint(path)
    engine = CpuEngine(checkpoint, EngineOptions(dtype))
    kernels = engine.network.kernels
    assert isinstance(kernels, NativeKernels)

    network, native = engine.network, kernels.native

    def on(other: Network) -> Callable[[ModelInputs, Tensor], float]:
        def run(inputs: ModelInputs, noise: Tensor) -> float:
            engine.network = other
            try:
                return sample(engine, inputs, noise)
            finally:
                engine.network = network

        return run

    found = {
        "as it is": lambda inputs, noise: sample(engine, inputs, noise),
        "padding computed, too": lambda inputs, noise: sample(engine, all_valid(inputs), noise),
        "same images and prompt": lambda inputs, noise: sample(engine, inputs, noise, True),
        "state token in every step": on(StateInEveryStep(network.weights, kernels)),
        "time in every step": on(TimeInEveryStep(network.weights, kernels)),
        "attention by PyTorch": on(Network(network.weights, TorchAttention(native))),
        "rotary embedding by PyTorch": on(Network(network.weights, TorchRotation(native))),
    }
    if dtype == "int8":  # three models of it fit in memory
        scheme = cpu.SCHEMES[dtype]
        cpu.SCHEMES[dtype] = dataclasses.replace(scheme, mlp_chunk=UNSPLIT)
        whole = CpuEngine(checkpoint, EngineOptions(dtype))
        cpu.SCHEMES[dtype] = scheme
        found["MLPs not in parts"] = lambda inputs, noise: sample(whole, inputs, noise)
        original = cpu.choose_kernels
        cpu.choose_kernels = Int8Kernels
        plain = CpuEngine(checkpoint, EngineOptions(dtype))
        cpu.choose_kernels = original
        found["all by PyTorch"] = lambda inputs, noise: sample(plain, inputs, noise)
    return found


def all_valid(inputs: ModelInputs) -> ModelInputs:
    return dataclasses.replace(inputs, token_mask=torch.ones_like(inputs.token_mask))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", default="int8", choices=("float32", "int8"))
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    runs = variants(args.checkpoint, args.dtype)
    config = open_checkpoint(args.checkpoint).config
    inputs, noise = random_inputs(config, CAMERAS, config.max_tokens, 0)
    inputs.token_mask[:, VALID_TOKENS:] = False
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(inputs, noise)  # does not count
    for _ in range(args.repeat):
        for name, run in runs.items():
            times[name].append(run(inputs, noise))
    base = min(times["as it is"])  # what disturbs only adds
    print(f"| {args.dtype} | seconds, median (least to most) | least, more by |\n|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{median:.2f} ({min(values):.2f} to {max(values):.2f})"
        print(f"| {name} | {spread} | {min(values) / base - 1:.1%} |")


if __name__ == "__main__":
    main()
