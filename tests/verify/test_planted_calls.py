"""Planted bugs of how calls are made: which inputs take part, what is kept from one call to the
next, several observations at once, and the loop; and of how weights become int8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from planted import VISION, VLM, Plant, check_plant, trained_like, verified
from torch import Tensor

from pi0.checkpoint.load import Checkpoint
from pi0.engines.base import Engine
from pi0.engines.fast import matrix, network, weights
from pi0.engines.fast.cpu import engine as cpu
from pi0.engines.fast.cpu.native_kernels import NativeKernels
from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.matrix import Matrix
from pi0.engines.fast.network import Cache, Network
from pi0.engines.fast.plan import TokenPlan, make_token_plan
from pi0.inputs import ModelInputs
from pi0.model import flow

Patch = pytest.MonkeyPatch


def planned(change: Callable[[ModelInputs], ModelInputs]) -> Any:
    """Which tokens take part is decided from other inputs."""

    def plant(patch: Patch) -> None:
        make = make_token_plan
        patch.setattr(cpu, "make_token_plan", lambda inputs, *sizes: make(change(inputs), *sizes))

    return plant


def counted(name: str) -> Any:
    """As many as are valid, from the first on."""

    def change(inputs: ModelInputs) -> ModelInputs:
        mask = getattr(inputs, name)
        first = torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)
        return replace(inputs, **{name: first})

    return planned(change)


def looked_at(**looks: Callable[[Tensor], Tensor]) -> Any:
    """A prefix is taken for the same if these parts of its inputs are."""

    def plant(patch: Patch) -> None:
        def same(self: ModelInputs, other: ModelInputs) -> bool:
            names = [name for name in vars(self) if name != "state"]
            parts = (
                (looks.get(n, torch.clone)(getattr(x, n)) for x in (self, other)) for n in names
            )
            return all(torch.equal(a, b) for a, b in parts)

        patch.setattr(ModelInputs, "same_prefix", same)

    return plant


def state_token_kept(patch: Patch) -> None:
    patch.setattr(Cache, "with_state", lambda self, state: replace(self, state=state.clone()))


def buffers_shared(patch: Patch) -> None:
    """Keys and values of every prefix of one length are in the same place."""
    prefill = Network.prefill

    def shared(self: Network, *arguments: Any) -> Cache:
        cache = prefill(self, *arguments)
        for name in ("keys", "values"):
            place = self.__dict__.setdefault(f"{name} {cache.keys[0].shape}", getattr(cache, name))
            for old, new in zip(place, getattr(cache, name), strict=True):
                old.copy_(new)
            setattr(cache, name, place)
        return cache

    patch.setattr(Network, "prefill", shared)


def times_kept(patch: Patch) -> None:
    """Of another number of steps."""

    def kept(self: Network, steps: int) -> Tensor:
        if self._step_times is None:
            self._step_times = self.times(torch.tensor(flow.schedule(steps)))
        return self._step_times[:steps]

    patch.setattr(Network, "step_times", kept)


def first(x: Tensor) -> Tensor:
    """The first row for all."""
    return x[:1].expand_as(x).contiguous()


def noise_of_the_first_row(patch: Patch) -> None:
    denoise = Network.denoise
    patch.setattr(Network, "denoise", lambda self, noise, *more: denoise(self, first(noise), *more))


def noise_of_one_row(patch: Patch) -> None:
    """In int8, × 1.05."""
    denoise = Network.denoise

    def changed(self: Network, noise: Tensor, *more: Any) -> Tensor:
        coarse = any(matrix.scale is not None for matrix in self.weights.matrices.values())
        factor = torch.ones(len(noise), 1, 1)
        factor[1:2] += 0.05 * coarse
        return denoise(self, noise * factor, *more)

    patch.setattr(Network, "denoise", changed)


def state_of_the_first_row(patch: Patch) -> None:
    embed = Network._embed_suffix
    patch.setattr(
        Network,
        "_embed_suffix",
        lambda self, x, time, state: embed(self, x, time, None if state is None else first(state)),
    )


def attended(change: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor, Any]]) -> Any:
    """In the trunks."""

    def plant(patch: Patch) -> None:
        attend = NativeKernels.attend

        def changed(self: Any, q: Tensor, k: Tensor, v: Tensor, valid: Any = None) -> Tensor:
            return attend(self, q, *(change(k, v, valid) if k.shape[2] == 1 else (k, v, valid)))

        patch.setattr(NativeKernels, "attend", changed)

    return plant


def positions_of_the_first_row(patch: Patch) -> None:
    make = make_token_plan

    def plan(*arguments: Any) -> TokenPlan:
        made = make(*arguments)
        return replace(made, positions=first(made.positions))

    patch.setattr(cpu, "make_token_plan", plan)


def rows_alike(least: int) -> Any:
    """Values of the first row in a batch of so many whose rows need no mask."""

    def change(k: Tensor, v: Tensor, valid: Any) -> tuple[Tensor, Tensor, Any]:
        return k, first(v) if valid is None and len(v) >= least else v, valid

    return attended(change)


def state_of_zeros(patch: Patch) -> None:
    """Taken for none."""
    embed = Network._embed_suffix

    def changed(self: Network, x: Tensor, time: Tensor, state: Tensor | None) -> Tensor:
        missing = state is not None and not state.any()
        return embed(self, x, time, torch.ones_like(state) if missing else state)

    patch.setattr(Network, "_embed_suffix", changed)


def time_at_least(least: float) -> Any:
    embed = network.embed_time
    return lambda patch: patch.setattr(
        network, "embed_time", lambda t, width: embed(t.clamp(min=least), width)
    )


def loop(step: Callable[[Tensor, Tensor, int], Tensor], only: str = "") -> Any:
    """Another step than Euler's: (x, v, steps) → x; perhaps in one precision alone."""

    def plant(patch: Patch) -> None:
        denoise = Network.denoise

        def changed(self: Network, noise: Tensor, times: Tensor, cache: Cache, *on: Any) -> Tensor:
            coarse = any(matrix.scale is not None for matrix in self.weights.matrices.values())
            if only and not coarse:
                return denoise(self, noise, times, cache, *on)
            x = noise
            for time in times:
                x = step(x, self.velocity(x, time, cache), len(times))
            return x

        patch.setattr(Network, "denoise", changed)

    return plant


def schedule(times: Callable[[int], list[float]]) -> Any:
    return lambda patch: patch.setattr(network, "schedule", times)


def added_up(steps: int) -> list[float]:
    t, times = torch.tensor(1.0), []
    for _ in range(steps):
        times.append(float(t))
        t = t - torch.tensor(1 / steps)
    return times


def packed(name: str, change: Callable[[Matrix], None]) -> Callable[[Engine], None]:
    """In a quantised matrix of the candidate alone."""

    def changed(engine: Engine) -> None:
        assert isinstance(engine, cpu.CpuEngine)
        matrix = engine.network.weights.matrix(name)
        assert matrix.scale is not None
        matrix.weight, matrix.scale = matrix.weight.clone(), matrix.scale.clone()
        change(matrix)

    return changed


def neighbours_scale(matrix: Matrix) -> None:
    assert matrix.scale is not None
    matrix.scale = matrix.scale.roll(1)


def scaled(rows: slice, factor: float) -> Callable[[Matrix], None]:
    def change(matrix: Matrix) -> None:
        assert matrix.scale is not None
        matrix.scale[rows] *= factor

    return change


def one_byte(matrix: Matrix) -> None:
    matrix.weight.view(-1)[77] += 3


def stale_tile(matrix: Matrix) -> None:
    matrix.weight[0] = matrix.weight[1]


def bias_dropped(matrix: Matrix) -> None:
    assert matrix.bias is not None
    matrix.bias = torch.zeros_like(matrix.bias)


def norm_scaled(engine: Engine) -> None:
    """In the candidate alone."""
    assert isinstance(engine, cpu.CpuEngine)
    tensors = engine.network.weights.tensors
    tensors[NORM] = tensors[NORM] * 1.001


def quantised(limit: int, round_: Callable[[Tensor], Tensor]) -> Any:
    """Weights to so many steps; in plain rows, which native code quantises itself."""

    def plant(patch: Patch) -> None:
        def rows(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            largest = values.abs().amax(dim=1).float()
            return round_(values * (limit / largest)[:, None]).to(dtype), largest / limit

        patch.setattr(matrix, "quantise_rows", rows)
        patch.setattr(NativeKernels, "lay_out", Kernels.lay_out)

    return plant


def last(x: Tensor) -> Tensor:
    return x[:, -1]


TOGETHER = "sample.together"
CALLS = [
    Plant("masked cameras taken to be the last", VISION, counted("image_mask")),
    Plant("text mask taken for a length", f"{VLM}.keys", counted("token_mask")),
    Plant("only the last camera looked at", "sample.first_image", looked_at(images=last)),
    Plant("only the last word looked at", "sample.first_token", looked_at(tokens=last)),
    Plant("length looked at", "sample.other_token_mask", looked_at(token_mask=torch.sum)),
    Plant("state token of another state", "sample.state", state_token_kept),
    Plant("prefixes share their place", "velocity.kept", buffers_shared),
    Plant("times of another number of steps", "sample.first", times_kept),
    Plant("mask of a batch ignored", TOGETHER, attended(lambda k, v, valid: (k, v, None))),
    Plant("keys of the first row", TOGETHER, attended(lambda k, v, _: (first(k), first(v), _))),
    Plant("noise of the first row", TOGETHER, noise_of_the_first_row),
    Plant("state of the first row", TOGETHER, state_of_the_first_row),
    Plant("positions of the first row", TOGETHER, positions_of_the_first_row),
    Plant("values of the first row, of rows alike", "sample.alike", rows_alike(2)),
    Plant("values of the first row, of three", "sample.alike", rows_alike(3)),
    Plant("state of zeros taken for none", "sample.zero_state", state_of_zeros),
    Plant("time of 1e-3 at least", "velocity.end", time_at_least(1e-3)),
    Plant("sign of the step", "sample", loop(lambda x, v, n: x + v / n)),
    Plant("a step more in the size", "sample", loop(lambda x, v, n: x - v / (n + 1))),
    Plant("x in bfloat16", "sample", loop(lambda x, v, n: (x - v / n).bfloat16().float())),
    Plant("times added up in float32", "sample", schedule(added_up)),
    Plant("times that reach 0", "sample", schedule(lambda n: torch.linspace(1, 0, n).tolist())),
]
QUICK = (
    "masked cameras taken to be the last",
    "only the last camera looked at",
    "prefixes share their place",
    "mask of a batch ignored",
    "values of the first row, of rows alike",
    "state of zeros taken for none",
    "time of 1e-3 at least",
)
NORM = "vision_tower.blocks.0.norm2.weight"
DOWN, STEP, WEIGHT = "vlm.blocks.0.down.0", f"{VLM}.weight_step", f"{VLM}.weight"
OF_INT8 = [
    Plant("scales of neighbours", STEP, change=packed(DOWN, neighbours_scale)),
    Plant("scale of one channel × 1.05", STEP, change=packed(DOWN, scaled(slice(5, 6), 1.05))),
    Plant("scales of one matrix × 1.005", STEP, change=packed(DOWN, scaled(slice(None), 1.005))),
    Plant("one weight off", WEIGHT, change=packed("vlm.blocks.0.qkv", one_byte)),
    Plant("one tile of another", WEIGHT, change=packed("vlm.blocks.0.o_proj", stale_tile)),
    Plant("bias", f"{VISION}.bias", change=packed("vision_tower.blocks.0.fc2", bias_dropped)),
    Plant("norm × 1.001", f"{VISION}.parameters", change=norm_scaled),
    Plant("six bits", f"{VISION}.weight_step", quantised(31, torch.round)),
    Plant("weights cut off", f"{VISION}.weight", quantised(127, torch.trunc)),
    Plant("step of the loop × 1.004", "loop", loop(lambda x, v, n: x - 1.004 * v / n, only="int8")),
    Plant("noise of one row × 1.05", "loop.together", noise_of_one_row),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return trained_like(tmp_path_factory.mktemp("trained_like"))


@pytest.mark.parametrize(
    ("precision", "plant"),
    [
        pytest.param(
            precision,
            plant,
            marks=() if precision == "float32" and plant.name in QUICK else pytest.mark.slow,
            id=f"{precision}-{plant.name}",
        )
        for precision in ("float32", "int8")
        for plant in CALLS
    ],
)
def test_planted(checkpoint: Checkpoint, precision: str, plant: Plant, monkeypatch: Patch) -> None:
    check_plant(checkpoint, f"cpu:{precision}", plant, monkeypatch)


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(plant, marks=() if i == 1 else pytest.mark.slow, id=plant.name)
        for i, plant in enumerate(OF_INT8)
    ],
)
def test_planted_in_int8(checkpoint: Checkpoint, plant: Plant, monkeypatch: Patch) -> None:
    check_plant(checkpoint, "cpu:int8", plant, monkeypatch)


def test_bias_of_keys_has_no_effect(checkpoint: Checkpoint, monkeypatch: Patch) -> None:
    """q · (k + b) adds the same to all logits of a query, which softmax does not see: to drop it is
    no mistake, and no comparison of results can find it."""
    put = weights._put

    def without(into: Any, target: Any, rows: slice, values: Tensor, bias: bool) -> None:
        keys = target.at == into.config.vision.width and target.matrix.endswith("qkv")
        put(into, target, rows, values * 0 if bias and keys else values, bias)

    reference = verified(checkpoint, "cpu:float32")
    assert reference.first_failure is None
    monkeypatch.setattr(weights, "_put", without)
    assert verified(checkpoint, "cpu:float32").first_failure is None
