"""Compiles `rows.c` and `products.c` with the machine's C compiler, once, and loads it.

Threads are those of PyTorch's own OpenMP: those of a second one would compete for the cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from pi0.checkpoint.outputs import replacing

HEADER, *SOURCES = (Path(__file__).with_name(name) for name in ("native.h", "rows.c", "products.c"))
# Flags in /proc/cpuinfo; one of these sets is needed.
INSTRUCTIONS = ({"avx512_vnni"}, {"avx2", "fma"})
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=c11"),
    *("-ffast-math", "-fno-finite-math-only"),  # NaN and infinity survive
)

Argument = Tensor | int | float | None


class NativeUnavailable(Exception):
    """Why there is no native library here."""


class Native:
    """The functions of the C files; see there. Arguments are tensors, numbers and None.

    Attributes:
        zero: what is added to quantised values: 128 where bytes have no sign, else 0.

    Raises:
        NativeUnavailable: this machine cannot compile or run them.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(_compile()))
        self.zero = ctypes.c_int32.in_dll(self._library, "zero").value

    def __call__(self, name: str, *arguments: Argument) -> None:
        self._library[name](*map(_word, arguments))


def _word(argument: Argument) -> ctypes.c_int64 | ctypes.c_float | ctypes.c_void_p:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if argument is None:
        return ctypes.c_void_p(None)
    assert argument.is_contiguous()
    return ctypes.c_void_p(argument.data_ptr())


def _compile() -> Path:
    """The library, compiled unless it has been already on a machine like this one.

    Raises:
        NativeUnavailable: another processor, no compiler, no OpenMP, or the compiler fails.
    """
    processor = _processor()
    if not any(needed <= set(processor.split()) for needed in INSTRUCTIONS):
        raise NativeUnavailable("the processor has neither AVX512-VNNI nor AVX2 with FMA")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NativeUnavailable("no C compiler was found (cc, or what CC names)")
    openmp = _openmp()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    texts = [path.read_text() for path in (HEADER, *SOURCES)]
    parts = [*texts, " ".join(FLAGS), version, str(openmp), processor]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = home / "pi0" / f"native-{key}.so"
    if not library.exists():
        with replacing(library) as temporary:
            objects = [temporary.with_suffix(f".{source.stem}.o") for source in SOURCES]
            try:
                for source, out in zip(SOURCES, objects, strict=True):
                    _run(compiler, *FLAGS, "-c", str(source), "-o", str(out))
                link = [*map(str, objects), str(openmp), "-lm"]
                _run(compiler, "-shared", *link, "-o", str(temporary))
            finally:
                for out in objects:
                    out.unlink(missing_ok=True)
    return library


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        output = done.stderr.strip().splitlines()
        raise NativeUnavailable(f"{words[0]} failed: {output[0] if output else 'without output'}")


def _openmp() -> Path:
    """The OpenMP library that PyTorch has loaded."""
    torch.get_num_threads()
    maps = Path("/proc/self/maps")
    loaded = [line.split()[-1] for line in maps.read_text().splitlines()] if maps.exists() else []
    for path in loaded:
        if "libgomp" in path or "libiomp5" in path or "libomp" in path:
            return Path(path)
    raise NativeUnavailable("PyTorch has loaded no OpenMP library here")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith("flags")), "")
