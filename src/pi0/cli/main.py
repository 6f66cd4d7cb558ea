"""`pi0`: the verbs, and how errors look.

Heavy imports are inside the verbs, so that `pi0 --help` costs milliseconds.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import TextIO

import typer

from pi0.cli.act import act
from pi0.cli.bench import bench
from pi0.cli.checkpoint import inspect, synth
from pi0.cli.convert import convert
from pi0.cli.demos import demos
from pi0.cli.diff import diff
from pi0.cli.doctor import doctor
from pi0.cli.eval import evaluate
from pi0.cli.forward import sample, trace
from pi0.cli.options import PluginCommand, VerbCommand
from pi0.cli.serve import serve
from pi0.cli.train import train
from pi0.cli.ttnn import app as ttnn
from pi0.cli.verify import verify
from pi0.errors import Pi0Error

OUT_OF_MEMORY = (
    "memory: expected enough for this model and these inputs, found too little; see `pi0 inspect`. "
    "Use --dtype bfloat16, fewer cameras or smaller images."
)

AGAIN = 0.05  # seconds until a signal is sent again

app = typer.Typer(
    name="pi0",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="""Run π0 (pi-zero) robot policies: camera images, a prompt and the robot's joint state
in, a chunk of 50 actions out.

Every command has examples: `pi0 act --help`. A first round:

    pi0 synth --preset small demo   # a random checkpoint, real format
    pi0 inspect demo                # what is in it
    pi0 trace demo                  # the eleven stages, one by one
    pi0 act demo --image base=examples/cameras/base.png \\
        --prompt "pick up the cube" --state "0,0,0,0,0,0,0,0"
    pi0 eval tabletop               # a trained policy, in simulation

Tab completion: `pi0 --install-completion`.""",
)

for verb in (act, trace, sample, verify, doctor, serve):
    app.command(cls=PluginCommand)(verb)
# Left-over words are given to `bench`, which says how several engines are named.
app.command(cls=PluginCommand, context_settings={"allow_extra_args": True})(bench)
app.command("eval", cls=PluginCommand)(evaluate)
app.command(cls=VerbCommand)(inspect)
app.command(cls=VerbCommand)(convert)
app.command(cls=VerbCommand)(demos)
app.command(cls=VerbCommand)(synth)
app.command(cls=VerbCommand)(diff)
app.command(cls=VerbCommand)(train)
app.add_typer(ttnn, name="ttnn")


def _version(asked: bool) -> None:
    if asked:
        from pi0 import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def main() -> None:
    """Runs the command line.

    Exit codes: 0 done; 1 engines or checkpoints do not agree, one of several failed, or a finding
    is an error; 2 bad input, one sentence on stderr; 129 its terminal was closed; 130 Ctrl-C; 141
    nobody reads stdout any more; 143 terminated.
    """
    logging.basicConfig(format="pi0: warning: %(message)s")  # to stderr, from warnings upwards
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            _require_streams()
            _run()
        except Pi0Error as error:
            _fail(str(error))
        except OSError as error:  # no such file, no permission, disk full
            _fail(f"{error.filename or 'writing'}: {error.strerror or error}.")
        except KeyboardInterrupt:
            sys.exit(130)
        except MemoryError:
            _fail(OUT_OF_MEMORY)
        except RuntimeError as error:
            if "allocate" not in str(error) and "out of memory" not in str(error):
                raise
            _fail(OUT_OF_MEMORY)


def _run() -> None:
    """Runs the verb. An error after Ctrl-C, SIGTERM or SIGHUP counts as that: torch goes on when it
    is interrupted while it imports numpy, which is half there from then on. A signal that comes
    while an object is being removed, where Python drops what is raised, is sent again."""
    ends: list[BaseException] = []
    numbers: dict[BaseException | None, int] = {}

    def end_with(end: BaseException) -> Callable[..., None]:
        def handler(number: int, _: object) -> None:
            if number == signal.SIGHUP and ends:  # a terminal sends it twice
                return
            ends.append(end)
            numbers[end] = number
            raise end

        return handler

    def on_unraisable(dropped: sys.UnraisableHookArgs) -> None:
        if dropped.exc_value not in ends:
            hook(dropped)
            return
        ends.clear()
        threading.Timer(AGAIN, os.kill, (os.getpid(), numbers[dropped.exc_value])).start()

    hook, sys.unraisablehook = sys.unraisablehook, on_unraisable
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_with(KeyboardInterrupt()))
    signal.signal(signal.SIGTERM, end_with(SystemExit(143)))  # so that nothing half-written stays
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, end_with(SystemExit(129)))
    try:
        app(prog_name="pi0")
    except Exception as error:
        if ends:
            raise ends[0] from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook


def _require_streams() -> None:
    """Refuses a closed stdout; a closed stderr or stdin reads and writes nothing.

    Otherwise a file opened later would get the number of stdout or stderr, and with it whatever a
    library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end
    if sys.stdout is None:
        raise Pi0Error(
            "stdout: expected it open, found it closed. Discard what is printed with >/dev/null."
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a π where the terminal has none


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _print_error(f"warning: {message}")


def _fail(sentence: str) -> None:
    _print_error(sentence)
    sys.exit(2)


def _print_error(sentence: str) -> None:
    with contextlib.suppress(OSError):  # nowhere left to say it
        print(f"pi0: {sentence}", file=sys.stderr)
