"""What eight bits cost: `python benchmarks/int8.py CKPT`.

Error of actions with some of the matrices in int8, same inputs and noise, by what the float32 model
moved: ‖a − a_ref‖ / ‖a_ref − noise‖. Then all of them in int8, with remedies for outliers beside
each other (`pi0 synth --statistics flat --outliers 30` makes a checkpoint that has them), and in
bfloat16.

Eight bits are simulated: values are rounded to what int8 and its scales can hold, products are
float32. So all remedies are tried with the same code, those that the engine has and the others.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.engines.fast.equalise import find_equalisers
from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.matrix import INT8_MAX, Matrix
from pi0.engines.fast.network import Network
from pi0.engines.fast.plan import make_token_plan
from pi0.engines.fast.weights import PackedWeights, Scheme, pack
from pi0.inputs import random_inputs
from pi0.verify.compare import displacement_error

GROUPS = {
    "vision attention": r"vision_tower\..*\.(qkv|out_proj)",
    "vision MLP": r"vision_tower\..*\.fc.",
    "projector": "projector",
    "VLM attention": r"vlm\..*\.(qkv|kv|o_proj)",
    "VLM gate and up": r"vlm\..*\.gate_up\..*",
    "VLM down": r"vlm\..*\.down\..*",
    "expert attention": r"expert\..*\.(qkv|o_proj)",
    "expert gate and up": r"expert\..*\.gate_up\..*",
    "expert down": r"expert\..*\.down\..*",
}
INT8 = Scheme(torch.float32, {".*": torch.int8})
OUTLIER = 3.0  # a column is one if its activations are this many times as large as usual
FINER = 1 / 32  # the largest share of columns that are


class Simulated(Kernels):
    """Rounds what some matrices are multiplied with, and these.

    Attributes:
        names: of matrices, by identity.
        group: values that share a scale, of a row; None: all of them.
        finer: columns that stay float32, by matrix.
        seen: largest mean squares of activations [K] so far, by matrix.
    """

    def __init__(
        self,
        weights: PackedWeights,
        pattern: str = "",
        group: int | None = None,
        finer: dict[str, Tensor] | None = None,
        dtype: torch.dtype = torch.int8,
    ) -> None:
        self.names = {id(matrix): name for name, matrix in weights.matrices.items()}
        self.pattern, self.group, self.finer, self.dtype = pattern, group, finer or {}, dtype
        self.seen: dict[str, Tensor] = {}
        for name, matrix in weights.matrices.items():
            if re.fullmatch(pattern, name):
                matrix.weight = self.rounded(matrix.weight, name)

    def operand(self, x: Tensor, into: Matrix) -> Tensor:
        name = self.names[id(into)]
        square = x.square().mean(0)
        self.seen[name] = torch.maximum(square, self.seen.get(name, square))
        return self.rounded(x, name) if re.fullmatch(self.pattern, name) else x

    def rounded(self, x: Tensor, name: str) -> Tensor:
        if self.dtype != torch.int8:
            return x.to(self.dtype).float()
        kept = self.finer.get(name)
        rest = x if kept is None else x.index_fill(1, kept, 0)
        groups = x.shape[1] // self.group if self.group and x.shape[1] % self.group == 0 else 1
        parts = rest.reshape(len(x), groups, -1)
        step = parts.abs().amax(-1, keepdim=True).clamp_min(1e-30) / INT8_MAX
        out = ((parts / step).round() * step).view_as(x)
        return out if kept is None else out.index_copy(1, kept, x[:, kept])


def outlier_columns(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns with the largest activations, by matrix."""
    found = {}
    for name, square in seen.items():
        count = int((square > OUTLIER**2 * square.mean()).sum())
        count = min(count, max(1, int(FINER * len(square))))
        if count:
            found[name] = square.argsort(descending=True)[:count]
    return found


def folded(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Scales that leave every norm's largest channels 1: all of a norm goes into its readers."""
    found = {}
    for norm, tensor in pack(checkpoint, Scheme(torch.float32)).tensors.items():
        if re.fullmatch(r"(vision_tower|vlm|expert)\.blocks\.\d+\.norm[12]\.weight", norm):
            found[norm.removesuffix(".weight")] = tensor.abs().clamp_min(1e-3)
    return found


@torch.inference_mode()
def actions(
    weights: PackedWeights, kernels: Kernels, seeds: int, tokens: int
) -> list[tuple[Tensor, Tensor]]:
    """(noise, actions) of some seeds."""
    config, network = weights.config, Network(weights, kernels)
    inputs, _ = random_inputs(config, 3, tokens, 0)
    plan = make_token_plan(inputs, config.vision.num_patches, config.suffix_len)
    cache, times = network.prefill(inputs, plan), network.step_times(10)
    shape = 1, config.horizon, config.action_dim
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(seeds)]
    return [(noise, network.denoise(noise, times, cache)) for noise in noises]


def rows(checkpoint: Checkpoint, seeds: int, tokens: int) -> Iterator[tuple[str, float]]:
    """What is rounded, and the largest error."""
    scales = {norm: found.scale for norm, found in find_equalisers(checkpoint, INT8).items()}

    def sampled(
        moved: dict[str, Tensor], **options: Any
    ) -> tuple[list[tuple[Tensor, Tensor]], Any]:
        weights = pack(checkpoint, Scheme(torch.float32), scales=moved)
        kernels = Simulated(weights, **options)
        return actions(weights, kernels, seeds, tokens), kernels.seen

    def run(moved: dict[str, Tensor] | None = None, **options: Any) -> float:
        pairs = zip(exact, sampled(moved or {}, **options)[0], strict=True)
        return max(displacement_error(a, b, noise) for (noise, a), (_, b) in pairs)

    exact, seen = sampled({})
    columns = outlier_columns(seen)
    for name, pattern in GROUPS.items():
        yield name, run(pattern=pattern)
    yield "all", run(pattern=".*")
    yield f"all, {len(scales)} norms smoothed", run(scales, pattern=".*")
    yield "all, norms folded into matrices", run(folded(checkpoint), pattern=".*")
    yield "all, a scale for 64 inputs", run(pattern=".*", group=64)
    finer = f"all, columns of outliers in float32 ({len(columns)} matrices)"
    yield finer, run(pattern=".*", finer=columns)
    yield "all in bfloat16", run(pattern=".*", dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=9)
    parser.add_argument("--remedies", action="store_true", help="leave out the single groups")
    args = parser.parse_args()
    if args.remedies:
        GROUPS.clear()
    print(f"worst of {args.seeds} noises\n\n| in int8 | displacement error |\n|---|---|")
    for name, error in rows(open_checkpoint(args.checkpoint), args.seeds, args.tokens):
        print(f"| {name} | {100 * error:.2f} % |", flush=True)


if __name__ == "__main__":
    main()
