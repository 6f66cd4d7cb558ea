"""What TTNN generated for a compute kernel: formats of its buffers, fidelity, sums."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# tt-metal's DataFormat and MathFidelity, by number.
FORMATS = {0: "Float32", 4: "Tf32", 5: "Float16_b", 6: "Bfp8_b"}
FIDELITIES = {0: "LoFi", 2: "HiFi2", 3: "HiFi3", 4: "HiFi4"}


@dataclass(frozen=True)
class Descriptor:
    """A compute kernel as it was compiled.

    Attributes:
        kernel: its name.
        memory, registers: format of each of its buffers, and in which its operands are unpacked.
        float32_sums: whether the register of sums holds float32.
    """

    kernel: str
    memory: tuple[str, ...]
    registers: tuple[str, ...]
    fidelity: str
    float32_sums: bool


def read_descriptors(cache: Path) -> set[Descriptor]:
    """Those of all compute kernels in a cache of kernels."""
    found = set()
    for path in cache.rglob("chlkc_descriptors.h"):
        text = path.read_text(encoding="utf-8")
        fidelity = re.search(r"MathFidelity>\((\d)\)", text)
        sums = re.search(r"DST_ACCUM_MODE = (\w+)", text)
        if fidelity and sums:
            memory, registers = (formats(text, f"unpack_{part}_format") for part in ("src", "dst"))
            number = int(fidelity[1])
            kernel = path.parents[1].name
            of = Descriptor(kernel, memory, registers, FIDELITIES[number], sums[1] == "true")
            found.add(of)
    return found


def formats(text: str, name: str) -> tuple[str, ...]:
    listed = re.search(name + r"\[\d+\] = \{([^}]*)\}", text)
    assert listed
    numbers = (int(number) for number in listed[1].split(","))
    return tuple(FORMATS[number] for number in numbers if number != 255)
