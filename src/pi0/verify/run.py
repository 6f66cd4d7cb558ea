"""Do two engines compute the same, and does the candidate round within its limits?

Two questions, since an answer to both at once hides small mistakes behind rounding:

- **Same computation.** The candidate's code in a precision that rounds nothing (`Engine.unrounded`)
  gets the reference's input at every stage and block, and has to agree as float32 does. Operations
  that only the candidate's precision has are shown one by one (`Engine.show_operations`).
- **Rounding.** The candidate itself, on the reference's inputs (`isolated`) and by itself
  (`chained`), within limits for each stage that were measured.

A comparison is blind to what both engines leave out. So a camera and text are masked in one of the
cases, and there each engine is also compared with itself on other masked content, which must not
move its velocity at all. And a third engine, an implementation that we did not write, is compared
with the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pi0.engines.base import Engine
from pi0.engines.registry import find_engine
from pi0.engines.spec import EngineSpec
from pi0.errors import CheckpointError
from pi0.model import STAGES
from pi0.verify.cases import Case
from pi0.verify.compare import compare
from pi0.verify.record import EngineRun, Passes, Recording, denoise, run_engine
from pi0.verify.rows import (
    ACTIONS,
    Row,
    chained_rows,
    isolated_rows,
    loop_rows,
    masked_content_rows,
    operation_rows,
    sample_rows,
    structure_rows,
)
from pi0.verify.thresholds import (
    CHAINED,
    ISOLATED,
    ORACLE,
    Limits,
    limits_of,
    looser,
    threshold,
)


class DamagedCheckpointError(CheckpointError):
    """The reference's own results are not finite."""


MODES = ("both", CHAINED, ISOLATED)


@dataclass(frozen=True)
class VerifyResult:
    """All rows, and the actions of both engines by case.

    Attributes:
        structure: the engine that was tested for the same computation; None if none was.
        missing: the stages that are not compared, and why.
        notes: what both engines say of their results.
    """

    mode: str
    rows: list[Row]
    actions: dict[str, tuple[Tensor, Tensor]]
    missing: dict[str, str]
    notes: list[str] = field(default_factory=list)
    structure: str | None = None

    @property
    def first_failure(self) -> Row | None:
        return next((row for row in self.rows if not row.passed), None)


def unrounded_engine(reference: EngineSpec, candidate: EngineSpec) -> EngineSpec | None:
    """The engine that runs the candidate's code and rounds nothing; None if there is none, if it is
    the candidate itself, or if the reference rounds."""
    texts = (
        find_engine(spec.name).unrounded.get(spec.precision) for spec in (reference, candidate)
    )
    itself, exact = (None if text is None else EngineSpec.parse(text) for text in texts)
    if itself is None or itself.precision != reference.precision or exact is None:
        return None
    if exact.name == candidate.name:
        exact = replace(exact, device=candidate.device)
    return None if exact == candidate else exact


def record_reference(
    make: Callable[[], Engine],
    cases: Sequence[Case],
    steps: int = 10,
    on_case: Callable[[], None] = lambda: None,
) -> EngineRun:
    """What candidates are compared with, recorded once for all of them; see `verify`.

    Where a trained policy is about to turn from one way to act to another, rounding alone decides:
    other noise is drawn for such a case, unless it is given. The result has the cases as they are.
    """
    recorded = run_engine(make, cases, Passes(steps, together=False, steady=True), on_case)
    _require_finite(recorded.chained)
    return recorded


def verify(
    reference: Callable[[], Engine] | EngineRun,
    candidate: Callable[[], Engine],
    cases: Sequence[Case],
    mode: str = "both",
    layers: bool = False,
    steps: int = 10,
    min_pcc: float | None = None,
    on_case: Callable[[], None] = lambda: None,
    oracle: Callable[[], Engine] | None = None,
    unrounded: Callable[[], Engine] | None = None,
) -> VerifyResult:
    """Compares a candidate engine with a reference.

    Args:
        reference, candidate, oracle, unrounded: make the engines; called one after the other, so
            that only one is in memory at a time, and closed afterwards. The reference may also be
            what `record_reference` returned for these steps, and then has the cases.
        mode: which of the candidate's passes are compared, one of `MODES`. Engines that cannot be
            fed have no isolated pass.
        layers: compare every block of the chained pass, too.
        min_pcc: required of every row in addition to its own limits.
        on_case: called after each case of each engine.
        unrounded: the engine that `unrounded_engine` names; None where there is none.

    Raises:
        DamagedCheckpointError: the reference's own results are not finite.
        EngineError: there are no limits for the precision of an engine.
    """
    if isinstance(reference, EngineRun):
        a = reference
    else:
        a = record_reference(reference, cases, steps, on_case)
    cases, feeds = a.cases, a.chained
    exact = None
    if unrounded is not None:
        passes = Passes(steps, feeds, chained=False)
        exact = run_engine(unrounded, cases, passes, on_case)
    b = run_engine(candidate, cases, Passes(steps, feeds, operations=True), on_case)
    if not a.rounds and not b.rounds and b.isolated:
        exact = b
    limits = _limits(a, b)
    rows: list[Row] = []
    if exact is not None:
        rows += structure_rows(cases, a, exact, _limits(a, exact))
        rows += operation_rows(cases[0], b, _limits(exact))
    if mode != CHAINED and b.isolated and exact is not b:
        rows += isolated_rows(cases, a, b, limits)
    if mode != ISOLATED:
        rows += chained_rows(cases, a, b, limits, layers)
    rows += loop_rows(cases, b, limits)
    rows += masked_content_rows(cases, a, b)
    if exact is not b:
        rows += sample_rows(cases, a, b, limits)
    if oracle is not None:
        rows += _oracle_rows(oracle, cases, a, steps, on_case)
    if min_pcc is not None:
        rows = [
            replace(row, limit=replace(row.limit, min_pcc=max(min_pcc, row.limit.min_pcc)))
            for row in rows
        ]
    actions = {c.name: (a.chained[c.name].actions, b.chained[c.name].actions) for c in cases}
    notes = [*dict.fromkeys([*a.notes, *b.notes])]
    tested = None if exact is None else exact.label
    return VerifyResult(mode, rows, actions, _missing(a, b), notes, tested)


def _limits(*runs: EngineRun) -> Limits:
    return looser(*(limits_of(run.engine, run.precision, run.depth, run.width) for run in runs))


def _require_finite(recordings: Mapping[str, Recording]) -> None:
    """Raises DamagedCheckpointError if a reference has computed NaN: nothing compares with it."""
    for case, recording in recordings.items():
        for name, value in [*recording.tensors.items(), (ACTIONS, recording.actions)]:
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise DamagedCheckpointError(
                    "checkpoint: expected finite results of the reference engine, found "
                    f"{bad} NaN or infinite values, first at {name} ({case}). The checkpoint is "
                    "damaged: copy or download it again."
                )


def _missing(a: EngineRun, b: EngineRun) -> dict[str, str]:
    hidden = {**b.hidden, **a.hidden}
    return {name: hidden[name] for name in STAGES if name in hidden}


def _oracle_rows(
    make: Callable[[], Engine],
    cases: Sequence[Case],
    reference: EngineRun,
    steps: int,
    on_case: Callable[[], None],
) -> list[Row]:
    """Of the third engine: velocities of all steps, actions, and one velocity at t = 0, where the
    time embedding is exact in any implementation, so that the limit can be tight."""
    rows = []
    with make() as engine:
        limits = looser(
            limits_of(reference.engine, reference.precision),
            limits_of(type(engine), engine.options.precision),
        )
        for case in cases:
            a = reference.chained[case.name]
            cache = engine.prefill(case.inputs)
            taken, actions = denoise(engine, case, cache, steps)
            still = engine.velocity(case.noise, torch.zeros(len(case.noise)), cache)
            pairs = [(f"velocity.{i}", a.steps[i][1], v) for i, (_, v) in enumerate(taken)]
            pairs.append(("end", a.still, still))
            pairs.append((ACTIONS, a.actions - case.noise, actions - case.noise))
            for name, x, y in pairs:
                limit = threshold(name, limits, ORACLE)
                rows.append(Row(case.name, f"oracle.{name}", compare(x, y), limit, part=ORACLE))
            on_case()
    return rows
