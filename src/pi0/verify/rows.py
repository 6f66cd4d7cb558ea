"""Recordings of two engines, compared: one row for each stage, block, step, call and operation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pi0.engines.threshold import Threshold
from pi0.inputs import ModelInputs
from pi0.model.pi0 import prefix_valid
from pi0.verify.cases import Case
from pi0.verify.compare import Comparison, compare
from pi0.verify.record import AGAIN, ENDS, FIRST, EngineRun, Recording, together
from pi0.verify.thresholds import BLOCK, CHAINED, ISOLATED, OPERATIONS, STRUCTURE, Limits, threshold

ACTIONS, LOOP = "actions", "loop"
FIRST_INPUT = {"vlm_transformer": "prefix", "expert_transformer": "suffix"}
RESPONSE = Threshold(
    -1.0,
    math.inf,
    "an engine that does not notice a changed input does not respond to it: 0 instead of 1",
    0.8,  # rounding in a trained policy alone has moved it by 0.56
)
ROUNDING = 2.0**-24  # of actions of size 1 in float32
CHANCE = 4  # deviations of what does not cancel of many errors in all directions


@dataclass(frozen=True)
class Row:
    """One comparison.

    `name` is a stage, a block (`stage.block.7`), its keys or values, a step's velocity
    (`velocity.3`) or that at t = 0 (`velocity.end`), the actions of these velocities (`actions`),
    those of the candidate's own loop (`sample`), after one input has changed (`sample.state`) and
    how they responded to that (`response.state`), the first call made again (`sample.again`),
    several observations at once (`sample.together`, `sample.alike`), an engine's own loop beside
    its own velocities (`loop`), an engine compared with itself (`masked_content.candidate`,
    `velocity.kept`), an operation (`projector.project`), or the third engine's velocities and
    actions (`oracle.velocity.3`). `part` is one of this module's parts.
    """

    case: str
    name: str
    comparison: Comparison
    limit: Threshold
    reference_ms: float = 0.0
    candidate_ms: float = 0.0
    part: str = CHAINED

    @property
    def passed(self) -> bool:
        return not self.exceeded

    @property
    def share_of_limit(self) -> float:
        """How much of its limits the worst error uses: 1 is just within; infinite without a number
        or beyond a limit of 0."""
        c, limit = self.comparison, self.limit
        if c.fault is not None:
            return math.inf
        pairs = (
            (1 - c.pcc, 1 - limit.min_pcc),
            (c.rel_l2, limit.max_rel_l2),
            (abs(c.gain_error), limit.max_gain_error),
        )
        return max(
            error / most if most > 0 else math.inf if error > 0 else 0 for error, most in pairs
        )

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
            exceeded.append(f"relative L2 {c.rel_l2:.2e} (limit: at most {limit.max_rel_l2:.2e})")
        if not abs(c.gain_error) <= limit.max_gain_error:
            exceeded.append(
                f"gain off by {c.gain_error:+.2e} (limit: at most {limit.max_gain_error:.2e})"
            )
        return exceeded


def structure_rows(cases: Sequence[Case], a: EngineRun, b: EngineRun, limits: Limits) -> list[Row]:
    """All that an engine that rounds nothing computes on the reference's inputs, its own loop, and
    each operation that only the candidate's precision has."""
    rows = isolated_rows(cases, a, b, limits, STRUCTURE)
    return rows + _sample_rows(cases, a, b, limits, STRUCTURE)


def operation_rows(case: Case, run: EngineRun, limits: Limits) -> list[Row]:
    """The worst of each operation of a stage's block."""
    worst: dict[str, Comparison] = {}
    for name, comparison in run.operations:
        known = worst.get(name)
        if known is None or comparison.fault or comparison.rel_l2 > known.rel_l2:
            worst[name] = comparison
    return [
        Row(case.name, name, c, threshold(name, limits, OPERATIONS), part=OPERATIONS)
        for name, c in worst.items()
    ]


def isolated_rows(
    cases: Sequence[Case], a: EngineRun, b: EngineRun, limits: Limits, part: str = ISOLATED
) -> list[Row]:
    """Each stage and block of the candidate on the reference's inputs."""
    rows: list[Row] = []
    for case in cases:
        rows += _stage_rows(case, a.chained[case.name], b.isolated[case.name], limits, part)
        rows += _step_rows(case, a.chained[case.name], b.isolated[case.name], limits, part)
    return rows


def chained_rows(
    cases: Sequence[Case], a: EngineRun, b: EngineRun, limits: Limits, layers: bool
) -> list[Row]:
    """Stages (with layers, blocks as well), steps, and actions of an engine by itself."""
    rows = []
    for case in cases:
        x, y = a.chained[case.name], b.chained[case.name]
        stages = _stage_rows(case, x, y, limits, CHAINED)
        rows += [row for row in stages if layers or not _is_block(row.name)]
        rows += _step_rows(case, x, y, limits, CHAINED)
        moved = compare(x.actions - case.noise, y.actions - case.noise)
        rows.append(Row(case.name, ACTIONS, moved, threshold(ACTIONS, limits)))
    return rows


def masked_content_rows(cases: Sequence[Case], a: EngineRun, b: EngineRun) -> list[Row]:
    """Each engine beside itself on other masked content, and the candidate with what it kept of an
    observation while it computed others."""
    limit = threshold("masked_content", ())
    rows = [
        Row(case.name, f"masked_content.{engine}", moved, limit)
        for case in cases
        for engine, run in (("reference", a), ("candidate", b))
        if (moved := run.chained[case.name].masked_content)
    ]
    for case in cases:
        recording = b.chained[case.name]
        if recording.kept is not None:
            c = compare(recording.still, recording.kept)
            rows.append(Row(case.name, "velocity.kept", c, limit))
    return rows


def sample_rows(cases: Sequence[Case], a: EngineRun, b: EngineRun, limits: Limits) -> list[Row]:
    """The candidate's own loop, and how it responds to each change of an input."""
    return _sample_rows(cases, a, b, limits, CHAINED) + _response_rows(cases[0], a, b)


def loop_rows(cases: Sequence[Case], b: EngineRun, limits: Limits) -> list[Row]:
    """The candidate's own loop beside Euler's method over its own velocities, and several
    observations at once beside each alone: what rounding does is the same in both."""
    limit = threshold(LOOP, limits)
    rows = []
    for case in cases:
        if case.name in b.samples:
            by_steps, by_loop = (
                x - case.noise for x in (b.chained[case.name].actions, b.samples[case.name])
            )
            above = _above_rounding(limit, by_steps)
            rows.append(Row(case.name, LOOP, compare(by_steps, by_loop), above))
    for name, joined in b.together.items():
        alone = torch.cat([b.moved[of] for of in together(name, b.moved)])
        above = _above_rounding(limit, alone)
        rows.append(Row(cases[0].name, f"{LOOP}.{name}", compare(alone, joined), above))
    return rows


def _is_block(name: str) -> bool:
    """Whether a row is the output of a block; keys and values are compared without `layers`."""
    return BLOCK.fullmatch(name) is not None and not name.endswith(ENDS)


def _stage_rows(case: Case, a: Recording, b: Recording, limits: Limits, part: str) -> Iterator[Row]:
    seen = _seen(case.inputs, a.patches)
    for name in a.tensors:
        if name not in b.tensors:
            continue
        stage = name.partition(".")[0]
        x, y = a.tensors[name], b.tensors[name]
        into = None if part == CHAINED else _block_input(name, a)
        if stage in seen and x.shape == y.shape:
            # The results for masked images and padding are engine-specific.
            x, y = x[seen[stage]], y[seen[stage]]
            into = into if into is None else into[seen[stage]]
            if not x.numel():
                continue
        comparison = compare(x, y)
        if into is not None and not comparison.fault:
            branch = compare(x - into, y - into)
            comparison = replace(comparison, gain_error=branch.gain_error)
        limit = threshold(name, limits, part)
        yield Row(case.name, name, comparison, limit, a.ms[name], b.ms[name], part)


def _block_input(name: str, a: Recording) -> Tensor | None:
    """What a block of a trunk adds its branches to; None for other stages."""
    match = BLOCK.fullmatch(name)
    if match is None or match[3]:
        return None
    stage, block = match[1], int(match[2])
    before = f"{stage}.block.{block - 1}" if block else FIRST_INPUT.get(stage, "")
    return a.tensors.get(before)


def _step_rows(case: Case, a: Recording, b: Recording, limits: Limits, part: str) -> list[Row]:
    limit = threshold("velocity", limits, part)
    pairs: list[tuple[int | str, Tensor, Tensor]] = [
        (i, x, y) for i, ((_, x), (_, y)) in enumerate(zip(a.steps, b.steps, strict=True))
    ]
    pairs.append(("end", a.still, b.still))
    return [
        Row(case.name, f"velocity.{name}", compare(x, y), limit, part=part) for name, x, y in pairs
    ]


def _sample_rows(
    cases: Sequence[Case], a: EngineRun, b: EngineRun, limits: Limits, part: str
) -> list[Row]:
    limit, same = threshold("sample", limits, part), threshold("masked_content", limits, part)
    rows = []
    for case in cases:
        if case.name in b.samples:
            expected = a.chained[case.name].actions - case.noise
            c = compare(expected, b.samples[case.name] - case.noise)
            above = _above_rounding(limit, expected)
            rows.append(Row(case.name, "sample", c, above, 0.0, b.ms[case.name], part))
    for name, moved in b.moved.items():
        if name == AGAIN:
            row = Row(cases[0].name, f"sample.{name}", compare(b.moved[FIRST], moved), same)
        else:
            above = _above_rounding(limit, a.moved[name])
            row = Row(cases[0].name, f"sample.{name}", compare(a.moved[name], moved), above)
        rows.append(replace(row, part=part))
    for name, moved in b.together.items():
        alone = torch.cat([a.moved[of] for of in together(name, a.moved)])
        above = _above_rounding(limit, alone)
        rows.append(Row(cases[0].name, f"sample.{name}", compare(alone, moved), above, part=part))
    return rows


def _above_rounding(limit: Threshold, moved: Tensor) -> Threshold:
    """The limit on what a model moved, which is known by actions alone."""
    rms = float(moved.double().square().mean().sqrt())
    if rms * limit.max_rel_l2 >= ROUNDING or not rms:
        return limit
    most = ROUNDING / rms
    why = "the model, whose training has hardly begun, moves actions by little more than they round"
    return Threshold(min(limit.min_pcc, 1 - most**2), most, why, max(limit.max_gain_error, most))


def _response_rows(case: Case, a: EngineRun, b: EngineRun) -> list[Row]:
    """What a change of one input does to what the model moves, beside what it should do."""
    rows = []
    for before, after in itertools.pairwise(b.moved):
        if after == AGAIN:
            continue
        x, y = (run.moved[after] - run.moved[before] for run in (a, b))
        if not x.any():
            continue  # such as to a word where all text is masked
        if y.any():
            response = compare(x, y)
            # A response that is smaller than rounding, as to one word of many, has any gain.
            chance = CHANCE * response.rel_l2 / math.sqrt(x.numel())
            limit = replace(RESPONSE, max_gain_error=max(RESPONSE.max_gain_error, chance))
        else:
            response = Comparison(0.0, 0.0, 1.0, float(x.abs().max()), None, -1.0)
            limit = RESPONSE
        rows.append(Row(case.name, f"response.{after}", response, limit))
    return rows


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
