"""Conformance of an engine: what it declares, computes and promises to threads.

Knows no engine but the reference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.engines.base import Engine, EngineOptions, make_engine
from pi0.engines.registry import check_declarations
from pi0.errors import EngineError, Pi0Error
from pi0.inputs import ModelInputs, random_inputs
from pi0.model.flow import SAMPLERS
from pi0.verify.cases import default_cases
from pi0.verify.compare import compare
from pi0.verify.run import verify
from pi0.verify.thresholds import limits_of, looser, threshold

CAMERAS, TOKENS, STEPS, THREADS = 2, 12, 2, 4
FAR = -4.0  # a factor, beyond which few states and no noise are
DIFFERENCE = 1.0  # norm of a step over a whole chunk: bfloat16 resolves it

Make = Callable[[Checkpoint], Engine]


def check_engine(engine: type[Engine] | Make, checkpoint: Checkpoint | None = None) -> None:
    """Checks that an engine keeps what `pi0.engines.base.Engine` promises.

    It has to declare what it can do; to compute what the reference computes, within the limits of
    its precision, for other inputs as well as for the same again, masked content having no effect;
    to serve several threads; and to close. A class is checked in each of its precisions.

    Args:
        engine: a class, or a function that makes an engine from a checkpoint and is called twice.
        checkpoint: None: a small synthetic one.

    Raises:
        AssertionError: says in one sentence what the engine does not keep.
        EngineError: the engine is not available on this machine.
    """
    with _opened(checkpoint) as opened:
        if isinstance(engine, type):
            declared = cast(type[Engine], engine)
            _check_declarations(declared)
            for precision in declared.capabilities.precisions:
                options = EngineOptions(precision)
                _check(partial(declared.from_checkpoint, options=options), opened)
        else:
            _check(engine, opened)


@contextmanager
def _opened(checkpoint: Checkpoint | None) -> Iterator[Checkpoint]:
    if checkpoint is not None:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as folder:
        synthesise(Path(folder), PRESETS["tiny"], LAYOUTS["openpi"], 0, torch.float32)
        yield open_checkpoint(Path(folder))


def _check_declarations(engine: type[Engine]) -> None:
    try:
        check_declarations(engine)
        for precision in engine.capabilities.precisions:
            limits_of(engine, precision)
    except EngineError as error:
        raise AssertionError(str(error)) from error


def _check(make: Make, checkpoint: Checkpoint) -> None:
    """All checks of one precision."""
    inputs, noise = random_inputs(checkpoint.config, CAMERAS, TOKENS, seed=0)
    with make(checkpoint) as engine:
        label = f"engine {engine.name}:{engine.options.precision}"
        _check_declarations(type(engine))
        _check_result(label, engine, inputs, noise)
        _check_same_again(label, engine, inputs, noise)
        with make_engine("reference", checkpoint) as reference:
            _check_fresh(label, engine, reference, inputs, noise)
            _check_other_calls(label, engine, reference, inputs, noise)
        _check_not_finite(label, engine, inputs, noise)
        if engine.capabilities.batch:
            _check_batch(label, engine, inputs, noise)
        if engine.capabilities.differentiable:
            _check_gradient(label, engine, inputs, noise)
        _check_threads(label, engine, inputs, noise)
        _check_close(label, engine, inputs, noise)
    _check_verify(label, make, checkpoint)


def _check_result(label: str, engine: Engine, inputs: ModelInputs, noise: Tensor) -> None:
    before = {name: value.clone() for name, value in (*vars(inputs).items(), ("noise", noise))}
    steps: list[int] = []
    try:
        actions = engine.sample(inputs, noise, STEPS, lambda: steps.append(1))
    except EngineError as error:  # another shape, or not finite
        raise AssertionError(str(error)) from error
    for name, value in before.items():
        _require(
            torch.equal(value, noise if name == "noise" else getattr(inputs, name)),
            f"{label}: expected {name} as given after sample, found other values.",
        )
    _require(
        len(steps) == STEPS,
        f"{label}: expected on_step to be called once for each of {STEPS} steps, found "
        f"{len(steps)} calls.",
    )
    velocity = engine.velocity(noise, torch.ones(len(noise)), engine.prefill(inputs))
    for what, result in (("actions", actions), ("a velocity", velocity)):
        _require(
            result.dtype == torch.float32 and result.device.type == "cpu",
            f"{label}: expected {what} as float32 on the CPU, found "
            f"{str(result.dtype).removeprefix('torch.')} on {result.device}.",
        )


def _check_same_again(label: str, engine: Engine, inputs: ModelInputs, noise: Tensor) -> None:
    first, second = (engine.sample(inputs, noise, STEPS) for _ in range(2))
    _require(
        torch.equal(first, second),
        f"{label}: expected the same bits from the same call, found a difference of "
        f"{float((first - second).abs().max()):.1e}.",
    )


def _check_fresh(
    label: str, engine: Engine, reference: Engine, inputs: ModelInputs, noise: Tensor
) -> None:
    """One input changes at a time; the answer has to be that of the changed input. A π0.5 does not
    read the state, which is in its prompt."""
    vocabulary = engine.config.vocab_size
    changed = {
        "images": (replace(inputs, images=-inputs.images), noise),
        "tokens": (replace(inputs, tokens=(inputs.tokens + 1) % vocabulary), noise),
        "token_mask": (replace(inputs, token_mask=_all_but_last(inputs.token_mask)), noise),
        "image_mask": (replace(inputs, image_mask=_all_but_last(inputs.image_mask)), noise),
        "state": (replace(inputs, state=FAR * inputs.state), noise),
        "noise": (inputs, FAR * noise),
    }
    for name, (given, x) in changed.items():
        before = engine.sample(inputs, noise, STEPS)
        after = engine.sample(given, x, STEPS)
        read = name != "state" or engine.config.state_tokens > 0
        expected, other = ("other", "the same") if read else ("the same", "other ones")
        _require(
            torch.equal(before, after) != read,
            f"{label}: expected {expected} actions for other {name}, found {other}.",
        )
        _compare(label, f"other {name}", engine, reference, given, x)


def _check_other_calls(
    label: str, engine: Engine, reference: Engine, inputs: ModelInputs, noise: Tensor
) -> None:
    """Calls of other shapes, steps and times than those before: an engine may have compiled or
    captured what it saw first."""
    for cameras, tokens in ((CAMERAS + 1, engine.config.max_tokens), (1, 1)):
        given, x = random_inputs(engine.config, cameras, tokens, seed=2)
        what = f"another number of cameras and tokens, {cameras} and {tokens},"
        _compare(label, what, engine, reference, given, x)
    for sampler in SAMPLERS:
        what = f"{STEPS + 1} steps by {sampler}"
        _compare(label, what, engine, reference, inputs, noise, STEPS + 1, sampler)


def _compare(
    label: str,
    what: str,
    engine: Engine,
    reference: Engine,
    inputs: ModelInputs,
    noise: Tensor,
    steps: int = STEPS,
    sampler: str = "euler",
) -> None:
    own = limits_of(type(engine), engine.options.precision)
    limit = threshold("actions", looser(own, limits_of(type(reference), "float32")))
    expected, actions = (
        each.sample(inputs, noise, steps, lambda: None, None, sampler)
        for each in (reference, engine)
    )
    found = compare(expected - noise, actions - noise)
    _require(
        found.fault is None and found.rel_l2 <= limit.max_rel_l2,
        f"{label}: expected the reference's actions for {what} within {limit.max_rel_l2:g} of "
        f"what it moved, found {found.fault or f'{found.rel_l2:.2g}'}.",
    )


def _check_not_finite(label: str, engine: Engine, inputs: ModelInputs, noise: Tensor) -> None:
    """What is not finite must not look finite in the actions, where nobody would notice it; and
    the call after an error is as any other."""
    damaged = noise.clone()
    damaged[0, -1, -1] = float("nan")
    before = engine.sample(inputs, noise, STEPS)
    try:
        engine.sample(inputs, damaged, STEPS)
    except EngineError:
        _require(
            torch.equal(engine.sample(inputs, noise, STEPS), before),
            f"{label}: expected the same actions after an error as before, found other ones.",
        )
        return
    raise AssertionError(
        f"{label}: expected an EngineError for noise with NaN in it, found finite actions."
    )


def _all_but_last(mask: Tensor) -> Tensor:
    masked = mask.clone()
    masked[:, -1] = False
    return masked


def _check_batch(label: str, engine: Engine, inputs: ModelInputs, noise: Tensor) -> None:
    others, other_noise = random_inputs(engine.config, CAMERAS, TOKENS, seed=1)
    rows = [(inputs, noise), (others, other_noise)]
    both = ModelInputs(
        **{name: torch.cat([value, vars(others)[name]]) for name, value in vars(inputs).items()}
    )
    own = limits_of(type(engine), engine.options.precision)
    limit = threshold("actions", own)
    together = engine.sample(both, torch.cat([noise, other_noise]), STEPS)
    _require(
        together.shape == (2, *noise.shape[1:]),
        f"{label}: expected actions of both rows of a batch, found {list(together.shape)}.",
    )
    for i, (given, x) in enumerate(rows):
        found = compare(engine.sample(given, x, STEPS) - x, together[i : i + 1] - x)
        _require(
            found.fault is None and found.rel_l2 <= limit.max_rel_l2,
            f"{label}: expected row {i} of a batch to be what it is alone, found a relative error "
            f"of {found.rel_l2:.2g}.",
        )


def _check_gradient(label: str, engine: Engine, inputs: ModelInputs, noise: Tensor) -> None:
    """Against the difference of two velocities along the gradient, roughly: it is there, and it is
    not that of something else."""
    cache, t = engine.prefill(inputs), torch.full((len(noise),), 0.5)
    x = noise.clone().requires_grad_()
    v = engine.velocity(x, t, cache)
    _require(
        v.requires_grad,
        f"{label}: expected a velocity that autograd can follow, as capabilities.differentiable "
        "says, found one without a gradient.",
    )
    weights = noise.roll(1, dims=1)
    (gradient,) = torch.autograd.grad(v, x, weights)
    slope = gradient.norm()
    along = DIFFERENCE * gradient / slope
    ahead, behind = (engine.velocity(noise + step, t, cache) for step in (along, -along))
    found = (weights * (ahead - behind)).sum() / (2 * DIFFERENCE)
    _require(
        bool((found - slope).abs() <= 0.2 * slope),
        f"{label}: expected the velocity to change as its gradient says, by {slope:.3g}, found "
        f"{found:.3g}.",
    )


def _check_threads(label: str, engine: Engine, inputs: ModelInputs, noise: Tensor) -> None:
    calls = [
        (replace(inputs, images=inputs.images.roll(i, dims=-1)), noise.roll(i, dims=1))
        for i in range(2 * THREADS)
    ]
    alone = [engine.sample(*call, STEPS) for call in calls]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda call: engine.sample(call[0], call[1], STEPS), calls))
    wrong = sum(not torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    _require(
        not wrong,
        f"{label}: expected the same bits from {THREADS} threads as from one, found {wrong} of "
        f"{len(calls)} answers that differ.",
    )


def _check_close(label: str, engine: Engine, inputs: ModelInputs, noise: Tensor) -> None:
    engine.close()
    engine.close()
    for name, call in (
        ("sample", lambda: engine.sample(inputs, noise, STEPS)),
        ("prefill", lambda: engine.prefill(inputs)),
    ):
        try:
            call()
        except EngineError:
            continue
        raise AssertionError(
            f"{label}: expected an EngineError from {name} after close, found an answer. Decorate "
            "prefill and velocity with pi0.engines.base.exclusive."
        )


def _check_verify(label: str, make: Make, checkpoint: Checkpoint) -> None:
    """Stages, blocks, velocities and actions are the reference's; masked content has no effect."""
    try:
        result = verify(
            lambda: make_engine("reference", checkpoint),
            lambda: make(checkpoint),
            default_cases(checkpoint.config, CAMERAS, TOKENS),
            steps=STEPS,
        )
    except Pi0Error as error:
        raise AssertionError(f"{label}: expected it to run in verify, found: {error}") from error
    failure = result.first_failure
    if failure:
        raise AssertionError(
            f"{label}: expected the reference's {failure.name} ({failure.case}), found that "
            f"{' and '.join(failure.exceeded)}."
        )


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)
