"""How long the parts of a sampling call take when each is replayed as a graph of its own.

Launched one by one from Python, kernels this short would be waiting for Python most of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import torch

from pi0.engines.fast.cuda.graph import Call, Graph, capture
from pi0.engines.fast.network import Network

Run = Callable[[], None]


def make_parts(network: Network, call: Call, device: torch.device) -> dict[str, Run]:
    """What computes vision, prefill (vision included), a step and the whole call, from buffers.

    The step is one after the first, which computes the state's token besides.
    """
    graph = Graph(network, call, device)
    call = graph.call
    cache = network.prefill(call.inputs, call.plan)
    network.velocity(call.noise, graph.times[0], cache)

    def vision() -> None:
        network.embed_images(call.inputs, call.plan)

    def prefill() -> None:
        network.prefill(call.inputs, call.plan)

    def step() -> None:
        graph.actions.copy_(network.denoise(call.noise, graph.times[:1], cache))

    return {"vision": vision, "prefill": prefill, "step": step, "call": graph.run}


def time_run(run: Run, stream: torch.cuda.Stream | None, repeat: int) -> list[float]:
    """Milliseconds of each of `repeat` replays of a graph, by the device's clock.

    Args:
        stream: as for `capture`; None: no graph and the host's clock, for a CPU.
    """
    if stream is None:
        return [_host_ms(run) for _ in range(repeat)]
    captured = capture(run, stream)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    captured.replay()
    for event in events[:-1]:
        event.record()
        captured.replay()
    events[-1].record()
    torch.cuda.synchronize()
    captured.reset()
    return [start.elapsed_time(end) for start, end in pairwise(events)]


def _host_ms(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
