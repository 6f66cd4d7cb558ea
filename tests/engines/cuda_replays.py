"""What test_cuda.py tries on the CPU and test_cuda_device.py on a CUDA device."""

from __future__ import annotations

import torch

from pi0.engines.fast.cuda import engine as cuda
from pi0.engines.fast.cuda.engine import CudaEngine
from pi0.inputs import random_inputs


def require_replays(engine: CudaEngine) -> None:
    """Replays are the call bit for bit: the same kernels in the same order. Two shapes take turns,
    with a graph each."""
    calls = [random_inputs(engine.config, cameras, 20, cameras) for cameras in (2, 1)]
    first = [engine.sample(*call) for call in calls]
    graphs = list(engine.graphs.kept.values())
    for _ in range(3):
        assert all(map(torch.equal, first, [engine.sample(*call) for call in calls]))
    assert list(engine.graphs.kept.values()) == graphs
    for graph, actions in zip(graphs, first, strict=True):
        # Buffers that were made in inference mode are written in it, too.
        with torch.inference_mode(), cuda.on_device(engine.device):
            graph.actions.zero_()
            graph.run()
        assert torch.equal(graph.actions.cpu(), actions)
