"""Engine cuda on the CPU: what is captured runs as it is, with the plain kernels.

Triton's kernels have tests of their own (test_triton.py), and so has what needs a CUDA device
(test_cuda_device.py).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_replays import require_replays
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pi0.bench.worker import part_times
from pi0.checkpoint.load import open_checkpoint
from pi0.config import PRESETS
from pi0.engines.base import EngineOptions, make_engine
from pi0.engines.fast.cuda import engine as cuda
from pi0.engines.fast.cuda import fp8
from pi0.engines.fast.cuda import graph as graph_module
from pi0.engines.fast.cuda.engine import BUCKET, CudaEngine, choose_scheme, guard
from pi0.engines.fast.cuda.fp8 import Fp8Kernels
from pi0.engines.fast.cuda.graph import LIMIT, Call, Graph, Graphs
from pi0.engines.fast.matrix import quantise_rows
from pi0.engines.fast.network import Network
from pi0.engines.fast.plan import make_token_plan
from pi0.engines.fast.weights import pack
from pi0.errors import ConfigError, EngineError
from pi0.inputs import ModelInputs, random_inputs
from pi0.verify.cases import default_cases
from pi0.verify.compare import compare
from pi0.verify.run import VerifyResult, verify

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
def network(each_path: Path) -> Network:
    return make_network(each_path, "float32")


def make_network(path: Path, precision: str) -> Network:
    """As the engine makes it where there is no Triton."""
    opened = open_checkpoint(path)
    weights, kernels = pack(opened, choose_scheme(opened, precision)[0]), Fp8Kernels()
    return Network(weights, kernels)


def call_of(network: Network, inputs: ModelInputs, noise: Tensor, steps: int = 3) -> Call:
    config = network.config
    plan = make_token_plan(inputs, config.vision.num_patches, config.suffix_len, BUCKET)
    return Call(inputs, plan, noise, steps)


@pytest.mark.parametrize("case", [0, 1], ids=["all valid", "masked"])
@pytest.mark.parametrize("cameras", [1, 3])
def test_graph_is_the_sampling_call(
    network: Network, each_path: Path, case: int, cameras: int
) -> None:
    engine = make_engine("reference", open_checkpoint(each_path))
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
    with pytest.raises(ConfigError, match="steps: expected 1 to 10000, found 0."):
        Graphs(network, CPU)(call)


def test_what_a_tap_has_stays() -> None:
    x = torch.zeros(2)
    handed_on = guard(lambda name, value: value)("stage", x)
    handed_on.add_(1)
    assert torch.equal(x, torch.zeros(2))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets tests have the whole engine on the CPU, where users may not."""
    monkeypatch.setattr(cuda, "find_device", lambda name: CPU)
    monkeypatch.setattr(cuda, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(cuda, "check_fp8", lambda device: None)
    monkeypatch.setattr(cuda, "choose_kernels", lambda *_: (Fp8Kernels(), []))


def verified(
    path: Path, precision: str, mode: str, change: Callable[[CudaEngine], None] = lambda _: None
) -> VerifyResult:
    opened = open_checkpoint(path)

    def candidate() -> CudaEngine:
        engine = CudaEngine(opened, EngineOptions(precision))
        change(engine)
        return engine

    return verify(
        lambda: make_engine("reference", opened),
        candidate,
        default_cases(opened.config, cameras=3, tokens=40),
        mode=mode,
        layers=True,
        steps=2,
    )


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("precision", CudaEngine.capabilities.precisions)
@pytest.mark.parametrize("mode", ["chained", "isolated"])
def test_agrees_with_the_reference(each_path: Path, precision: str, mode: str) -> None:
    """Within the limits of `pi0.verify.thresholds`, which say why."""
    assert verified(each_path, precision, mode).first_failure is None


@pytest.mark.usefixtures("on_cpu")
def test_limits_of_fp8_see_a_wrong_scale(tiny_path: Path) -> None:
    def plant(engine: CudaEngine) -> None:
        matrix = engine.network.weights.matrix("vlm.blocks.0.gate_up.0")
        assert matrix.scale is not None
        matrix.scale = matrix.scale * 1.5

    failed = verified(tiny_path, "fp8", "isolated", plant).first_failure
    assert failed is not None
    assert failed.name == "vlm_transformer.block.0"


@pytest.mark.usefixtures("on_cpu")
def test_steps_are_told_and_nan_is_refused(tiny_path: Path) -> None:
    engine = CudaEngine(open_checkpoint(tiny_path), EngineOptions("float32"))
    inputs, noise = random_inputs(engine.config, 1, 4, 0)
    told: list[None] = []
    engine.sample(inputs, noise, steps=3, on_step=lambda: told.append(None))
    assert len(told) == 3
    engine.network.weights.tensors["action_out_proj.bias"] = torch.full((32,), torch.nan)
    with pytest.raises(EngineError, match="actions: expected finite values"):
        engine.sample(inputs, noise)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("precision", CudaEngine.capabilities.precisions)
def test_replays_are_the_call(tiny_path: Path, precision: str) -> None:
    require_replays(CudaEngine(open_checkpoint(tiny_path), EngineOptions(precision)))


@pytest.mark.usefixtures("on_cpu")
def test_parts_are_timed_as_graphs(tiny_path: Path) -> None:
    """And `pi0 bench` shows these times, not those of kernels launched one by one."""
    engine = CudaEngine(open_checkpoint(tiny_path), EngineOptions("float32"))
    inputs, noise = random_inputs(engine.config, 2, 9, 0)
    prefill, vision, step = part_times(engine, inputs, noise, 3)
    assert 0 < vision < prefill
    assert step > 0
    engine.time_parts = lambda *_: (3.0, 2.0, 1.0)  # type: ignore[method-assign]
    assert part_times(engine, inputs, noise, 3) == (3.0, 2.0, 1.0)


@pytest.mark.usefixtures("on_cpu")
def test_prompts_that_stay_have_no_mask(each_path: Path) -> None:
    """A mask keeps attention from its fastest kernels. π0.5's prompts change with the state."""
    engine = CudaEngine(open_checkpoint(each_path), EngineOptions("float32"))
    inputs, _ = random_inputs(engine.config, 2, 40, 0)
    inputs.token_mask[:, 9:] = False
    plan = engine._plan(inputs)
    tokens = 2 * engine.config.vision.num_patches + 9
    if engine.config.state_tokens:
        assert plan.valid is None
        assert plan.tokens == tokens
    else:
        assert plan.valid is not None
        assert plan.tokens == -(-tokens // BUCKET) * BUCKET


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_of_attention(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never cuDNN's; in float32 the plain one alone."""
    seen, flags = [], torch.backends.cuda

    def attention(q: Tensor, *_: Any) -> Tensor:
        seen.append(
            (flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled(), flags.math_sdp_enabled())
        )
        assert not flags.cudnn_sdp_enabled()
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    before = flags.cudnn_sdp_enabled()
    q = torch.zeros(1, 3, 2, 16, dtype=dtype)
    Fp8Kernels().attend(q, q, q)
    exact = dtype == torch.float32
    assert seen == [(not exact, not exact, True)]
    assert flags.cudnn_sdp_enabled() == before


def test_every_graph_has_a_stream(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warm-up and its capture are on a stream that no other living graph was captured on."""
    current, alive = [], {}

    class Stream:
        def __init__(self, *_: Any) -> None:
            pass

        def wait_stream(self, other: Any) -> None:
            pass

    class CapturedGraph:
        def reset(self) -> None:
            del alive[self]

        def replay(self) -> None:
            assert self in alive

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    @contextmanager
    def capture(graph: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        assert ran_on[-2:] == [stream] * 2
        assert stream not in alive.values()
        alive[graph] = stream
        with on(stream):
            yield

    ran_on: list[Any] = []
    run = Graph.run
    fakes = {"Stream": Stream, "CUDAGraph": CapturedGraph, "stream": on, "graph": capture}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(Graph, "run", lambda self: (ran_on.append(current[-1]), run(self)))
    monkeypatch.setattr(graph_module, "LIMIT", 2)
    graphs = Graphs(network, torch.device("cuda"))
    graphs.device = CPU
    with torch.inference_mode(), on(Stream()):
        calls = [
            call_of(network, *random_inputs(network.config, 1, 4, 0), steps=n) for n in (1, 2, 3)
        ]
        held = []
        for call in (*calls, calls[0]):
            graphs(call)
            held.append(graphs.kept[call.shape])  # others may hold what is evicted
            assert len(alive) == len(graphs.kept) <= 2
            assert ran_on[-1] not in (current[0], graphs.spare)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton_check", "triton_kernels"):
        monkeypatch.delitem(sys.modules, f"pi0.engines.fast.cuda.{name}", raising=False)
        monkeypatch.delattr(f"pi0.engines.fast.cuda.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    scheme, _ = fp8.make_scheme(PRESETS["tiny"], 64)
    kernels, (note,) = cuda.choose_kernels(CPU, scheme, PRESETS["tiny"])
    assert type(kernels) is Fp8Kernels
    assert re.search(
        r"fused kernels cannot be used \(.*(import of|No module named '?)\W*triton", note
    )


@pytest.mark.usefixtures("on_cpu")
def test_notes_are_warnings(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "choose_kernels", lambda *_: (Fp8Kernels(), ["why"]))
    with pytest.warns(UserWarning, match="why"):
        engine = CudaEngine(open_checkpoint(tiny_path), EngineOptions("bfloat16"))
    assert engine.notes == ["why"]


def test_sizes_that_fp8_cannot_have() -> None:
    tiny = PRESETS["tiny"]
    odd = replace(tiny, vlm=replace(tiny.vlm, mlp_dim=100))
    scheme, (note,) = fp8.make_scheme(odd, 64)
    assert scheme.dtype_of("vlm.blocks.1.down.0") == torch.bfloat16
    assert "expected multiples of 16 as width and MLP size of the VLM, found 100." in note


def test_matrices_that_are_e4m3() -> None:
    for preset in PRESETS.values():
        scheme, notes = fp8.make_scheme(preset, 64)
        assert notes == []
        for name in ("vlm.blocks.1.gate_up.0", "vlm.blocks.1.down.0"):
            assert scheme.dtype_of(name) == fp8.FP8
        for name in ("vlm.blocks.1.qkv", "vlm.blocks.1.kv", "vision_tower.blocks.1.fc1"):
            assert scheme.dtype_of(name) == torch.bfloat16
        assert scheme.dtype_of("expert.blocks.1.gate_up.0") == torch.bfloat16


@pytest.mark.parametrize("dtype", [fp8.FP8, torch.int8])
def test_rows_are_quantised(dtype: torch.dtype) -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    values[1] = 0
    quantised, scale = quantise_rows(values, dtype)
    error = (quantised.float() * scale[:, None] - values).abs()
    # Half a unit of the last of 3 bits of mantissa; half a step of 127.
    limit = values.abs() / 16 + 1e-4 if dtype == fp8.FP8 else scale[:, None] * 0.501
    assert (error <= limit).all()


def test_fp8_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(EngineError, match="capability 8.9 or newer, found 8.0 .A100.. Use --dtype"):
        cuda.check_fp8(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda.check_fp8(CPU)

    def refuse(*_: Any) -> Tensor:
        raise RuntimeError("no rows")

    right = fp8.multiply
    monkeypatch.setattr(fp8, "multiply", refuse)
    with pytest.raises(EngineError, match="row-wise scaled products .*no rows.*Use --dtype"):
        cuda.check_fp8(CPU)
    # Only some sizes fail, or the numbers are wrong.
    for size in (50, 560):
        monkeypatch.setattr(
            fp8,
            "multiply",
            lambda a, matrix, size=size: refuse() if len(a.values) == size else right(a, matrix),
        )
        with pytest.raises(EngineError, match="no rows"):
            cuda.check_fp8(CPU)
    monkeypatch.setattr(fp8, "multiply", lambda a, matrix: right(a, matrix) * 1.1)
    with pytest.raises(
        EngineError, match=r".50, 16384. times .16384, 2048. is off by 0.1, more than"
    ):
        cuda.check_fp8(CPU)


def test_device_that_is_none(tiny_path: Path) -> None:
    opened = open_checkpoint(tiny_path)
    with pytest.raises(EngineError, match="expected cuda or cuda:N for engine cuda, found 'cpu'."):
        make_engine("cuda@cpu", opened)
    with pytest.raises(EngineError, match="expected cuda or cuda:N, found 'gpu'."):
        make_engine("cuda@gpu", opened)


def test_cuda_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(EngineError, match="expected a PyTorch built for CUDA, found .* Install"):
        cuda.find_device("cuda")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(EngineError, match="device cuda:2: expected one of .* found 2 of them."):
        cuda.find_device("cuda:2")
    assert cuda.find_device("cuda:1") == torch.device("cuda:1")
