"""Medians, ratios, worst seeds and rooflines, of times that are made up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from pi0.bench.flops import Work, needed
from pi0.bench.plot import plot_scaling, plot_times
from pi0.bench.report import accuracy_cells, engine_rows, to_data
from pi0.bench.roofline import Rate, make_products
from pi0.bench.run import BenchPlan, BenchResult, EngineResult
from pi0.bench.scaling import workloads_around
from pi0.bench.task import Trial, Workload
from pi0.config import PRESETS
from pi0.engines.spec import EngineSpec
from pi0.figures import RED
from pi0.verify.compare import Comparison, compare, displacement_error

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


def test_error_is_relative_to_what_the_model_moved() -> None:
    """Actions that are mostly the noise put in make an error look small."""
    noise = torch.full((1, 50, 32), 10.0)
    moved, error = torch.zeros_like(noise), torch.zeros_like(noise)
    moved[..., 0], error[..., 1] = 1.0, 0.02
    reference = noise + moved
    assert displacement_error(reference, reference + error, noise) == pytest.approx(0.02, rel=1e-4)
    assert compare(reference, reference + error).rel_l2 < 0.02 / 50
    assert math.isnan(displacement_error(noise, noise, noise))


def test_the_worst_displacement_error_is_told(tmp_path: Path) -> None:
    engines = [measured("reference", 40_000), measured("cpu", *FAST), measured("lerobot", *SLOW)]
    for engine in engines:
        engine.comparisons = [Comparison(0.9999, 1, 3e-3, 0.1, None)] * 2
    engines[1].displacement_errors = [0.01, 0.02]
    engines[2].displacement_errors = [0.01, float("nan")]
    made = to_data(plan(3, peers=1), CONFIG, result(*engines), {}, "")
    assert [e["displacement_error"] for e in made["engines"]] == [None, 0.02, None]
    cells = [accuracy_cells(e, made["baseline"]) for e in made["engines"]]
    assert cells == [("baseline", ""), ("2.0 %", "0.9999000"), ("—", "0.9999000")]
    small = {**made["engines"][1], "displacement_error": 1.2e-7}
    assert accuracy_cells(small, made["baseline"])[0] == "1e-05 %"
    faulty = {**made["engines"][1], "pcc": None, "fault": "candidate is constant (0)"}
    assert accuracy_cells(faulty, made["baseline"]) == ("no number", "—")


def test_products_of_a_precision_are_of_the_same_matrices() -> None:
    """int8 has a rate of the engine's own product, too: PyTorch's has no fast one without VNNI."""
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    expected = a @ b.T
    assert [len(make_products(p, a, b)) for p in ("float32", "bfloat16", "fp8")] == [1, 1, 0]
    _, ours = make_products("int8", a, b)
    assert torch.nn.functional.cosine_similarity(ours().flatten(), expected.flatten(), dim=0) > 0.99


def test_roofline() -> None:
    """Arithmetic where it takes longer than reading the weights, else reading them."""
    assert RATE.roofline(Work(linears=10**11, attention=10**11, weights=1)) == 2
    assert RATE.roofline(Work(linears=1, attention=0, weights=10**10)) == 4


def test_parts() -> None:
    data = to_data(plan(1, peers=0), CONFIG, result(measured("cpu", *FAST)), {}, "pi0 bench")
    vision, language, step, whole = data["engines"][0]["stages"]
    least = needed(CONFIG, cameras=2, tokens=9)
    assert vision["gflops"] == pytest.approx(least.vision.flop / 2.0 / 1e9)
    assert language["ms"] == pytest.approx(5600 - 2000)
    assert step["roofline_ms"] == pytest.approx(least.step.flop / 100e9 * 1e3)
    rooflines = vision["roofline_ms"] + language["roofline_ms"] + 10 * step["roofline_ms"]
    assert whole["roofline_ms"] == pytest.approx(rooflines)
    assert whole["times_roofline"] == pytest.approx(8000 / rooflines)


def test_no_part_takes_negative_time() -> None:
    """Vision and prefill are measured apart; at tiny sizes noise may turn them round."""
    engine = measured("cpu", 100.0, vision_ms=90.0)
    data = to_data(plan(1, peers=0), CONFIG, result(engine), {}, "pi0 bench")
    _, language, *_ = data["engines"][0]["stages"]
    assert (language["ms"], language["gflops"]) == (0, None)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    savefig = Figure.savefig

    def keep(figure: Figure, *args: object, **options: object) -> None:
        figures.append(figure)
        savefig(figure, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_table_beside_the_bars(tmp_path: Path, drawn: list[Figure]) -> None:
    engines = [measured("reference", 40_000), measured("cpu", *FAST), measured("lerobot", *SLOW)]
    engines[1].displacement_errors = [0.02]
    engines[1].comparisons = [Comparison(0.9999, 1, 3e-3, 0.1, None)]
    made = to_data(plan(3, peers=1), CONFIG, result(*engines), {}, "")
    plot_times(tmp_path / "times.png", made, "π0 on $x_{", "small")
    shown = words(drawn[0])
    assert {"× lerobot:\nfloat32", "median", "8 s", "2.62", "error", "2.0 %", "PCC"} <= set(shown)
    assert "π0 on $x_{" in shown
    axes = drawn[0].axes[0]
    assert axes.get_xlim()[1] == pytest.approx(1.03 * 40), "the longest bar fills the axis"


def test_failures_are_drawn_as_such(tmp_path: Path, drawn: list[Figure]) -> None:
    engines = [measured("cpu", *FAST), measured("lerobot")]
    made = to_data(plan(2, peers=1), CONFIG, result(*engines), {}, "")
    plot_times(tmp_path / "one.png", made, "title", "small print")
    assert any(
        word.startswith("✕ failed: lerobot: expected a measurement") for word in words(drawn[0])
    )
    assert "error" not in words(drawn[0]), "no column of dashes"
    labels = drawn[0].axes[0].get_yticklabels()
    assert [label.get_color() == RED for label in labels] == [False, True]
    made = to_data(plan(2, peers=1), CONFIG, result(measured("cpu"), measured("lerobot")), {}, "")
    plot_times(tmp_path / "all.png", made, "title", "small print")


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
    plot_scaling(tmp_path / "scaling.png", made["scaling"], "title")
    assert {path.name for path in tmp_path.iterdir()} == {"times.png", "scaling.png"}
