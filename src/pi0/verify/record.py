"""Runs an engine on cases and keeps what its stages show.

Alone, an engine computes with its own results (`chained`), so that errors add up. Fed with the
recording of another engine (`isolated`), every stage and block gets that engine's input, so that an
error stays where it arises.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pi0.engines.base import Engine
from pi0.errors import EngineError
from pi0.inputs import ModelInputs
from pi0.model import STAGES
from pi0.model.flow import schedule
from pi0.verify.cases import Case, one_change_each
from pi0.verify.compare import Comparison, compare

CHANGE_STEPS = 2  # denoising steps of calls that are made to see a change
# A change of the noise moves the actions of synthetic weights 1.3 to 2.2 times as far, those of a
# trained policy 0.1 to 1.5 times, but about 10 times where it is about to turn from one way to act
# to another; then rounding moves them beyond any limit.
STEADY = 3.0
DRAWS = 4  # of noise, for one that is steady
NUDGE = 1e-3  # change of the noise by which that is found
FIRST, AGAIN = "first", "again"  # calls on the same inputs; see `one_change_each`
TOGETHER = "together", "alike"
ENDS = (".keys", ".values")


@dataclass
class Recording:
    """The results of one engine in one case.

    Attributes:
        patches: of one view.
        ms: milliseconds of each stage.
        steps: x_t and velocity of each.
        actions: Euler's method over these velocities.
        still: the velocity at t = 0 of the noise.
        kept: the same again, after a prefix of other inputs; None where nothing is masked, or the
            engine refuses an older prefix.
        masked_content: of two velocities that differ in masked content only.
    """

    patches: int
    tensors: dict[str, Tensor]
    ms: dict[str, float]
    steps: list[tuple[Tensor, Tensor]]
    actions: Tensor
    still: Tensor
    kept: Tensor | None
    masked_content: Comparison | None


@dataclass
class EngineRun:
    """One engine on all cases.

    Attributes:
        depth, width: of its deepest and of its widest tower.
        cases: what it was asked, in which a reference has chosen noise (`_steadied`).
        chained, isolated: by case; isolated ones only if the engine was fed.
        samples: actions of the engine's own loop, by case.
        moved: actions less noise of the calls of `one_change_each`, by their names.
        together: several of `moved` in one call, by the names of `TOGETHER`; none if the engine
            takes one observation, and not those that it refuses.
        operations: what `Engine.show_operations` showed, compared.
        hidden: why its taps do not see a stage, by stage.
        ms: milliseconds of `samples` of cases.
    """

    engine: type[Engine]
    label: str
    precision: str
    depth: int
    width: int
    cases: Sequence[Case] = ()
    chained: dict[str, Recording] = field(default_factory=dict)
    isolated: dict[str, Recording] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)
    moved: dict[str, Tensor] = field(default_factory=dict)
    together: dict[str, Tensor] = field(default_factory=dict)
    operations: list[tuple[str, Comparison]] = field(default_factory=list)
    hidden: dict[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    ms: dict[str, float] = field(default_factory=dict)

    @property
    def rounds(self) -> bool:
        """Whether its precision rounds more than float32 does, as far as the engine says."""
        return self.engine.unrounded.get(self.precision) != self.label


@dataclass(frozen=True)
class Passes:
    """What is asked of an engine, by mode.

    Attributes:
        feeds: recordings that it is fed with in isolated passes; empty: there are none.
        chained: whether it also computes with its own results.
        operations: whether the operations of its precision are shown, in the first case.
        together: whether several observations are computed at once, too.
        steady: whether noise is drawn again for cases in which the model is not steady.
    """

    steps: int
    feeds: Mapping[str, Recording] = field(default_factory=dict)
    chained: bool = True
    operations: bool = False
    together: bool = True
    steady: bool = False


def run_engine(
    make: Callable[[], Engine],
    cases: Sequence[Case],
    passes: Passes,
    on_case: Callable[[], None],
) -> EngineRun:
    """Makes an engine, records what is asked for, and closes it."""
    with make() as engine:
        label = f"{engine.name}:{engine.options.precision}"
        towers = engine.config.vision, engine.config.vlm
        depth, width = (max(getattr(t, name) for t in towers) for name in ("depth", "width"))
        notes: list[str] = []
        if passes.steady:
            cases = [_steadied(engine, case, passes.steps, notes) for case in cases]
        run = EngineRun(type(engine), label, engine.options.precision, depth, width, cases)
        for case in cases:
            _record_case(engine, case, passes, run, case is cases[0])
            on_case()
        if cases[0].name in run.samples:
            _sample_changes(engine, cases[0], passes, run)
        recordings = run.chained or run.isolated
        shown = recordings[cases[0].name].tensors
        run.hidden = {name: engine.why_hidden(name) for name in STAGES if name not in shown}
        run.notes = [*engine.notes, *notes]
    del engine
    gc.collect()
    return run


def _steadied(engine: Engine, case: Case, steps: int, notes: list[str]) -> Case:
    """The case with the first of a few noises at which the model is steady, or, with a note, the
    one at which it is steadiest; a given case keeps its noise."""
    cache = engine.prefill(case.inputs)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(1 if case.given else DRAWS):
        nudge = NUDGE * torch.randn(case.noise.shape, generator=generator)
        a, b = (
            denoise(engine, replace(case, noise=noise), cache, steps)[1]
            for noise in (case.noise, case.noise + nudge)
        )
        moved = float((b - a).norm() / nudge.norm())
        found.append((moved, case))
        if not moved > STEADY:  # NaN is somebody else's to report
            return case
        case = replace(case, noise=torch.randn(case.noise.shape, generator=generator))
    moved, case = min(found, key=lambda pair: pair[0])
    notes.append(
        f"{case.name}: here the policy is about to turn from one way to act to another (it moves a "
        f"small change of the noise {moved:.0f} times as far). Rounding may move velocities, "
        "actions and sample beyond their limits: compare another observation."
    )
    return case


def _record_case(engine: Engine, case: Case, passes: Passes, run: EngineRun, first: bool) -> None:
    can = engine.capabilities
    feed = passes.feeds.get(case.name) if can.feedable and can.shows_stages else None
    if feed is not None:
        if passes.operations and first:
            with engine.show_operations(
                lambda name, a, b: run.operations.append((name, compare(a, b)))
            ):
                run.isolated[case.name] = record(engine, case, passes.steps, feed)
        else:
            run.isolated[case.name] = record(engine, case, passes.steps, feed)
    if passes.chained:
        run.chained[case.name] = record(engine, case, passes.steps)
    recording = run.chained.get(case.name) or run.isolated[case.name]
    if recording.actions.isfinite().all():
        start = time.perf_counter()
        run.samples[case.name] = engine.sample(case.inputs, case.noise, passes.steps)
        run.ms[case.name] = (time.perf_counter() - start) * 1e3


def _sample_changes(engine: Engine, case: Case, passes: Passes, run: EngineRun) -> None:
    calls = {call.name: call for call in one_change_each(engine.config, case)}
    run.moved = {
        name: engine.sample(call.inputs, call.noise, CHANGE_STEPS) - call.noise
        for name, call in calls.items()
    }
    for name in TOGETHER if passes.together and engine.capabilities.batch else ():
        joined = [calls[of] for of in together(name, run.moved)]
        inputs = ModelInputs.joined([call.inputs for call in joined])
        noise = torch.cat([call.noise for call in joined])
        # Some engines take no rows with different masks.
        with contextlib.suppress(EngineError):
            run.together[name] = engine.sample(inputs, noise, CHANGE_STEPS) - noise


def together(name: str, calls: Mapping[str, Any]) -> list[str]:
    """Calls of `one_change_each` that are made in one. `together`: two that differ in everything,
    the one that has been changed most, whose masks leave it fewer tokens, and the first. `alike`:
    three with equal masks, for which engines need none."""
    *_, most, _ = calls
    return [most, FIRST] if name == "together" else ["noise", FIRST, "token"]


def record(engine: Engine, case: Case, steps: int, feed: Recording | None = None) -> Recording:
    """One engine on one case; with a feed, each stage's result is replaced by the feed's tensor."""
    tensors: dict[str, Tensor] = {}
    ms: dict[str, float] = {}
    since: dict[str, float] = {}  # milliseconds of blocks whose stage is not complete
    last = time.perf_counter()

    def tap(name: str, value: Tensor) -> Tensor:
        nonlocal last
        if value.is_cuda:
            torch.cuda.synchronize(value.device)
        stage, _, part = name.partition(".")
        ms[name] = (time.perf_counter() - last) * 1e3
        if part:  # a stage's time is that of its blocks and what comes after them
            since[stage] = since.get(stage, 0.0) + ms[name]
        else:
            ms[name] += since.pop(stage, 0.0)
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        fed = feed is not None and name in feed.tensors
        result = feed.tensors[name].to(value) if feed is not None and fed else value
        last = time.perf_counter()
        return result

    cache = engine.prefill(case.inputs, tap)
    engine.velocity(case.noise, torch.ones(len(case.noise)), cache, tap)
    taken, x = denoise(engine, case, cache, steps, feed)
    still = engine.velocity(case.noise, torch.zeros(len(case.noise)), cache)
    patches = engine.config.vision.num_patches
    masked_content = None if feed else _move_masked_content(engine, case)
    kept = _use_older(engine, case, cache) if masked_content else None
    return Recording(patches, tensors, ms, taken, x, still, kept, masked_content)


def denoise(
    engine: Engine, case: Case, cache: Any, steps: int, feed: Recording | None = None
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """x_t and velocity of every step, and the actions; with a feed, steps start at its x_t."""
    taken = []
    x = case.noise
    for i, moment in enumerate(schedule(steps)):
        t = torch.full((len(x),), moment)
        if feed is not None:
            x = feed.steps[i][0]
        v = engine.velocity(x, t, cache)
        taken.append((x, v))
        x = x - v / steps
    return taken, x


def _use_older(engine: Engine, case: Case, cache: Any) -> Tensor | None:
    inputs = case.inputs
    engine.prefill(replace(inputs, images=-inputs.images, tokens=inputs.tokens.flip(1)))
    try:
        return engine.velocity(case.noise, torch.zeros(len(case.noise)), cache)
    except EngineError:
        return None


def _move_masked_content(engine: Engine, case: Case) -> Comparison | None:
    inputs: ModelInputs = case.inputs
    if inputs.image_mask.all() and inputs.token_mask.all():
        return None
    images, tokens = inputs.images.clone(), inputs.tokens.clone()
    images[~inputs.image_mask] *= -1
    tokens[~inputs.token_mask] = (tokens[~inputs.token_mask] + 1) % engine.config.vocab_size
    t = torch.ones(len(case.noise))
    before, after = (
        engine.velocity(case.noise, t, engine.prefill(these))
        for these in (inputs, replace(inputs, images=images, tokens=tokens))
    )
    return compare(before, after)
