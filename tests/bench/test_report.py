"""Medians, ratios, worst seeds and floors, of times that are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from pi0.bench.flops import Work, needed
from pi0.bench.plot import plot_scaling, plot_times
from pi0.bench.report import engine_rows, to_data
from pi0.bench.roofline import Rate
from pi0.bench.run import BenchPlan, BenchResult, EngineResult
from pi0.bench.scaling import workloads_around
from pi0.bench.task import Trial, Workload
from pi0.config import PRESETS
from pi0.engines.spec import EngineSpec
from pi0.verify.compare import Comparison

CONFIG = PRESETS["pi0_base"]
POINT = Workload(cameras=3, masked=1, tokens=48, valid=9, steps=10)
NAMES = ("reference", "cpu", "lerobot", "transformers")
RATE = Rate(flops=100e9, bandwidth=10e9, weight_bytes=4)


def measured(name: str, *times: float, vision_ms: float | None = 2000.0) -> EngineResult:
    visits = [
        Trial(
            load_s=3.0,
            first_action_at=0.0,
            sample_ms=[ms],
            prefill_ms=0.7 * ms,
            vision_ms=vision_ms,
            step_ms=0.03 * ms,
            peak_bytes=10**9,
            cuda_bytes=None,
            threads=2,
            device="cpu",
            implementation="pi0 0.1.0",
            torch="2",
        )
        for ms in times
    ]
    failure = None if times else f"{name}: expected a measurement, found that it fell asleep."
    return EngineResult(EngineSpec(name, "float32", None), visits, [9.0] * len(times), failure)


def result(*engines: EngineResult) -> BenchResult:
    return BenchResult(list(engines), {("cpu", "float32"): RATE})


def plan(engines: int = 4, peers: int = 2, scaling: bool = False) -> BenchPlan:
    specs = [EngineSpec(name, "float32", None) for name in NAMES[:engines]]
    return BenchPlan(Path("ckpt"), specs, peers, POINT, 7, 2, 10, 0, scaling)


FAST, SLOW = (8000.0, 9000.0, 7000.0), (20_000.0, 22_000.0)


def test_ratio_is_to_the_first_peer() -> None:
    engines = [measured("reference", 40_000), measured("cpu", *FAST), measured("lerobot", *SLOW)]
    peer, rows = engine_rows(plan(3, peers=1), result(*engines))
    assert peer == "lerobot:float32"
    assert rows[1].ms == 8000
    assert (rows[1].min_ms, rows[1].max_ms) == (7000, 9000)
    assert [row.ratio for row in rows] == [21 / 40, 21 / 8, 1]


def test_ratio_without_peers_is_to_the_slowest() -> None:
    engines = [measured("reference", 40_000), measured("cpu", *FAST)]
    peer, rows = engine_rows(plan(2, peers=0), result(*engines))
    assert peer == "reference:float32"
    assert [row.ratio for row in rows] == [1, 5]


def test_a_peer_that_failed_is_passed_over() -> None:
    engines = [measured("reference", 40_000), measured("lerobot"), measured("transformers", *SLOW)]
    peer, rows = engine_rows(plan(3), result(*engines))
    assert peer == "transformers:float32"
    assert rows[1].ms is None
    assert rows[1].failure


def test_all_failed() -> None:
    peer, rows = engine_rows(plan(2, peers=1), result(measured("cpu"), measured("lerobot")))
    assert peer == ""
    assert all(row.failure for row in rows)


def test_the_worst_seed_counts() -> None:
    engine = measured("cpu", *FAST)
    engine.comparisons = [
        Comparison(pcc, pcc, rel_l2, 0.1, None)
        for pcc, rel_l2 in ((0.9999, 0.03), (0.998, 0.01), (1.0, 0.02))
    ]
    _, (row,) = engine_rows(plan(1, peers=0), result(engine))
    assert (row.pcc, row.rel_l2) == (0.998, 0.03)
    engine.comparisons.append(Comparison(1, 1, 0, 0, "candidate is constant (0)"))
    _, (row,) = engine_rows(plan(1, peers=0), result(engine))
    assert (row.pcc, row.fault) == (None, "candidate is constant (0)")


def test_floor() -> None:
    """Arithmetic where it takes longer than reading the weights, else reading them."""
    assert RATE.floor(Work(linears=10**11, attention=10**11, weights=1)) == 2
    assert RATE.floor(Work(linears=1, attention=0, weights=10**10)) == 4


def test_parts() -> None:
    data = to_data(plan(1, peers=0), CONFIG, result(measured("cpu", *FAST)), {}, "pi0 bench")
    vision, language, step, whole = data["engines"][0]["stages"]
    least = needed(CONFIG, cameras=2, tokens=9)
    assert vision["gflops"] == pytest.approx(least.vision.flop / 2.0 / 1e9)
    assert language["ms"] == pytest.approx(5600 - 2000)
    assert step["roofline_ms"] == pytest.approx(least.step.flop / 100e9 * 1e3)
    floors = vision["roofline_ms"] + language["roofline_ms"] + 10 * step["roofline_ms"]
    assert whole["roofline_ms"] == pytest.approx(floors)
    assert whole["times_roofline"] == pytest.approx(8000 / floors)


def test_pictures(tmp_path: Path) -> None:
    """A failed engine, one that shows no vision, and points that an engine refused."""
    engines = [
        measured("reference", 40_000),
        measured("cpu"),
        measured("lerobot", *SLOW, vision_ms=None),
    ]
    for engine in engines:
        for points in workloads_around(POINT).values():
            for point in points:
                engine.scaling[point] = None if point.batch > 1 else 10.0 * point.steps
    made = to_data(plan(3, peers=1, scaling=True), CONFIG, result(*engines), {}, "")
    plot_times(tmp_path / "times.png", made, "title", "small print")
    plot_scaling(tmp_path / "growth.png", made["scaling"], "title")
    assert {path.name for path in tmp_path.iterdir()} == {"times.png", "growth.png"}
