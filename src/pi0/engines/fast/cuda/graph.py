"""The whole sampling call, prefill and every step, as one CUDA graph per shape.

A graph knows of the world only buffers: its inputs are copied in before a replay, the actions are
copied out after it. What is captured launches the same kernels at the same addresses whatever the
inputs hold, waits for nothing and looks at no value; tests/engines/test_cuda.py holds it to that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from pi0.engines.fast.network import Network
from pi0.engines.fast.plan import TokenPlan, copy
from pi0.inputs import ModelInputs

LIMIT = 8  # graphs that are kept: a robot has few prompts and one set of cameras
WARM_UP = 2  # runs before a capture, in which libraries allocate and Triton compiles


@dataclass(frozen=True)
class Call:
    """Arguments of a sampling call, all on one device.

    Attributes:
        noise: [B, horizon, action_dim] float32.
    """

    inputs: ModelInputs
    plan: TokenPlan
    noise: Tensor
    steps: int

    @property
    def tensors(self) -> list[Tensor]:
        plan = (value for value in vars(self.plan).values() if isinstance(value, Tensor))
        return [*vars(self.inputs).values(), *plan, self.noise]

    @property
    def shape(self) -> Hashable:
        """Equal for calls that one graph serves."""
        return tuple(tensor.shape for tensor in self.tensors), self.steps

    def copy(self, device: torch.device) -> Call:
        inputs, plan = copy(self.inputs, device), copy(self.plan, device)
        return Call(inputs, plan, self.noise.to(device, copy=True), self.steps)


class Graph:
    """The sampling call at the shape of a first call.

    Attributes:
        call: the buffers that are read.
        actions: the buffer that is written, [B, horizon, action_dim] float32.
    """

    def __init__(self, network: Network, call: Call, device: torch.device) -> None:
        self.network = network
        self.call = call.copy(device)
        self.actions = torch.empty_like(self.call.noise)
        self.times = network.step_times(call.steps)
        self.captured: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None

    def run(self) -> None:
        """Actions from what is in the buffers. This is what is captured."""
        call = self.call
        cache = self.network.prefill(call.inputs, call.plan)
        self.actions.copy_(self.network.denoise(call.noise, self.times, cache))

    def capture(self, stream: torch.cuda.Stream) -> None:
        """Makes calls replays of `run`; `stream` as for `capture`."""
        self.captured, self.stream = capture(self.run, stream), stream

    def release(self) -> torch.cuda.Stream | None:
        """Gives the stream back. What was captured is destroyed, also where others still hold it:
        PyTorch then clears the stream's workspaces, which the next graph is not to share."""
        if self.captured is not None:
            self.captured.reset()
        stream, self.captured, self.stream = self.stream, None, None
        return stream

    def __call__(self, call: Call) -> Tensor:
        """Actions [B, horizon, action_dim] on the CPU of a call of this shape."""
        for buffer, value in zip(self.call.tensors, call.tensors, strict=True):
            buffer.copy_(value)
        if self.captured is None:
            self.run()
        else:
            self.captured.replay()
        return self.actions.to("cpu", copy=True)


def capture(run: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """Records what a function launches on the current CUDA device.

    Args:
        stream: one that no other living graph was captured on: cuBLAS's workspaces belong to a
            stream, and go when a graph of that stream is destroyed (pytorch#193402).
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may allocate meanwhile, as one does that fetches images.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph


class Graphs:
    """The graphs of the shapes that were called last; on the CPU they run without capture.

    Each has a stream and memory of its own.

    Attributes:
        spare: a stream that none of them has; None on the CPU.
    """

    def __init__(self, network: Network, device: torch.device) -> None:
        self.network = network
        self.device = device
        self.kept: dict[Hashable, Graph] = {}  # the one used last is last
        cuda = device.type == "cuda"
        self.free = [torch.cuda.Stream(device) for _ in range(LIMIT)] if cuda else []
        self.spare = torch.cuda.Stream(device) if cuda else None

    def __call__(self, call: Call) -> Tensor:
        """Actions [B, horizon, action_dim] on the CPU."""
        graph = self.kept.pop(call.shape, None) or self._make(call)
        self.kept[call.shape] = graph
        return graph(call)

    def _make(self, call: Call) -> Graph:
        if len(self.kept) == LIMIT:
            stream = self.kept.pop(next(iter(self.kept))).release()
            if stream is not None:
                self.free.append(stream)
        graph = Graph(self.network, call, self.device)
        if self.free:
            graph.capture(self.free[-1])
            self.free.pop()
        return graph
