"""How long a call takes at least: arithmetic from what a dry run saw, no measurement.

An operation takes at least as long as its bytes take over DRAM, and as its multiplications take on
the cores that it uses. Operations follow each other, so that bounds of a call add up. Beside that
stands what it costs to start programs, at a stated cost of each.

What is not in it: traffic between cores, unpacking and packing, activations, softmax, what is
read twice, and what operations on few cores read through few of the memory's channels. A card is
slower than this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from statistics import median_low

# Of one core a clock with the least fidelity: an 8 × 16 block by a 16 × 16 block, a multiplication
# and an addition each (docs of tt-metal, tech report on the matrix engine). Each further pass over
# the mantissas takes as long again.
FLOP_PER_CLOCK = 4096
PASSES = {"LoFi": 1, "HiFi2": 2, "HiFi3": 3, "HiFi4": 4}

# Seconds from one captured program to the next. Assumed: no card was at hand to measure it.
LAUNCH_SECONDS = 5e-6
FEW_CORES = 8  # an operation on fewer leaves nearly all of a chip idle


@dataclass(frozen=True)
class Peaks:
    """What one chip can do.

    Attributes:
        dram: bytes a second.
        clock: of the compute cores, in Hz.
        source: where the figures are from.
    """

    dram: float
    clock: float
    source: str

    def flops(self, fidelity: str, cores: int) -> float:
        """Operations a second of some cores."""
        return cores * FLOP_PER_CLOCK * self.clock / PASSES[fidelity]


PEAKS = {
    "WORMHOLE_B0": Peaks(
        288e9, 1.0e9, "docs.tenstorrent.com: Wormhole, 288 GB/s of DRAM a chip, 1.0 GHz"
    ),
    "BLACKHOLE": Peaks(
        512e9, 1.35e9, "docs.tenstorrent.com: Blackhole p150, 512 GB/s of DRAM, 1.35 GHz"
    ),
}


@dataclass(frozen=True)
class Operation:
    """One operation of a call.

    Attributes:
        stage, name: what the network was computing, and the operation's name in TTNN.
        programs: that it starts; 0 if it only looks at a tensor in another way.
        cores: that its programs use, at most.
        dram: bytes of operands and results in DRAM, each counted once.
        flop: multiplications and additions of matrix products, padding included.
        fidelity: of these; empty where there are none.
    """

    stage: str
    name: str
    programs: int
    cores: int
    dram: int
    flop: int
    fidelity: str


@dataclass(frozen=True)
class StageTime:
    """Sums over the operations of a stage, or of a whole call.

    Attributes:
        programs: that are started; `on_few_cores` of them on fewer than `FEW_CORES`.
        cores: median over programs.
        dram, flop: bytes and operations.
        dram_ms, math_ms: what these take at the chip's peak, the latter on the cores that each
            operation uses.
        bound_ms: lower bound: of each operation the larger of the two, added up.
        launch_ms: programs at `LAUNCH_SECONDS` each.
        limit: what the largest of `dram_ms`, `math_ms` and `launch_ms` is.
    """

    stage: str
    programs: int
    on_few_cores: int
    cores: int
    dram: int
    flop: int
    dram_ms: float
    math_ms: float
    bound_ms: float
    launch_ms: float
    limit: str


def stage_times(operations: Iterable[Operation], peaks: Peaks) -> list[StageTime]:
    """One row for each stage in the order of their first operation, and one for the call."""
    operations = list(operations)
    order = list(dict.fromkeys(operation.stage for operation in operations))
    by_stage = sorted(operations, key=lambda operation: order.index(operation.stage))
    rows = [
        _sum(stage, list(group), peaks)
        for stage, group in groupby(by_stage, key=lambda operation: operation.stage)
    ]
    return [*rows, _sum("call", operations, peaks)]


def _sum(stage: str, operations: list[Operation], peaks: Peaks) -> StageTime:
    started = [operation for operation in operations if operation.programs]
    times = [_seconds(operation, peaks) for operation in started]
    cores = [operation.cores for operation in started for _ in range(operation.programs)]
    milliseconds = {
        "DRAM": sum(memory for memory, _ in times) * 1e3,
        "math": sum(multiplying for _, multiplying in times) * 1e3,
        "launches": len(cores) * LAUNCH_SECONDS * 1e3,
    }
    return StageTime(
        stage,
        programs=len(cores),
        on_few_cores=sum(n < FEW_CORES for n in cores),
        cores=median_low(cores) if cores else 0,
        dram=sum(operation.dram for operation in started),
        flop=sum(operation.flop for operation in started),
        dram_ms=milliseconds["DRAM"],
        math_ms=milliseconds["math"],
        bound_ms=sum(map(max, times)) * 1e3,
        launch_ms=milliseconds["launches"],
        limit=max(milliseconds, key=lambda name: milliseconds[name]),
    )


def _seconds(operation: Operation, peaks: Peaks) -> tuple[float, float]:
    """At least, for its bytes and for its arithmetic."""
    multiplying = 0.0
    if operation.flop:
        multiplying = operation.flop / peaks.flops(operation.fidelity, max(operation.cores, 1))
    return operation.dram / peaks.dram, multiplying


def matrix_flop(name: str, shapes: list[tuple[int, ...]]) -> int:
    """Multiplications and additions of an operation on tensors of these padded shapes."""
    if "minimal_matmul" in name:  # by itself, in parts, and with a sum
        (*outer, k), (_, n) = shapes[:2]
        return 2 * math.prod(outer) * k * n
    if name == "transformer.scaled_dot_product_attention":
        (batch, heads, queries, width), (_, _, keys, _) = shapes[:2]
        return 2 * 2 * batch * heads * queries * keys * width
    return 0


def least_bytes(name: str, read: list[int], written: int) -> int:
    """Bytes that an operation reads and writes at least, of operands of these bytes in DRAM: a
    look-up reads no more than it gives."""
    if name == "embedding":
        read = [min(each, written) for each in read]
    return sum(read) + written
