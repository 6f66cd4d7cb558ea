"""Statistics in batches are those of the whole; quantiles within the stated tolerance."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi0.data import RunningStatistics, norm_stats_json
from pi0.data.statistics import QUANTILES, PixelStatistics
from pi0.errors import DataError
from pi0.policy.statistics import read_norm_stats

BIN = 1 / 8192  # of the range: what a quantile may be off beyond the numbers kept


def batches(values: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    cuts = np.sort(rng.integers(0, len(values) + 1, 5))
    return np.split(values, cuts)


def filled(values: np.ndarray, rng: np.random.Generator, exact: int) -> dict[str, np.ndarray]:
    statistics = RunningStatistics(exact)
    for batch in batches(values, rng):
        statistics.update(batch)
    return statistics.result()


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 400),
    width=st.integers(1, 4),
    exponent=st.integers(-12, 12),
    offset=st.sampled_from([0.0, 1.0, -1e3, 1e6]),
    exact=st.sampled_from([0, 50, 10**6]),
    heavy=st.booleans(),
)
def test_batches_are_the_whole(
    seed: int, count: int, width: int, exponent: int, offset: float, exact: int, heavy: bool
) -> None:
    rng = np.random.default_rng(seed)
    draw = rng.standard_cauchy if heavy else rng.standard_normal
    values = draw((count, width)) * 10.0**exponent + offset
    found = filled(values, rng, exact)
    scale = np.abs(values).max()
    np.testing.assert_allclose(found["mean"], values.mean(0), atol=1e-13 * scale, rtol=1e-12)
    np.testing.assert_allclose(found["std"], values.std(0), atol=1e-13 * scale, rtol=1e-9)
    np.testing.assert_array_equal(found["min"], values.min(0))
    np.testing.assert_array_equal(found["max"], values.max(0))
    assert found["count"].tolist() == [count]
    kept = count * width <= exact
    tolerance = 1e-12 * scale if kept else np.ptp(values, axis=0) * BIN + 1e-14 * scale
    for name, level in QUANTILES.items():
        error = np.abs(found[name] - np.quantile(values, level, axis=0))
        assert (error <= tolerance).all(), (name, error, tolerance)


@pytest.mark.parametrize("constant", [0.0, -3.25, 1e-320, 1e300])
def test_constants(constant: float) -> None:
    statistics = RunningStatistics(0)
    statistics.update(np.full((5, 2), constant))
    found = statistics.result()
    assert found["q01"].tolist() == found["q99"].tolist() == [constant, constant]
    assert found["std"].tolist() == [0.0, 0.0]


def test_a_range_that_grows() -> None:
    """From zeros to 1e9: bins become wider again and again."""
    rng = np.random.default_rng(0)
    values = np.concatenate([np.zeros(50), *(rng.normal(size=200) * 10.0**e for e in range(10))])
    statistics = RunningStatistics(0)
    for batch in np.split(values, 50):
        statistics.update(batch[:, None])
    found = statistics.result()
    for name, level in QUANTILES.items():
        assert abs(found[name][0] - np.quantile(values, level)) <= np.ptp(values) * BIN


def test_chunks_of_actions_count_every_vector() -> None:
    chunks = np.random.default_rng(0).normal(size=(6, 50, 3))
    statistics = RunningStatistics()
    statistics.update(chunks)
    assert statistics.result()["count"].tolist() == [300]
    np.testing.assert_allclose(statistics.result()["mean"], chunks.mean((0, 1)), rtol=1e-12)


def test_what_statistics_refuse() -> None:
    statistics = RunningStatistics()
    with pytest.raises(DataError, match="at least one frame, found none"):
        statistics.result()
    statistics.update(np.zeros((0, 7)))  # no frames say nothing, not even a width
    statistics.update(np.zeros((2, 3)))
    with pytest.raises(DataError, match="expected vectors of 3 values, found 4"):
        statistics.update(np.zeros((2, 4)))
    with pytest.raises(DataError, match="found .0.0, nan, 0.0. in row 1"):
        statistics.update(np.array([[0, 0, 0], [0, np.nan, 0]]))


def test_openpis_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    statistics = RunningStatistics()
    statistics.update(np.random.default_rng(0).normal(size=(100, 4)))
    table = statistics.result()
    path = tmp_path / "norm_stats.json"
    path.write_bytes(norm_stats_json({"state": table, "actions": table}))
    found = read_norm_stats(path)
    assert set(json.loads(path.read_text())) == {"norm_stats"}
    for name in ("mean", "std", "q01", "q99"):
        np.testing.assert_array_equal(found["actions"][name], table[name])


@given(seed=st.integers(0, 2**32 - 1), pictures=st.integers(1, 4), top=st.integers(1, 256))
def test_pixels(seed: int, pictures: int, top: int) -> None:
    images = np.random.default_rng(seed).integers(0, top, (pictures, 4, 6, 3), np.uint8)
    parts = [PixelStatistics() for _ in range(2)]
    for i, image in enumerate(images):
        parts[i % 2].update(image)
    parts[0].merge(parts[1].pictures, parts[1].counts)
    found = parts[0].result()
    values = images.reshape(-1, 3) / 255
    assert found["count"].tolist() == [pictures]
    for name, expected in (("mean", values.mean(0)), ("std", values.std(0)),
                           ("min", values.min(0)), ("max", values.max(0))):  # fmt: skip
        np.testing.assert_allclose(found[name], expected, atol=1e-12)
    for name, level in QUANTILES.items():
        lower = np.quantile(values, level, axis=0, method="lower")
        np.testing.assert_allclose(found[name], lower, atol=1e-12)
