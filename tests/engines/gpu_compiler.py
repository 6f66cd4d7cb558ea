"""Triton's compiler for GPUs that are not there: what a kernel takes of each, by name.

Kernels are specialised as a launch does it (divisible by 16, equal to 1), which decides about loads
and shared memory; only the launch is left out.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget

# Bytes of shared memory that one program may have, by compute capability (CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability": the most per thread block).
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@dataclass(frozen=True)
class Compiled:
    """A kernel for one GPU.

    Attributes:
        shared: bytes of shared memory.
        stack: bytes of a thread's stack, which is where registers that do not suffice go.
        registers: of a thread.
        ptx: the code before that of the machine.
    """

    name: str
    shared: int
    stack: int
    registers: int
    ptx: str


class Driver:
    """As much of a driver as the compiler asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(capability: int, folder: Path) -> Iterator[list[Compiled]]:
    """What is launched inside is compiled for a compute capability (89 for 8.9), and listed.

    Args:
        folder: an empty one, for machine code.
    """
    compiled: dict[str, Compiled] = {}
    run = triton.JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made = run(kernel, *args, grid=grid, warmup=True, **options)
        if made.hash not in compiled:
            compiled[made.hash] = describe(kernel.__name__, made, folder / "kernel.cubin")
            listed.append(compiled[made.hash])

    listed: list[Compiled] = []
    before = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(Driver(capability))
    try:
        with patch.object(triton.JITFunction, "run", compile_only):
            yield listed
    finally:
        vars(triton.runtime.driver).clear()
        vars(triton.runtime.driver).update(before)


def describe(name: str, made: Any, path: Path) -> Compiled:
    path.write_bytes(made.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def dump(option: str) -> str:
        command = [tools / "cuobjdump", option, path]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    usage = dict(re.findall(r"(REG|STACK):(\d+)", dump("-res-usage")))
    return Compiled(
        name, made.metadata.shared, int(usage["STACK"]), int(usage["REG"]), made.asm["ptx"]
    )
