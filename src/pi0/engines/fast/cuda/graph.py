"""The whole sampling call, prefill and every step, as one CUDA graph per shape.

A graph knows of the world only buffers: its inputs are copied in before a replay, the actions are
copied out after it. What is captured launches the same kernels at the same addresses whatever the
inputs hold, waits for nothing and looks at no value; tests/engines/test_cuda.py holds it to that.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pi0.engines.fast.network import Network
from pi0.engines.fast.plan import TokenPlan, copy
from pi0.inputs import ModelInputs

LIMIT = 4  # graphs that are kept: a robot has few prompts and one set of cameras
WARM_UP = 2  # runs before a capture, in which libraries allocate and Triton compiles


@dataclass(frozen=True)
class Call:
    """Arguments of a sampling call, all on one device: noise is [B, horizon, action_dim] float32.

    The plan is one with a bucket.
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

    def run(self) -> None:
        """Actions from what is in the buffers. This is what is captured."""
        call = self.call
        cache = self.network.prefill(call.inputs, call.plan)
        self.actions.copy_(self.network.denoise(call.noise, self.times, cache))

    def capture(self, pool: Any) -> None:
        """Records `run` on the current CUDA device, with memory from a pool of
        `torch.cuda.graph_pool_handle`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.run()
        self.captured = graph

    def __call__(self, call: Call) -> Tensor:
        """Actions [B, horizon, action_dim] on the CPU of a call of this shape."""
        for buffer, value in zip(self.call.tensors, call.tensors, strict=True):
            buffer.copy_(value)
        if self.captured is None:
            self.run()
        else:
            self.captured.replay()
        return self.actions.to("cpu", copy=True)


class Graphs:
    """The graphs of the shapes that were called last; on the CPU they run without capture.

    They share memory between them: no two run at once, and each writes what it reads.
    """

    def __init__(self, network: Network, device: torch.device) -> None:
        self.network = network
        self.device = device
        self.kept: dict[Hashable, Graph] = {}  # the one used last is last
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, call: Call) -> Tensor:
        """Actions [B, horizon, action_dim] on the CPU."""
        graph = self.kept.pop(call.shape, None) or self._make(call)
        self.kept[call.shape] = graph
        return graph(call)

    def _make(self, call: Call) -> Graph:
        if len(self.kept) == LIMIT:
            del self.kept[next(iter(self.kept))]
        graph = Graph(self.network, call, self.device)
        if self.device.type == "cuda":
            graph.capture(self.pool)
        return graph
