"""Formulas of openpi and LeRobot, spelled out; statistics files; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pi0.checkpoint.load import open_checkpoint
from pi0.errors import ObservationError, Pi0Error
from pi0.policy.normalize import make_normalizer
from pi0.policy.statistics import (
    find_norm_stats,
    find_origin,
    list_norm_stats,
    read_norm_stats,
)

LOW, HIGH = np.array([1.0, -2.0, 0.5]), np.array([0.5, 3.0, 2.0])
X = np.array([1.5, 0.0, -4.0])
STATS = {"mean": LOW, "std": HIGH, "q01": LOW, "q99": LOW + HIGH, "min": LOW, "max": LOW + HIGH}


@pytest.mark.parametrize(
    ("mode", "convention", "expected"),
    [
        ("mean_std", "openpi", (X - LOW) / (HIGH + 1e-6)),
        ("mean_std", "lerobot", (X - LOW) / (HIGH + 1e-8)),
        ("quantiles", "openpi", (X - LOW) / (HIGH + 1e-6) * 2 - 1),
        ("quantiles", "lerobot", 2 * (X - LOW) / HIGH - 1),
        ("min_max", "lerobot", 2 * (X - LOW) / HIGH - 1),
    ],
)
def test_forward(mode: str, convention: str, expected: np.ndarray) -> None:
    normalizer = make_normalizer("state", mode, convention, STATS)
    np.testing.assert_allclose(normalizer.normalize(X), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("mode", "convention", "expected"),
    [
        ("mean_std", "openpi", X * (HIGH + 1e-6) + LOW),
        ("mean_std", "lerobot", X * HIGH + LOW),
        ("quantiles", "openpi", (X + 1) / 2 * (HIGH + 1e-6) + LOW),
        ("quantiles", "lerobot", (X + 1) / 2 * HIGH + LOW),
    ],
)
def test_back(mode: str, convention: str, expected: np.ndarray) -> None:
    normalizer = make_normalizer("actions", mode, convention, STATS)
    np.testing.assert_allclose(normalizer.unnormalize(X), expected, rtol=1e-12)


finite = st.floats(-100, 100)


@given(
    arrays(np.float64, 5, elements=finite),
    arrays(np.float64, 5, elements=finite),
    arrays(np.float64, 5, elements=st.floats(10, 100)),
    st.sampled_from([("mean_std", "openpi"), ("quantiles", "openpi"), ("quantiles", "lerobot")]),
)
def test_there_and_back(x, low, spread, way) -> None:
    stats = {"mean": low, "std": spread, "q01": low, "q99": low + spread}
    normalizer = make_normalizer("state", *way, stats)
    np.testing.assert_allclose(
        normalizer.unnormalize(normalizer.normalize(x)), x, rtol=1e-9, atol=1e-9
    )


def test_statistics_wider_than_the_state_are_cut() -> None:
    normalizer = make_normalizer("state", "mean_std", "openpi", STATS)
    np.testing.assert_allclose(normalizer.normalize(X[:2]), ((X - LOW) / (HIGH + 1e-6))[:2])
    with pytest.raises(ObservationError, match="at most 3 values, .* found 4"):
        normalizer.normalize(np.zeros(4))


def test_actions_are_cut_to_the_statistics() -> None:
    normalizer = make_normalizer("actions", "mean_std", "openpi", STATS)
    assert normalizer.unnormalize(np.zeros((50, 32))).shape == (50, 3)


def test_no_spread() -> None:
    stats = {"mean": np.zeros(3), "std": np.array([1.0, 0.0, 1e-9])}
    normalizer = make_normalizer("state", "mean_std", "openpi", stats)
    assert (normalizer.flat(3), normalizer.flat(1)) == ([1, 2], [])


def test_batches() -> None:
    normalizer = make_normalizer("actions", "mean_std", "openpi", STATS)
    x = np.random.default_rng(0).normal(size=(2, 5, 3))
    np.testing.assert_array_equal(normalizer.normalize(x)[1, 2], normalizer.normalize(x[1, 2]))


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({"mean": LOW}, "expected mean and std for mode mean_std, found no std"),
        ({"mean": LOW, "std": HIGH[:2]}, r"found mean \[3\] and std \[2\]"),
        ({"mean": LOW, "std": HIGH * np.nan}, "expected finite values of std, found nan"),
        ({"mean": HIGH * 1e300, "std": HIGH}, r"expected mean below 1e\+30, found 5e\+299"),
    ],
)
def test_bad_statistics(stats: dict, message: str) -> None:
    with pytest.raises(Pi0Error, match=message):
        make_normalizer("state", "mean_std", "openpi", stats)


def write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def test_norm_stats_file(tmp_path: Path) -> None:
    one = {"mean": [0.0, 1.0], "std": [1.0, 2.0], "q01": None, "q99": None}
    path = write(
        tmp_path / "assets/physical-intelligence/libero/norm_stats.json",
        {"norm_stats": {"state": one, "actions": one}},
    )
    assert find_norm_stats(tmp_path) == path
    stats = read_norm_stats(path)
    assert stats["state"]["std"].tolist() == [1.0, 2.0]
    assert set(stats["actions"]) == {"mean", "std"}
    write(tmp_path / "assets/droid/norm_stats.json", {})
    with pytest.raises(
        Pi0Error, match=r"found 2 \(assets/droid, assets/physical-intelligence/libero\)"
    ):
        find_norm_stats(tmp_path)


@pytest.mark.parametrize("place", ["", "trossen/", "trossen/old/"])
def test_two_norm_stats_files(tmp_path: Path, place: str) -> None:
    one = {"mean": [0.0, 1.0], "std": [1.0, 2.0]}
    path = write(tmp_path / "assets/mine/norm_stats.json", {"state": one, "actions": one})
    write(tmp_path / place / "norm_stats.json", {"actions": one, "state": one})
    assert find_norm_stats(tmp_path) == path
    write(tmp_path / place / "norm_stats.json", {"state": one, "actions": {**one, "mean": [0, 2]}})
    found = f"found assets/mine/norm_stats.json and {place}norm_stats.json, which differ.*--norm-s"
    with pytest.raises(Pi0Error, match=found):
        find_norm_stats(tmp_path)
    with pytest.raises(Pi0Error, match=found):
        list_norm_stats(tmp_path)


def test_no_norm_stats(tmp_path: Path) -> None:
    with pytest.raises(Pi0Error, match="found none. Name the file with --norm-stats, or pass"):
        find_norm_stats(tmp_path)
    with pytest.raises(Pi0Error, match="found no file"):
        read_norm_stats(tmp_path / "norm_stats.json")
    with pytest.raises(Pi0Error, match="found a folder without one"):
        read_norm_stats(tmp_path)


@pytest.mark.parametrize(
    "value",
    [{}, {"norm_stats": {"state": {}}}, {"norm_stats": {"state": {"mean": ["a"]}, "actions": {}}}],
)
def test_bad_norm_stats(tmp_path: Path, value: object) -> None:
    with pytest.raises(Pi0Error, match="norm_stats.json: "):
        read_norm_stats(write(tmp_path / "norm_stats.json", value))


@pytest.mark.parametrize("odd", ["1.0", True, None, [1.0], {}, 10**400])
def test_statistics_that_are_no_numbers(tmp_path: Path, odd: object) -> None:
    """numpy would read most of them as one."""
    table = {"mean": [0.0, odd], "std": [1.0, 1.0]}
    path = write(tmp_path / "norm_stats.json", {"state": table, "actions": table})
    with pytest.raises(Pi0Error, match=r"state.mean: expected a list of numbers, .* found "):
        read_norm_stats(path)


def test_the_nearest_folder_tells_whose_statistics_they_are(
    tiny_path: Path, tmp_path: Path
) -> None:
    checkpoint = replace(open_checkpoint(tiny_path), path=tmp_path / "droid")
    path = write(tmp_path / "droid/assets/trossen/libero/norm_stats.json", {})
    for named in (None, path, path.parent):
        assert find_origin(checkpoint, named) == "libero"
    path.parents[1].rename(tmp_path / "droid/assets/mine")
    path.parents[2].joinpath("mine", "libero").rename(tmp_path / "droid/assets/mine/seed_0")
    assert find_origin(checkpoint, None) is None
