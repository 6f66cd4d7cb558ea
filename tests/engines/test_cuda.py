"""Engine cuda: what is captured, on the CPU; and on a CUDA device, where there is one, all of it.

On the CPU `Graph.run` is run as it is captured, with the plain kernels; the Triton ones have tests
of their own (test_triton.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pi0.checkpoint.load import open_checkpoint
from pi0.engines.base import make_engine
from pi0.engines.fast import fp8
from pi0.engines.fast.cuda import BUCKET, choose_scheme, guard
from pi0.engines.fast.fp8 import Fp8Kernels
from pi0.engines.fast.graph import LIMIT, Call, Graph, Graphs
from pi0.engines.fast.network import Network
from pi0.engines.fast.plan import make_plan
from pi0.engines.fast.weights import pack
from pi0.errors import ConfigError, EngineError
from pi0.inputs import ModelInputs, random_inputs
from pi0.verify.compare import compare
from pi0.verify.run import default_cases

CPU = torch.device("cpu")
# Operations that wait for the device or whose result has a shape that depends on values.
WAITING = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "_unique2",
}


@pytest.fixture(scope="module")
def network(tiny_path: Path) -> Network:
    return make_network(tiny_path, "float32")


def make_network(path: Path, precision: str) -> Network:
    """As the engine makes it where there is no Triton."""
    opened = open_checkpoint(path)
    weights = fp8.finish(pack(opened, choose_scheme(opened, precision)[0]))
    return Network(weights, Fp8Kernels())


def call_of(network: Network, inputs: ModelInputs, noise: Tensor, steps: int = 3) -> Call:
    config = network.config
    plan = make_plan(inputs, config.vision.num_patches, config.suffix_len, BUCKET)
    return Call(inputs, plan, noise, steps)


@pytest.mark.parametrize("case", [0, 1], ids=["all valid", "masked"])
@pytest.mark.parametrize("cameras", [1, 3])
def test_graph_is_the_sampling_call(
    network: Network, tiny_path: Path, case: int, cameras: int
) -> None:
    engine = make_engine("reference", open_checkpoint(tiny_path))
    chosen = default_cases(network.config, cameras, tokens=9)[case]
    call = call_of(network, chosen.inputs, chosen.noise)
    with torch.inference_mode():
        actions = Graph(network, call, CPU)(call)
    result = compare(engine.sample(chosen.inputs, chosen.noise, 3), actions)
    # float32 on both sides: only the order of sums differs.
    assert result.rel_l2 < 1e-5, result


class Watch(TorchDispatchMode):
    """Names of the operations that are called; refuses those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{func} waits for the device"
        if name in ("index", "index_put"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in ("_to_copy", "copy_"):  # no value comes from the host while a graph runs
            assert (kwargs or {}).get("device") in (None, CPU)
        self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_nothing_captured_waits(network: Network) -> None:
    """And the operations, with their shapes, are the same whatever the inputs hold."""
    traces = []
    for seed, tokens in ((0, 9), (1, 12)):
        inputs, noise = random_inputs(network.config, 2, 16, seed)
        inputs.token_mask[:, tokens:] = False
        graph = Graph(network, call_of(network, inputs, noise), CPU)
        with torch.no_grad(), Watch() as watch:
            graph.run()
        traces.append(watch.seen)
    assert traces[0] == traces[1]


def test_watch_sees_what_waits() -> None:
    x = torch.arange(3)
    for waits in (lambda: int(x.sum()), lambda: x.nonzero(), lambda: x[x > 1], lambda: bool(x[0])):
        with pytest.raises(AssertionError), Watch():
            waits()


def test_one_graph_a_shape(network: Network) -> None:
    graphs = Graphs(network, CPU)
    with torch.inference_mode():
        first = call_of(network, *random_inputs(network.config, 2, 9, 0))
        other = call_of(network, *random_inputs(network.config, 1, 9, 1))
        a, b = graphs(first), graphs(other)
        assert len(graphs.kept) == 2
        assert torch.equal(graphs(first), a)
        assert torch.equal(graphs(other), b)
        assert len(graphs.kept) == 2
        for steps in range(1, LIMIT + 1):
            graphs(call_of(network, *random_inputs(network.config, 1, 9, 0), steps=steps))
        assert len(graphs.kept) == LIMIT
        assert first.shape not in graphs.kept


def test_prompts_of_a_bucket_share_a_graph(network: Network) -> None:
    """Their actions are nevertheless their own."""
    graphs, results = Graphs(network, CPU), []
    for length in (2, 5):
        inputs, noise = random_inputs(network.config, 2, 16, 0)
        inputs.token_mask[:, length:] = False
        with torch.inference_mode():
            results.append(graphs(call_of(network, inputs, noise)))
    assert len(graphs.kept) == 1
    assert not torch.equal(*results)


def test_results_and_inputs_are_the_callers(network: Network) -> None:
    """A later call writes neither into earlier actions nor into earlier inputs."""
    graphs = Graphs(network, CPU)
    calls = [call_of(network, *random_inputs(network.config, 2, 9, seed)) for seed in (0, 1)]
    before = calls[0].noise.clone(), calls[0].inputs.images.clone()
    with torch.inference_mode():
        actions = graphs(calls[0])
        kept = actions.clone()
        graphs(calls[1])
    assert torch.equal(actions, kept)
    assert torch.equal(calls[0].noise, before[0])
    assert torch.equal(calls[0].inputs.images, before[1])


def test_steps_are_checked(network: Network) -> None:
    call = call_of(network, *random_inputs(network.config, 1, 4, 0), steps=0)
    with pytest.raises(ConfigError, match="steps: expected at least 1, found 0."):
        Graphs(network, CPU)(call)


def test_what_a_tap_has_stays() -> None:
    x = torch.zeros(2)
    handed_on = guard(lambda name, value: value)("stage", x)
    handed_on.add_(1)
    assert torch.equal(x, torch.zeros(2))


def test_device_that_is_none(tiny_path: Path) -> None:
    opened = open_checkpoint(tiny_path)
    with pytest.raises(EngineError, match="expected cuda or cuda:N for engine cuda, found 'cpu'."):
        make_engine("cuda", opened, device="cpu")
    with pytest.raises(EngineError, match="expected cuda or cuda:N, found 'gpu'."):
        make_engine("cuda", opened, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="device cuda: expected .* Use|or use --engine cpu."):
            make_engine("cuda", opened)
