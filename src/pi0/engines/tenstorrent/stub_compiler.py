"""A stand-in for Tenstorrent's cross compiler, for devices that never run what it builds.

TTNN compiles its kernels when they are first needed, also for a mock device, by a compiler that is
not part of the wheel. This one answers the same command lines with one empty kernel for each linker
script, built by the distribution's RISC-V compiler, and never reads a kernel's source. Nothing that
it makes may run on a device.

TTNN looks for the compiler under its runtime root. `make_root` builds such a root of links beside
the wheel, which is left as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

COMPILER = "riscv64-unknown-elf-gcc"
NAME = "riscv-tt-elf-g++"  # what TTNN calls
LINKED = ("tt_metal", "ttnn", "build", "runtime/hw")

# The loader wants an entry point at the start of .text and a relocation section.
KERNEL = """
static volatile unsigned word;
__attribute__((section(".start"), used, externally_visible))
unsigned _start(void) { return word; }
"""


def make_root(package: Path, root: Path) -> Path:
    """A runtime root at `root` for the ttnn at `package`; returns it.

    Its compiler is this file, started by this interpreter.
    """
    for name in LINKED:
        point(root / name, package / name)
    compiler = root / "runtime" / "sfpi" / "compiler" / "bin" / NAME
    compiler.parent.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).read_text(encoding="utf-8")
    temporary = compiler.with_suffix(f".{os.getpid()}")
    temporary.write_text(f"#!{sys.executable} -IS\n{source}", encoding="utf-8")
    temporary.chmod(0o755)
    temporary.replace(compiler)
    return root


def point(link: Path, target: Path) -> None:
    """A symbolic link, never missing in between: other dry runs may be reading through it."""
    if link.is_symlink() and link.readlink() == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f"{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def has_compiler() -> bool:
    return shutil.which(COMPILER) is not None


def sfpi_release(root: Path) -> dict[str, str]:
    """What the wheel or the runtime root at `root` says of the compiler that it wants."""
    lines = (root / "tt_metal" / "sfpi-version").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("=") for line in lines)
    return {name.strip(): value.strip(" '\"") for name, _, value in pairs}


def version_line(root: Path) -> str:
    """What the real compiler would say: the firmware in the wheel is filed under it."""
    release = sfpi_release(root)
    return f"{NAME} (tenstorrent/sfpi:{release['sfpi_version']}[{release['sfpi_build']}]) 15.1.0"


def link(arguments: list[str], cache: Path) -> bytes:
    """The empty kernel, linked by the linker script and options of a command line."""
    script = next(word for word in arguments if word.startswith("-T"))
    kept = [word for word in arguments if word.startswith(("-Wl,", "-L"))]
    key = hashlib.sha256("\n".join([KERNEL, script, *kept]).encode()).hexdigest()
    built = cache / f"{key[:24]}.elf"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = built.with_suffix(f".{os.getpid()}")
        words = ["-march=rv32im", "-mabi=ilp32", "-Os", "-ffreestanding", "-nostdlib", "-static"]
        words += ["-nostartfiles", *kept, "-Wl,--no-relax", script, "-x", "c", "-"]
        done = subprocess.run([COMPILER, *words, "-o", str(temporary)], input=KERNEL, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        temporary.replace(built)
    return built.read_bytes()


def write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def main() -> None:
    """Answers one command line of TTNN."""
    arguments = sys.argv[1:]
    root = Path(os.environ["TT_METAL_RUNTIME_ROOT"])
    if "--version" in arguments:
        print(version_line(root))
        return
    out = Path(arguments[arguments.index("-o") + 1])
    if "-MF" in arguments:  # what the object depends on, for the build cache
        sources = [word for word in arguments if word.endswith((".cc", ".cpp", ".c", ".S"))]
        rule = f"{out}: {' '.join(sources[-1:])}\n"
        write(Path(arguments[arguments.index("-MF") + 1]), rule.encode())
    linking = any(word.startswith("-T") for word in arguments)
    write(out, link(arguments, root / "kernels") if linking else b"an object of the stand-in\n")


if __name__ == "__main__":
    main()
