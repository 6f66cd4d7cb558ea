"""pi0 itself: `pi0 sample`, with a stopwatch and its peak memory."""

from __future__ import annotations

import sys

from exchange import parse_task

from pi0 import __version__
from pi0.cli.main import main as command_line
from pi0.engines.base import Engine


def main() -> None:
    task = parse_task(__doc__)
    Engine.sample = task.timed(Engine.sample)  # type: ignore[method-assign]
    files = [str(task.checkpoint), "--inputs", str(task.inputs), "--out", str(task.out)]
    sys.argv = ["pi0", "sample", *files, "--dtype", task.dtype]
    try:
        command_line()
    except SystemExit as end:
        if end.code:
            raise
    task.finish(f"pi0 {__version__}")


if __name__ == "__main__":
    main()
