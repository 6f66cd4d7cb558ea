"""How much memory this process can still get, and an error in a sentence where that is too little.

Asked before the work, since Linux kills a process that runs out half way. Reads what the kernel
reports of the machine and of the control groups that containers are limited by; elsewhere than on
Linux it reports nothing, and nothing is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pi0.errors import ConfigError, human_bytes

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
# Version 2, then version 1: limit, usage, and the prefix of totals in memory.stat.
CGROUP_FILES = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def require_memory(needed: int, what: str) -> None:
    """Compares what the work needs at least with what is free.

    Args:
        needed: bytes; a lower bound, so that nothing is refused that would run.
        what: the work, as in "memory: expected enough for …".

    Raises:
        ConfigError: less is free.
    """
    available = available_bytes()
    if available is not None and needed > available:
        raise ConfigError(
            f"memory: expected enough for {what}: at least {human_bytes(needed)}, found "
            f"{human_bytes(available)} free. Use bfloat16, fewer cameras or tokens, or smaller "
            "images."
        )


def available_bytes() -> int | None:
    """Bytes that this process can get, swap included; None if the system does not report it."""
    machine = _table(PROC / "meminfo")
    if "MemAvailable:" not in machine:
        return None
    swap = machine.get("SwapFree:", 0)
    free = min([machine["MemAvailable:"], *_free_in_groups()])
    return free + swap


def _free_in_groups() -> Iterator[int]:
    """What each control group that this process is in leaves: its limit less its use, of which the
    file cache can be given back."""
    for folder in _groups():
        for limit_file, usage_file, prefix in CGROUP_FILES:
            limit, usage = _number(folder / limit_file), _number(folder / usage_file)
            if limit is not None and usage is not None:
                stat = _table(folder / "memory.stat")
                cache = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
                yield max(0, limit - usage + cache)


def _groups() -> Iterator[Path]:
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        group = root / path.lstrip("/")
        yield group
        yield from (parent for parent in group.parents if parent.is_relative_to(root))


def _number(path: Path) -> int | None:
    """None for a file that is not there, or that says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _table(path: Path) -> dict[str, int]:
    """Lines such as "MemAvailable: 21051064 kB" or "active_file 4096", in bytes."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {
        words[0]: int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
        for words in lines
        if len(words) > 1 and words[1].isdigit()
    }
