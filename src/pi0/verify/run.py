"""Runs two engines on the same inputs and noise and compares the results of their stages.

Modes: in `chained` each engine computes with its own results, so that errors add up; in `isolated`
every stage (and block) of the candidate gets the reference's input, which shows where an error
arises.

A comparison is blind to what both engines leave out. So a camera and text are masked in one of the
cases, and there each engine is also compared with itself on other masked content, which must not
move its velocity at all: an engine that drops the mask fails even when compared with another one
that does. And a third engine, an implementation that we did not write, is compared with the
reference.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pi0.config import Pi0Config
from pi0.engines.base import Engine, Threshold
from pi0.errors import CheckpointError
from pi0.inputs import ModelInputs, random_inputs
from pi0.model import STAGES
from pi0.model.flow import schedule
from pi0.model.pi0 import prefix_valid
from pi0.verify.compare import Comparison, compare
from pi0.verify.thresholds import Limits, limits_of, looser, threshold

MODES = ("chained", "isolated")
ACTIONS = "actions"
# Recorded even if blocks are not compared: in isolated mode the expert attends to the reference's.
CACHED = (".keys", ".values")


@dataclass(frozen=True)
class Case:
    """Named inputs, and noise [B, horizon, action_dim]."""

    name: str
    inputs: ModelInputs
    noise: Tensor


@dataclass(frozen=True)
class Row:
    """One comparison.

    `name` is a stage, a block (`stage.block.7`), its keys or values, a step's velocity
    (`velocity.3`), the actions of these velocities (`actions`), those of the candidate's own loop
    (`sample`), an engine compared with itself (`masked_content.candidate`), or the third engine's
    velocities and actions (`oracle.velocity.3`).
    """

    case: str
    name: str
    comparison: Comparison
    limit: Threshold
    reference_ms: float
    candidate_ms: float

    @property
    def passed(self) -> bool:
        return not self.exceeded

    @property
    def exceeded(self) -> list[str]:
        """What is wrong: each limit that does not hold, with both numbers."""
        c, limit = self.comparison, self.limit
        if c.fault is not None:
            return [c.fault]
        exceeded = []
        if not c.pcc >= limit.min_pcc:
            exceeded.append(f"PCC {c.pcc:.7g} (limit: at least {limit.min_pcc:g})")
        if not c.rel_l2 <= limit.max_rel_l2:
            exceeded.append(f"relative L2 {c.rel_l2:.2e} (limit: at most {limit.max_rel_l2:.0e})")
        return exceeded


@dataclass(frozen=True)
class VerifyResult:
    """All rows, and the actions of both engines by case.

    Attributes:
        missing: the stages that are not compared, and why.
        notes: what both engines say of their results.
    """

    mode: str
    rows: list[Row]
    actions: dict[str, tuple[Tensor, Tensor]]
    missing: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def first_failure(self) -> Row | None:
        return next((row for row in self.rows if not row.passed), None)


@dataclass
class Recording:
    """The results of one engine in one case."""

    patches: int  # of one view
    tensors: dict[str, Tensor]
    ms: dict[str, float]
    steps: list[tuple[Tensor, Tensor]]  # x_t, velocity
    actions: Tensor
    masked_content: Comparison | None  # of two velocities that differ in masked content only
    sample: Tensor | None = None  # actions of the engine's own loop


def default_cases(config: Pi0Config, cameras: int, tokens: int, seed: int = 0) -> list[Case]:
    """Everything valid, and the last camera and the latter half of the text masked."""
    inputs, noise = random_inputs(config, cameras, tokens, seed)
    image_mask, token_mask = inputs.image_mask.clone(), inputs.token_mask.clone()
    image_mask[:, -1] = cameras == 1
    token_mask[:, math.ceil(tokens / 2) :] = False
    masked = replace(inputs, image_mask=image_mask, token_mask=token_mask)
    return [Case("all valid", inputs, noise), Case("masked", masked, noise)]


@dataclass(frozen=True)
class EngineRun:
    """One engine on all cases.

    Attributes:
        recordings: by case.
        limits: of the engine's precision.
        hidden: why its taps do not see a stage, by stage.
    """

    recordings: dict[str, Recording]
    limits: Limits
    hidden: dict[str, str]
    notes: Sequence[str]


def verify(
    reference: Callable[[], Engine],
    candidate: Callable[[], Engine],
    cases: list[Case],
    mode: str = "chained",
    layers: bool = False,
    steps: int = 10,
    min_pcc: float | None = None,
    on_case: Callable[[], None] = lambda: None,
    oracle: Callable[[], Engine] | None = None,
) -> VerifyResult:
    """Compares a candidate engine with a reference.

    Args:
        reference, candidate, oracle: make the engines; called one after the other, so that only
            one is in memory at a time, and closed afterwards.
        mode: "chained" or "isolated".
        layers: compare every block, too.
        min_pcc: required of every row in addition to its own limits.
        on_case: called after each case of each engine.

    Raises:
        CheckpointError: the reference's own results are not finite.
        EngineError: there are no limits for the precision of an engine.
    """
    a = _run_all(reference, cases, {}, steps, layers, on_case)
    _require_finite(a.recordings)
    feeds = a.recordings if mode == "isolated" else {}
    b = _run_all(candidate, cases, feeds, steps, layers, on_case, sample=mode == "chained")
    limits = looser(a.limits, b.limits)
    rows = []
    for case in cases:
        pair = a.recordings[case.name], b.recordings[case.name]
        rows += _rows(case, *pair, limits, layers)
    if oracle is not None:
        rows += _oracle_rows(oracle, cases, a, steps, on_case)
    if min_pcc is not None:
        rows = [
            replace(row, limit=replace(row.limit, min_pcc=max(min_pcc, row.limit.min_pcc)))
            for row in rows
        ]
    actions = {c.name: (a.recordings[c.name].actions, b.recordings[c.name].actions) for c in cases}
    return VerifyResult(mode, rows, actions, _missing(a, b), [*dict.fromkeys([*a.notes, *b.notes])])


def _run_all(
    make: Callable[[], Engine],
    cases: list[Case],
    feeds: Mapping[str, Recording],
    steps: int,
    layers: bool,
    on_case: Callable[[], None],
    sample: bool = False,
) -> EngineRun:
    recordings = {}
    with make() as engine:
        limits = limits_of(type(engine), engine.options.precision)
        for case in cases:
            recording = record(engine, case, steps, layers, feeds.get(case.name))
            if sample and recording.actions.isfinite().all():
                start = time.perf_counter()
                recording.sample = engine.sample(case.inputs, case.noise, steps)
                recording.ms["sample"] = (time.perf_counter() - start) * 1e3
            recordings[case.name] = recording
            on_case()
        shown = recordings[cases[0].name].tensors
        hidden = {name: engine.why_hidden(name) for name in STAGES if name not in shown}
        run = EngineRun(recordings, limits, hidden, engine.notes)
    del engine
    gc.collect()
    return run


def _require_finite(recordings: Mapping[str, Recording]) -> None:
    """Raises CheckpointError if a reference has computed NaN: there is nothing to compare with."""
    for case, recording in recordings.items():
        for name, value in [*recording.tensors.items(), (ACTIONS, recording.actions)]:
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise CheckpointError(
                    "checkpoint: expected finite results of the reference engine, found "
                    f"{bad} NaN or infinite values, first at {name} ({case}). The checkpoint is "
                    "damaged: copy or download it again."
                )


def _missing(a: EngineRun, b: EngineRun) -> dict[str, str]:
    hidden = {**b.hidden, **a.hidden}
    return {name: hidden[name] for name in STAGES if name in hidden}


def record(
    engine: Engine, case: Case, steps: int, layers: bool, feed: Recording | None = None
) -> Recording:
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
        if layers or not part or name.endswith(CACHED):
            tensors[name] = value.detach().cpu().clone()
        fed = feed is not None and name in feed.tensors
        result = feed.tensors[name].to(value) if feed is not None and fed else value
        last = time.perf_counter()
        return result

    cache = engine.prefill(case.inputs, tap)
    engine.velocity(case.noise, torch.ones(len(case.noise)), cache, tap)
    taken, x = _denoise(engine, case, cache, steps, feed)
    patches = engine.config.vision.num_patches
    return Recording(patches, tensors, ms, taken, x, _move_masked_content(engine, case))


def _denoise(
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


def _oracle_rows(
    make: Callable[[], Engine],
    cases: list[Case],
    reference: EngineRun,
    steps: int,
    on_case: Callable[[], None],
) -> list[Row]:
    rows = []
    with make() as engine:
        own = limits_of(type(engine), engine.options.precision)
        limit = threshold("velocity", looser(reference.limits, own))
        for case in cases:
            a = reference.recordings[case.name]
            taken, actions = _denoise(engine, case, engine.prefill(case.inputs), steps)
            pairs = [(f"velocity.{i}", a.steps[i][1], v) for i, (_, v) in enumerate(taken)]
            for name, x, y in [*pairs, (ACTIONS, a.actions, actions)]:
                rows.append(Row(case.name, f"oracle.{name}", compare(x, y), limit, 0.0, 0.0))
            on_case()
    return rows


def _move_masked_content(engine: Engine, case: Case) -> Comparison | None:
    inputs = case.inputs
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


def _seen(inputs: ModelInputs, patches: int) -> dict[str, Tensor]:
    """By stage, which of its images or tokens are attended to; `patches` are those of one view."""
    views = inputs.image_mask.flatten()
    prefix = prefix_valid(inputs, patches)
    return {
        "vision_tower": views,
        "projector": views,
        "token_embedding": inputs.token_mask,
        "prefix": prefix,
        "vlm_transformer": prefix,
    }


def _compared(a: Recording, b: Recording, layers: bool) -> list[str]:
    """The stages and, with layers, the blocks that both show. Where an engine does not compute the
    VLM's output, which nothing reads, the last keys and values are compared instead."""
    shown = [name for name in a.tensors if name in b.tensors]
    if layers:
        return shown
    keys = [name for name in shown if name.startswith("vlm_transformer") and name.endswith(CACHED)]
    stand_in = keys[-2:] if "vlm_transformer" not in shown else []
    return [name for name in shown if "." not in name or name in stand_in]


def _rows(case: Case, a: Recording, b: Recording, limits: Limits, layers: bool) -> list[Row]:
    rows = []
    seen = _seen(case.inputs, a.patches)
    for name in _compared(a, b, layers):
        stage = name.partition(".")[0]
        x, y = a.tensors[name], b.tensors[name]
        if stage in seen and x.shape == y.shape:
            # The results for masked images and padding are engine-specific.
            x, y = x[seen[stage]], y[seen[stage]]
            if not x.numel():
                continue
        limit = threshold(stage, limits)
        rows.append(Row(case.name, name, compare(x, y), limit, a.ms[name], b.ms[name]))
    for i, ((_, x), (_, y)) in enumerate(zip(a.steps, b.steps, strict=True)):
        limit = threshold("velocity", limits)
        rows.append(Row(case.name, f"velocity.{i}", compare(x, y), limit, 0.0, 0.0))
    for engine, recording in (("reference", a), ("candidate", b)):
        if recording.masked_content:
            name, exact = f"masked_content.{engine}", threshold("masked_content", limits)
            rows.append(Row(case.name, name, recording.masked_content, exact, 0.0, 0.0))
    limit = threshold(ACTIONS, limits)
    rows.append(Row(case.name, ACTIONS, compare(a.actions, b.actions), limit, 0.0, 0.0))
    if b.sample is not None:
        sampled = compare(a.actions, b.sample)
        rows.append(Row(case.name, "sample", sampled, limit, 0.0, b.ms["sample"]))
    return rows
