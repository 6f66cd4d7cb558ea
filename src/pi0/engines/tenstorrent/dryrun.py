"""A dry run: the whole model on TTNN's mock device, where every operation is checked and none runs.

Operations are validated, their programs built and laid out in the memory of the board's cores, and
tensors allocated in its DRAM. Kernels are neither compiled nor executed, so a dry run says that the
model fits and that TTNN takes it, and nothing about its numbers: what is read back is zeros.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from pi0.checkpoint.load import empty_model
from pi0.config import Pi0Config
from pi0.engines.tenstorrent import stub_compiler, ttnn_import
from pi0.engines.tenstorrent.backend import Handle, Upload
from pi0.engines.tenstorrent.boards import find_board
from pi0.engines.tenstorrent.constants import Constants, upload_constants
from pi0.engines.tenstorrent.device import DeviceBackend
from pi0.engines.tenstorrent.engine import (
    build_network,
    most_rows,
    require_dram,
    require_short_suffix,
    require_tile_widths,
)
from pi0.engines.tenstorrent.layout import TileLayout
from pi0.engines.tenstorrent.network import TtnnNetwork
from pi0.engines.tenstorrent.observer import Observer
from pi0.engines.tenstorrent.precision import PRESETS
from pi0.engines.tenstorrent.replay import Inputs
from pi0.engines.tenstorrent.time_model import (
    LAUNCH_SECONDS,
    PEAKS,
    Operation,
    Peaks,
    StageTime,
    stage_times,
)
from pi0.engines.tenstorrent.timestep import put_timesteps
from pi0.errors import EngineError
from pi0.inputs import random_inputs
from pi0.model.flow import schedule

# Refuses results of one capture, which have all one address. It holds two tiles of a core's memory.
UNMEASURED = "experimental.indexed_fused_update_cache"


@dataclass(frozen=True)
class DryRun:
    """What a dry run found.

    Attributes:
        grid: compute cores, x by y.
        prefix, suffix: tokens of one observation, padding included.
        batch: observations.
        programs: different ones that were built.
        peak_l1: bytes of the fullest core's memory.
        l1: bytes of it that tensors and buffers can have.
        weights, peak_dram, dram: bytes that weights take, that are taken at most, that there are.
        host_seconds: that this machine took for the first pass, which builds the programs, and for
            the second. They say nothing of a card.
        times: arithmetic of each stage and of the call, see `StageTime`.
        launch_us: the cost of starting a program in it.
        peaks: of the chip in it, and where they are from.
    """

    board: str
    dtype: str
    grid: tuple[int, int]
    prefix: int
    suffix: int
    batch: int
    programs: int
    peak_l1: int
    l1: int
    weights: int
    peak_dram: int
    dram: int
    host_seconds: tuple[float, float]
    times: list[StageTime]
    launch_us: float
    peaks: Peaks


def dry_run(
    config: Pi0Config,
    board: str = "n150",
    dtype: str = "accurate",
    cameras: int = 2,
    tokens: int | None = None,
    steps: int = 1,
    on_stage: Callable[[str], None] = lambda _: None,
    batch: int = 1,
) -> DryRun:
    """Runs a prefix and denoising steps of a model of this configuration on a mock board.

    One board a process. Weights have shapes only.

    Raises:
        EngineError: no such board or preset, no ttnn or no stand-in compiler, weights that do not
            fit, or an operation that TTNN rejects (the sentence names the stage).
    """
    if dtype not in PRESETS:
        raise EngineError(f"dtype: expected one of {', '.join(PRESETS)}, found {dtype!r}.")
    precision = PRESETS[dtype]
    require_tile_widths(config)
    require_short_suffix(config)
    if not 1 <= batch <= most_rows(config):
        raise EngineError(
            f"batch: expected 1 to {most_rows(config)}, which are computed at once, found {batch}."
        )
    started = time.perf_counter()
    backend = MockBackend(board, on_stage)
    try:
        require_dram(config, precision, backend.dram()[1])
        network = build_network(empty_model(config, torch.bfloat16), backend, precision)
        weights, _ = backend.dram()
        layout = TileLayout(config, cameras, tokens or config.max_tokens, batch)
        on, inputs = upload_inputs(layout, network, backend)
        times = torch.tensor(schedule(steps), device="meta")
        timesteps = put_timesteps(network.weights.time, times, precision, backend.put)

        def call() -> Handle:
            inputs.move()  # as a replay does, which is more than a call by itself
            return network.sample(on, inputs.given, timesteps)

        backend.get(call())
        first = time.perf_counter() - started
        programs = backend.device.num_program_cache_entries()
        before, dram = backend.dram()
        second, peak_l1, more = backend.measure(call)
        peaks = PEAKS[backend.arch.name]
        rows = stage_times(backend.observe(call), peaks)
        return DryRun(
            board,
            dtype,
            (backend.grid.x, backend.grid.y),
            layout.prefix,
            layout.suffix,
            batch,
            programs,
            peak_l1,
            backend.l1(),
            weights,
            before + more,
            dram,
            (first, second),
            rows,
            LAUNCH_SECONDS * 1e6,
            peaks,
        )
    finally:
        backend.close()


def upload_inputs(
    layout: TileLayout, network: TtnnNetwork, backend: MockBackend
) -> tuple[Constants, Inputs]:
    """What a sampling call is given. Shapes only: masks may be larger than the model."""
    one, noise = random_inputs(layout.config, layout.views, layout.tokens, seed=0)
    precision, same = network.ops.precision, torch.zeros(layout.batch, dtype=torch.int64)
    backend.stage = "inputs"
    with torch.device("meta") as meta:
        inputs, x_t = one.rows(same).to(meta), noise[same].to(meta)
        on = upload_constants(layout, network.weights, precision, backend)
        uploads = layout.uploads(inputs, precision) | {"x_t": layout.actions(x_t)}
    return on, Inputs(backend, uploads)


class MockBackend(DeviceBackend):
    """A board that is not there."""

    def __init__(self, board: str, on_stage: Callable[[str], None]) -> None:
        self._stage, self._on_stage = "", on_stage
        self._observer: Observer | None = None
        self._measuring = False
        found = find_board(board)
        ttnn_import.require_ttnn()
        if not stub_compiler.has_compiler():
            raise EngineError(
                f"dry run: expected {stub_compiler.COMPILER} as a stand-in for Tenstorrent's "
                "compiler, found none. Install it: apt install gcc-riscv64-unknown-elf."
            )
        folder = ttnn_import.cache_folder()
        package = ttnn_import.package_folder()
        root = stub_compiler.make_root(package, folder / f"root-{ttnn_import.VERSION}")
        (folder / "logs").mkdir(exist_ok=True)
        environment = {
            ttnn_import.MOCK: str(found.write(folder)),
            "TT_METAL_RUNTIME_ROOT": str(root),
            "TT_METAL_CACHE": str(folder / f"kernels-{ttnn_import.VERSION}"),
            "TT_METAL_LOGS_PATH": str(folder / "logs"),
        }
        super().__init__(ttnn_import.load(environment), 0)

    @property
    def stage(self) -> str:
        return self._stage

    @stage.setter
    def stage(self, name: str) -> None:
        self._stage = name
        self._on_stage(name)

    def l1(self) -> int:
        """Bytes of a core's memory that tensors and buffers can have."""
        view = self.ttnn.get_memory_view(self.device, self.option("BufferType.L1"))
        size: int = view.total_bytes_per_bank
        return size

    def measure(self, call: Callable[[], Any]) -> tuple[float, int, int]:
        """Seconds of a call, its peak of L1 in a core and of DRAM in bytes (but `UNMEASURED`)."""
        graph = importlib.import_module("ttnn.graph")
        graph.begin_graph_capture(graph.RunMode.NO_DISPATCH)
        started = time.perf_counter()
        self._measuring = True
        call()
        self._measuring = False
        seconds = time.perf_counter() - started
        nodes = graph.end_graph_capture()
        peak_l1: int = graph.extract_resource_usage_per_core(nodes).peak_total
        return seconds, peak_l1, peak_dram(nodes)

    def put(self, upload: Upload) -> Handle:
        """Room for a tensor: uploaded ones are of another mesh, which some operations refuse."""
        return super().put(replace(upload, value=upload.value.to("meta")))

    def run(self, name: str, *args: Any, dtype: str | None = None, **options: Any) -> Any:
        def call() -> Any:
            return super(MockBackend, self).run(name, *args, dtype=dtype, **options)

        if self._measuring and name == UNMEASURED:
            return None
        return self._observer(name, args, options, call) if self._observer else call()

    def observe(self, call: Callable[[], Any]) -> list[Operation]:
        """The operations of a call."""
        self._observer = Observer(self)
        try:
            call()
            return self._observer.operations
        finally:
            self._observer = None


def peak_dram(nodes: list[dict[str, Any]]) -> int:
    """Bytes of DRAM that a captured call holds at most beyond what was there."""
    sign = {"buffer_allocate": 1, "buffer_deallocate": -1}
    held = peak = 0
    for node in nodes:
        if node["node_type"] in sign and node["params"]["type"] == "DRAM":
            held += sign[node["node_type"]] * int(node["params"]["size"])
            peak = max(peak, held)
    return peak
