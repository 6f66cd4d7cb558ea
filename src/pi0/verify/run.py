"""Runs two engines on the same inputs and noise and compares what they hand on.

Modes: in `chained` each engine lives with its own errors; in `isolated` every stage (and block) of
the candidate is fed with the reference's input, which tells where an error is born.

A comparison is blind to what both engines leave out. So a camera and text are masked in one of the
cases, and there each engine is also compared with itself on other masked content, which must not
move its velocity at all: an engine that drops the mask fails even beside another one that does. And
a third engine, an implementation that we did not write, is compared with the reference.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pi0.config import Pi0Config
from pi0.engines.base import Engine
from pi0.inputs import ModelInputs, random_inputs
from pi0.model import STAGES
from pi0.model.flow import schedule
from pi0.verify.compare import Comparison, compare
from pi0.verify.thresholds import Threshold, coarser, threshold

MODES = ("chained", "isolated")
ACTIONS = "actions"
# Recorded even if blocks are not compared: in isolated mode the expert attends to the reference's.
CACHED = (".keys", ".values")


@dataclass(frozen=True)
class Case:
    """Named inputs and noise [B, horizon, action_dim]."""

    name: str
    inputs: ModelInputs
    noise: Tensor


@dataclass(frozen=True)
class Row:
    """A stage, a block (`stage.block.7`), its keys or values, a step's velocity (`velocity.3`), the
    actions of these velocities, those of the candidate's own loop (`sample`), an engine beside
    itself (`masked_content.candidate`), or the third engine's velocities and actions
    (`oracle.velocity.3`)."""

    case: str
    name: str
    comparison: Comparison
    limit: Threshold
    reference_ms: float
    candidate_ms: float

    @property
    def passed(self) -> bool:
        c = self.comparison
        fits = c.pcc >= self.limit.min_pcc and c.rel_l2 <= self.limit.max_rel_l2
        return c.fault is None and fits


@dataclass(frozen=True)
class VerifyResult:
    """All rows, and the actions of both engines by case.

    `missing` are the stages that one of them does not show.
    """

    mode: str
    rows: list[Row]
    actions: dict[str, tuple[Tensor, Tensor]]
    missing: list[str]

    @property
    def first_failure(self) -> Row | None:
        return next((row for row in self.rows if not row.passed), None)


@dataclass
class Recording:
    """What one engine handed on in one case."""

    patches: int  # of one view
    tensors: dict[str, Tensor]
    ms: dict[str, float]
    steps: list[tuple[Tensor, Tensor]]  # x_t, velocity
    actions: Tensor
    masked_content: Comparison | None  # of the velocity with itself, other content being masked
    sample: Tensor | None = None  # actions of the engine's own loop


def default_cases(config: Pi0Config, cameras: int, tokens: int, seed: int = 0) -> list[Case]:
    """Everything valid, and the last camera and the latter half of the text masked."""
    inputs, noise = random_inputs(config, cameras, tokens, seed)
    image_mask, token_mask = inputs.image_mask.clone(), inputs.token_mask.clone()
    image_mask[:, -1] = cameras == 1
    token_mask[:, math.ceil(tokens / 2) :] = False
    masked = replace(inputs, image_mask=image_mask, token_mask=token_mask)
    return [Case("all valid", inputs, noise), Case("masked", masked, noise)]


def verify(
    reference: Callable[[], Engine],
    candidate: Callable[[], Engine],
    cases: list[Case],
    precisions: tuple[str, str],
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
            one is in memory at a time.
        precisions: of both engines; the coarser chooses the thresholds.
        mode: "chained" or "isolated".
        layers: compare every block, too.
        min_pcc: asked of every row beside its own limits.
        on_case: called after each case of each engine.
    """
    precision = coarser(*precisions)
    feeds = _run_all(reference, cases, {}, steps, layers, on_case)
    fed = feeds if mode == "isolated" else {}
    runs = _run_all(candidate, cases, fed, steps, layers, on_case, sample=mode == "chained")
    rows = [
        row
        for case in cases
        for row in _rows(case, feeds[case.name], runs[case.name], precision, layers)
    ]
    if oracle is not None:
        rows += _oracle_rows(oracle, cases, feeds, precisions[0], steps, on_case)
    if min_pcc is not None:
        rows = [
            replace(row, limit=replace(row.limit, min_pcc=max(min_pcc, row.limit.min_pcc)))
            for row in rows
        ]
    actions = {c.name: (feeds[c.name].actions, runs[c.name].actions) for c in cases}
    first = cases[0].name
    shown = feeds[first].tensors.keys() & runs[first].tensors.keys()
    missing = [name for name in STAGES if name not in shown]
    return VerifyResult(mode, rows, actions, missing)


def _run_all(
    make: Callable[[], Engine],
    cases: list[Case],
    feeds: Mapping[str, Recording],
    steps: int,
    layers: bool,
    on_case: Callable[[], None],
    sample: bool = False,
) -> dict[str, Recording]:
    engine = make()
    recordings = {}
    for case in cases:
        recording = record(engine, case, steps, layers, feeds.get(case.name))
        if sample and recording.actions.isfinite().all():
            start = time.perf_counter()
            recording.sample = engine.sample(case.inputs, case.noise, steps)
            recording.ms["sample"] = (time.perf_counter() - start) * 1e3
        recordings[case.name] = recording
        on_case()
    del engine
    gc.collect()
    return recordings


def record(
    engine: Engine, case: Case, steps: int, layers: bool, feed: Recording | None = None
) -> Recording:
    """One engine on one case; with a feed, every stage goes on with the feed's tensor."""
    tensors: dict[str, Tensor] = {}
    ms: dict[str, float] = {}
    since: dict[str, float] = {}  # milliseconds not yet told of, by stage
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
        handed_on = feed.tensors[name].to(value) if feed is not None and fed else value
        last = time.perf_counter()
        return handed_on

    state, noise = case.inputs.state, case.noise
    cache = engine.prefill(case.inputs, tap)
    engine.velocity(noise, torch.ones(len(noise)), state, cache, tap)
    taken, x = _denoise(engine, case, cache, steps, feed)
    patches = engine.config.vision.num_patches
    return Recording(patches, tensors, ms, taken, x, _move_masked_content(engine, case))


def _denoise(
    engine: Engine, case: Case, cache: Any, steps: int, feed: Recording | None = None
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """x_t and velocity of every step, and the actions; a feed's x_t are where steps start."""
    taken = []
    x = case.noise
    for i, moment in enumerate(schedule(steps)):
        t = torch.full((len(x),), moment)
        if feed is not None:
            x = feed.steps[i][0]
        v = engine.velocity(x, t, case.inputs.state, cache)
        taken.append((x, v))
        x = x - v / steps
    return taken, x


def _oracle_rows(
    make: Callable[[], Engine],
    cases: list[Case],
    references: Mapping[str, Recording],
    precision: str,
    steps: int,
    on_case: Callable[[], None],
) -> list[Row]:
    engine, rows = make(), []
    limit = threshold("oracle", precision)
    for case in cases:
        a = references[case.name]
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
        engine.velocity(case.noise, t, inputs.state, engine.prefill(these))
        for these in (inputs, replace(inputs, images=images, tokens=tokens))
    )
    return compare(before, after)


def _seen(inputs: ModelInputs, patches: int) -> dict[str, Tensor]:
    """By stage, which of its images or tokens somebody sees, with so many patches a view."""
    views = inputs.image_mask.flatten()
    images = inputs.image_mask.repeat_interleave(patches, dim=1)
    prefix = torch.cat([images, inputs.token_mask], dim=1)
    return {
        "vision_tower": views,
        "projector": views,
        "token_embedding": inputs.token_mask,
        "prefix": prefix,
        "vlm_transformer": prefix,
    }


def _compared(a: Recording, b: Recording, layers: bool) -> list[str]:
    """What both show of stages and, with layers, of blocks. An engine that does not compute the
    VLM's output, which nobody reads, is judged by the last keys and values instead."""
    shown = [name for name in a.tensors if name in b.tensors]
    if layers:
        return shown
    keys = [name for name in shown if name.startswith("vlm_transformer") and name.endswith(CACHED)]
    stand_in = keys[-2:] if "vlm_transformer" not in shown else []
    return [name for name in shown if "." not in name or name in stand_in]


def _rows(case: Case, a: Recording, b: Recording, precision: str, layers: bool) -> list[Row]:
    rows = []
    seen = _seen(case.inputs, a.patches)
    for name in _compared(a, b, layers):
        stage = name.partition(".")[0]
        x, y = a.tensors[name], b.tensors[name]
        if stage in seen and x.shape == y.shape:
            # What becomes of masked images and padding is every engine's own affair.
            x, y = x[seen[stage]], y[seen[stage]]
            if not x.numel():
                continue
        limit = threshold(stage, precision)
        rows.append(Row(case.name, name, compare(x, y), limit, a.ms[name], b.ms[name]))
    for i, ((_, x), (_, y)) in enumerate(zip(a.steps, b.steps, strict=True)):
        limit = threshold("velocity", precision)
        rows.append(Row(case.name, f"velocity.{i}", compare(x, y), limit, 0.0, 0.0))
    for engine, recording in (("reference", a), ("candidate", b)):
        if recording.masked_content:
            name, exact = f"masked_content.{engine}", threshold("masked_content", precision)
            rows.append(Row(case.name, name, recording.masked_content, exact, 0.0, 0.0))
    limit = threshold(ACTIONS, precision)
    rows.append(Row(case.name, ACTIONS, compare(a.actions, b.actions), limit, 0.0, 0.0))
    if b.sample is not None:
        sampled = compare(a.actions, b.sample)
        rows.append(Row(case.name, "sample", sampled, limit, 0.0, b.ms["sample"]))
    return rows
