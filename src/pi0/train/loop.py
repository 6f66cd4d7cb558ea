"""A run from its first step to its last: steps, logs, checkpoints, and stopping in between.

OUT/checkpoints/001000/   a checkpoint as every engine reads it (moving average of the weights)
OUT/last                  a link to the newest
OUT/training_state.pt     weights, moving average and optimizer, from which `--resume` goes on
OUT/log.jsonl, loss.png, tensorboard/
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi0.checkpoint.outputs import remove_temporaries, require_writable
from pi0.data.lock import locked
from pi0.errors import ConfigError
from pi0.train.log import Entry, TrainingLog
from pi0.train.prepare import Run
from pi0.train.save import STATE_FILE, load_state, save_state

CHECKPOINTS, LAST = "checkpoints", "last"
FOREIGN = ("*.safetensors", "config.json", "meta/info.json")  # what a run does not write


@dataclass
class LoopOptions:
    """How often a run speaks and saves, in steps; `keep`: newest checkpoints kept, 0: all."""

    log_every: int = 100
    save_every: int = 1000
    keep: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: how many steps were taken.
        checkpoint: the newest.
        signal: that stopped it; None: it is done.
    """

    step: int
    checkpoint: Path
    signal: int | None


def train(
    run: Run,
    out: Path,
    settings: dict[str, Any],
    options: LoopOptions,
    resume: bool = False,
    on_step: Callable[[dict[str, float]], None] = lambda _: None,
    on_log: Callable[[Entry], None] = lambda _: None,
) -> Outcome:
    """Trains until the last step, SIGTERM or Ctrl-C, which are answered after the step at hand.

    Args:
        settings: what the run was asked for, as plain data; a run resumes only as itself, or with
            more steps.
        on_step, on_log: called in the first process with what a step or an interval gave.

    Raises:
        Pi0Error: a loss is not finite, a place cannot be written, or a state to resume from does
            not fit. Checkpoints that were written before stay.
    """
    require_folder(out, resume)
    trainer, processes = run.trainer, run.trainer.processes
    if processes.first:
        remove_temporaries(out)
    steps = trainer.optimizer_options.steps
    if resume:
        state = load_state(out / STATE_FILE)
        _require_same(state["settings"], settings)
        trainer.restore(state)
        if processes.first:
            _drop_later(out, trainer.done)
        before = int(state["settings"].get("steps", steps))
        if before < steps and processes.first:
            rate = trainer.optimizer_options.rate(trainer.done)
            warnings.warn(
                f"--resume: steps: expected {before}, with which the run began, found {steps}. "
                f"From step {trainer.done} on the learning rate is that of a run of {steps} steps, "
                f"{rate:.3g}.",
                stacklevel=2,
            )
    if processes.first:
        # At the least: weights, the optimizer's two moments, the moving average.
        kept = 4 if trainer.average else 3
        size = kept * sum(p.nbytes for p in trainer.parameters.values())
        require_writable(out / STATE_FILE, size=size)
    log = (
        TrainingLog(out, trainer.done, trainer.samples.options.batch_size)
        if processes.first
        else None
    )
    with _signals() as received:
        while trainer.done < steps:
            metrics = trainer.step()
            done = trainer.done
            stop = processes.any(bool(received))
            if log:
                log.add(metrics)
                on_step(metrics)
                if done % options.log_every == 0 or done == steps or stop:
                    on_log(log.write(done))
            if done % options.save_every == 0 or done == steps or stop:
                save(run, out, settings, options.keep)
                if log:
                    log.plot()
            if stop:
                break
    if log:
        log.close()
    number = received[0] if received and trainer.done < steps else None
    return Outcome(trainer.done, checkpoint_path(out, trainer.done), number)


def require_folder(out: Path, resume: bool) -> None:
    """Raises ConfigError if a new run would write into another's folder, or into a checkpoint or
    dataset, or there is none to resume."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: expected a folder for the run, found a file. Name another one.")
    others = [path for name in FOREIGN for path in out.glob(name)]
    if others:
        raise ConfigError(
            f"{out}: expected a folder for the run, found one with {others[0].relative_to(out)}, a "
            "checkpoint or dataset. Name another folder."
        )
    state, written = (out / STATE_FILE).is_file(), bool(_checkpoints(out))
    if resume and not state:
        raise ConfigError(
            f"{out}: expected a run to resume, found no {STATE_FILE}. "
            + ("Begin another run in another folder." if written else "Leave out --resume.")
        )
    if not resume and (state or written):
        remedy = "Go on with --resume" if state else "It was killed while it saved: delete it"
        raise ConfigError(
            f"{out}: expected a folder without a run, found one. {remedy}, or name another folder."
        )


@contextlib.contextmanager
def keep_folder(out: Path, first: bool) -> Iterator[None]:
    """Keeps other runs out of a folder, and removes one that the block made if it fails before
    there is a checkpoint; the first process does both.

    Raises:
        Pi0Error: another run has it, or it cannot be made.
    """
    made = not out.exists()
    with locked(out) if first else contextlib.nullcontext():
        try:
            yield
        except BaseException:
            if made and first and not (out / LAST).exists():
                shutil.rmtree(out, ignore_errors=True)
            raise


def _checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, by step."""
    folder = out / CHECKPOINTS
    found = [p for p in folder.iterdir() if p.name.isdecimal()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def save(run: Run, out: Path, settings: dict[str, Any], keep: int = 0) -> None:
    """Writes a checkpoint, then the state to resume from; every process calls it."""
    trainer = run.trainer
    weights, state = trainer.exported(), trainer.state()
    if trainer.processes.first:
        folder = checkpoint_path(out, trainer.done)
        run.export.write(folder, weights)
        _link(out / LAST, folder)
        save_state(out / STATE_FILE, {**state, "settings": settings})
        for old in _checkpoints(out)[:-keep] if keep else []:
            shutil.rmtree(old)
    trainer.processes.wait()


def checkpoint_path(out: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return out / CHECKPOINTS / f"{step:06d}"


def _drop_later(out: Path, done: int) -> None:
    """Removes checkpoints that were written without the state to go on from: the run may go on with
    other learning rates."""
    later = [path for path in _checkpoints(out) if int(path.name) > done]
    if later:
        _link(out / LAST, checkpoint_path(out, done))
    for path in later:
        shutil.rmtree(path)


def _link(path: Path, target: Path) -> None:
    """A relative link in place of the one before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.relative_to(path.parent))
    temporary.replace(path)


def _require_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in {**before, **now}:
        longer = name == "steps" and int(now.get(name, 0)) > int(before.get(name, 0))
        if before.get(name) != now.get(name) and not longer:
            raise ConfigError(
                f"--resume: {name}: expected {before.get(name, 'nothing')}, with which the run "
                f"began, found {now.get(name, 'nothing')}. Resume with the same options, or begin "
                "another run, which may start from a checkpoint of this one."
            )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted; a second one ends the process as usual."""
    received: list[int] = []
    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
