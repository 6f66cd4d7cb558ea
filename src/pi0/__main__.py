"""Where `pi0` and `python -m pi0` begin: Ctrl-C is quiet from here on."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Runs the command line. Exit codes: see `pi0.cli.main.main`."""
    # Python's handler raises, which the import system may print and swallow. Nothing has begun
    # yet that would need cleaning up. Where Ctrl-C is ignored (nohup), it stays ignored.
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from pi0.cli.main import main as run

    if heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
