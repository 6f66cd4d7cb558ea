"""What operations do on a mock device: programs, cores, bytes and arithmetic.

Programs and cores are the library's own: its graph capture names every program that an operation
would start and the cores that its buffers lie on. Bytes and arithmetic follow from shapes.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

from pi0.engines.tenstorrent.backend import Handle
from pi0.engines.tenstorrent.device import DeviceBackend
from pi0.engines.tenstorrent.layout import TILE, tiled
from pi0.engines.tenstorrent.precision import I32, U32
from pi0.engines.tenstorrent.program_configs import TILE_BYTES
from pi0.engines.tenstorrent.time_model import Operation, least_bytes, matrix_flop

RANGE = re.compile(r"\[(\d+)-(\d+) - (\d+)-(\d+)\]")
PROGRAM = "circular_buffer_deallocate_all"  # the node with which each program begins


class Observer:
    """Notes the operations that it is shown; each kind is captured once."""

    def __init__(self, backend: DeviceBackend) -> None:
        self._backend = backend
        self._seen: dict[Any, tuple[int, int]] = {}
        self.operations: list[Operation] = []

    def __call__(
        self, name: str, args: tuple[Any, ...], options: dict[str, Any], call: Callable[[], Any]
    ) -> Any:
        """Runs an operation and returns its result."""
        given = list(self._tensors([*args, *options.values()]))
        key = (name, *(self._describe(tensor) for tensor in given))
        if key not in self._seen:
            self._seen[key] = self._capture(call)
        # Outside of captures: those give all their results one address, which some refuse.
        result = call()
        programs, cores = self._seen[key]
        kernel = options.get("compute_kernel_config")
        self.operations.append(
            Operation(
                self._backend.stage,
                name,
                programs,
                cores,
                self._moved(name, given, list(self._tensors([result]))),
                matrix_flop(name, [self._padded(tensor) for tensor in given]),
                kernel.math_fidelity.name if kernel else "",
            )
        )
        return result

    def _capture(self, call: Callable[[], Any]) -> tuple[int, int]:
        graph = importlib.import_module("ttnn.graph")
        graph.begin_graph_capture(graph.RunMode.NO_DISPATCH)
        try:
            call()
        finally:
            nodes = graph.end_graph_capture()
        return programs_and_cores(nodes)

    def _tensors(self, values: Iterable[Any]) -> Iterable[Handle]:
        for value in values:
            if isinstance(value, self._backend.ttnn.Tensor):
                yield value
            elif isinstance(value, list | tuple):
                yield from self._tensors(value)

    def _describe(self, tensor: Handle) -> tuple[Any, ...]:
        return (*self._padded(tensor), self._backend.dtype(tensor), self._in_dram(tensor))

    def _padded(self, tensor: Handle) -> tuple[int, ...]:
        shape = tuple(tensor.shape)
        if tensor.layout != self._backend.option("TILE_LAYOUT"):
            return shape
        return (*shape[:-2], tiled(shape[-2]), tiled(shape[-1]))

    def _in_dram(self, tensor: Handle) -> bool:
        kind: bool = tensor.memory_config().buffer_type == self._backend.option("BufferType.DRAM")
        return kind

    def _moved(self, name: str, given: list[Handle], made: list[Handle]) -> int:
        """Bytes over DRAM. Two operations return what they were given to write into."""
        if name == "copy":
            given = given[:1]
        if name == "experimental.indexed_fused_update_cache":
            keys, k, values, v, places = given
            written = sum(
                self._in_dram(cache) * self._bytes(rows) for cache, rows in ((keys, k), (values, v))
            )
            return written + sum(map(self._dram_bytes, (k, v, places)))
        read = [self._dram_bytes(tensor) for tensor in given]
        return least_bytes(name, read, sum(map(self._dram_bytes, made)))

    def _dram_bytes(self, tensor: Handle) -> int:
        return self._bytes(tensor) if self._in_dram(tensor) else 0

    def _bytes(self, tensor: Handle) -> int:
        elements = 1
        for length in self._padded(tensor):
            elements *= length
        dtype = self._backend.dtype(tensor)
        return elements * (4 * TILE**2 if dtype in (U32, I32) else TILE_BYTES[dtype]) // TILE**2


def programs_and_cores(nodes: list[dict[str, Any]]) -> tuple[int, int]:
    """How many programs a captured operation starts, and on how many cores at most."""
    programs = sum(node["node_type"] == PROGRAM for node in nodes)
    params = (node["params"] or {} for node in nodes)
    ranges = (each["core_range_set"] for each in params if "core_range_set" in each)
    return programs, max(map(cores_in, ranges), default=0)


def cores_in(ranges: str) -> int:
    """Cores in a set of ranges as the library writes it, x-y: {[0-0 - 10-0], [0-1 - 3-1]}."""
    corners = (map(int, corner) for corner in RANGE.findall(ranges))
    return sum((x1 - x0 + 1) * (y1 - y0 + 1) for x0, y0, x1, y1 in corners)
