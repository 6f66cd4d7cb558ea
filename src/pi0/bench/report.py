"""The result of a benchmark as plain data: times, the arithmetic they took, accuracy."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from pi0.bench.flops import Count, Work, needed, published
from pi0.bench.roofline import Rate
from pi0.bench.run import BenchPlan, BenchResult, EngineResult
from pi0.bench.scaling import workloads_around
from pi0.bench.task import Workload
from pi0.config import Pi0Config


@dataclass(frozen=True)
class BenchStageRow:
    """Time of a part, and the arithmetic that it needs.

    Attributes:
        gflop: operations needed, in 1e9. gflops: those per second that were reached; None for a
            part that was too short for the clock.
        roofline_ms: the least time that the machine's measured rates allow; None if no rate of
            the precision is known. times_roofline: the time as a multiple of it, or None.
    """

    stage: str
    gflop: float
    ms: float
    gflops: float | None
    roofline_ms: float | None
    times_roofline: float | None


@dataclass(frozen=True)
class EngineRow:
    """One engine: medians over all visits, in milliseconds; None if not reached.

    Attributes:
        ratio: speed relative to the peer that times are compared with; 2 is twice as fast.
        prefill_ms, step_ms: of a pass in parts; vision_ms is part of prefill. They need not add up
            to `ms` for an engine that samples in one piece.
        displacement_error: of the actions, ‖a − a_ref‖ / ‖a_ref − noise‖, a_ref the baseline's.
        pcc, rel_l2: of the actions, against the baseline's. All three are the worst of all seeds;
            `fault`: why there are none.
    """

    engine: str
    failure: str | None
    ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    ratio: float | None = None
    prefill_ms: float | None = None
    vision_ms: float | None = None
    step_ms: float | None = None
    first_action_s: float | None = None
    load_s: float | None = None
    peak_bytes: int | None = None
    cuda_bytes: int | None = None
    threads: int | None = None
    implementation: str | None = None
    torch: str | None = None
    displacement_error: float | None = None
    pcc: float | None = None
    rel_l2: float | None = None
    fault: str | None = None


def engine_rows(plan: BenchPlan, result: BenchResult) -> tuple[str, list[EngineRow]]:
    """The label of the peer that ratios refer to, and a row for each engine.

    The peer is the first named as one that was measured, else the slowest engine.
    """
    done = [engine for engine in result.engines if engine.visits]
    named = result.engines[len(result.engines) - plan.peers :]
    peer = next((e for e in named if e.visits), max(done, key=_ms, default=None))
    rows = [_engine_row(engine, peer) for engine in result.engines]
    return peer.spec.label if peer else "", rows


def _ms(engine: EngineResult) -> float:
    return statistics.median(ms for visit in engine.visits for ms in visit.sample_ms)


def _engine_row(engine: EngineResult, peer: EngineResult | None) -> EngineRow:
    label, visits = engine.spec.label, engine.visits
    if peer is None or not visits:
        return EngineRow(label, engine.failure)
    times = [ms for visit in visits for ms in visit.sample_ms]
    vision = [visit.vision_ms for visit in visits if visit.vision_ms is not None]
    compared = engine.comparisons
    fault = next((c.fault for c in compared if c.fault), None)
    numbers = bool(compared) and fault is None
    return EngineRow(
        engine=label,
        failure=engine.failure,
        ms=statistics.median(times),
        min_ms=min(times),
        max_ms=max(times),
        ratio=_ms(peer) / _ms(engine),
        prefill_ms=statistics.median(visit.prefill_ms for visit in visits),
        vision_ms=statistics.median(vision) if vision else None,
        step_ms=statistics.median(visit.step_ms for visit in visits),
        first_action_s=statistics.median(engine.first_action_s),
        load_s=statistics.median(visit.load_s for visit in visits),
        peak_bytes=max(visit.peak_bytes for visit in visits),
        cuda_bytes=max(visit.cuda_bytes or 0 for visit in visits) or None,
        threads=visits[0].threads,
        implementation=visits[0].implementation,
        torch=visits[0].torch,
        displacement_error=_worst(engine.displacement_errors) if numbers else None,
        pcc=min(c.pcc for c in compared) if numbers else None,
        rel_l2=max(c.rel_l2 for c in compared) if numbers else None,
        fault=fault,
    )


def _worst(errors: list[float]) -> float | None:
    """The largest error; None if one of them is no number."""
    return max(errors) if errors and all(map(math.isfinite, errors)) else None


def accuracy_cells(row: dict[str, Any], baseline: str) -> tuple[str, str]:
    """Displacement error and PCC of an engine of `to_data`, as people read them."""
    if row["engine"] == baseline:
        return "baseline", ""
    if row["pcc"] is None:
        return ("no number" if row["fault"] else "—"), "—"
    pcc, error = f"{row['pcc']:.7f}", row["displacement_error"]
    if error is None:
        return "—", pcc
    return f"{100 * error:.1f} %" if error >= 1e-3 else f"{100 * error:.1g} %", pcc


def stage_rows(
    plan: BenchPlan, config: Pi0Config, row: EngineRow, rate: Rate | None
) -> list[BenchStageRow]:
    """Parts and the whole of one engine; `rate` is the machine's in its precision."""
    if row.ms is None or row.prefill_ms is None or row.step_ms is None:
        return []
    count, _ = counts(config, plan.point)
    steps = plan.point.steps
    parts = [("prefill", [count.prefill], row.prefill_ms)]
    if row.vision_ms is not None:
        # Two measurements, of which the longer may be vision at tiny sizes.
        language_ms = max(row.prefill_ms - row.vision_ms, 0.0)
        parts = [
            ("vision", [count.vision], row.vision_ms),
            ("rest of prefill", [count.language], language_ms),
        ]
    parts.append(("one step", [count.step], row.step_ms))
    parts.append(("all", [count.vision, count.language, *[count.step] * steps], row.ms))
    return [_stage_row(*part, rate) for part in parts]


def _stage_row(stage: str, works: list[Work], ms: float, rate: Rate | None) -> BenchStageRow:
    flop = sum(work.flop for work in works)
    gflops = flop / ms / 1e6 if ms > 0 else None
    if rate is None:
        return BenchStageRow(stage, flop / 1e9, ms, gflops, None, None)
    roofline_ms = sum(rate.roofline(work) for work in works) * 1e3
    return BenchStageRow(stage, flop / 1e9, ms, gflops, roofline_ms, ms / roofline_ms)


def counts(config: Pi0Config, point: Workload) -> tuple[Count, Count]:
    """Work that a workload needs, and that of the model as published."""
    return (
        needed(config, point.cameras - point.masked, point.valid, point.batch),
        published(config, point.cameras, point.tokens, point.batch),
    )


def scaling_rows(plan: BenchPlan, config: Pi0Config, result: BenchResult) -> list[dict[str, Any]]:
    """Each workload of the sweep: what is varied, work needed, and each engine's milliseconds."""
    return [
        {
            "varied": name,
            "value": getattr(point, name),
            "gflop": counts(config, point)[0].total(point.steps).flop / 1e9,
            "ms": {engine.spec.label: engine.scaling.get(point) for engine in result.engines},
        }
        for name, points in workloads_around(plan.point).items()
        for point in points
    ]


def to_data(
    plan: BenchPlan, config: Pi0Config, result: BenchResult, machine: dict[str, Any], command: str
) -> dict[str, Any]:
    """Everything but the actions, as plain data."""
    peer, rows = engine_rows(plan, result)
    least, whole = counts(config, plan.point)
    return {
        "command": command,
        "machine": machine,
        "checkpoint": str(plan.checkpoint),
        "image_size": config.vision.image_size,
        "point": asdict(plan.point),
        "repeat": plan.repeat,
        "rounds": plan.rounds,
        "seeds": plan.seeds,
        "seed": plan.seed,
        "baseline": plan.specs[0].label,
        "ratio_to": peer,
        "work_needed": asdict(least),
        "work_published": asdict(whole),
        "rates": [
            {"device": device, "precision": precision, **asdict(rate)}
            for (device, precision), rate in result.rates.items()
        ],
        "engines": [
            {
                **asdict(row),
                "stages": [
                    asdict(stage) for stage in stage_rows(plan, config, row, result.rate_of(engine))
                ],
                "notes": engine.notes,
                "first_action_s_each": engine.first_action_s,
                "visits": [asdict(visit) for visit in engine.visits],
            }
            for engine, row in zip(result.engines, rows, strict=True)
        ],
        "scaling": scaling_rows(plan, config, result) if plan.scaling else [],
    }
