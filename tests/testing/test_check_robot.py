"""The conformance check of robots: built-in tables pass, broken ones are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0.errors import Pi0Error
from pi0.policy import ROBOTS
from pi0.testing import check_robot


@pytest.mark.parametrize("name", ROBOTS)
def test_built_in_robots(name: str) -> None:
    check_robot(name)
    check_robot(ROBOTS[name])


def in_place(x: np.ndarray) -> np.ndarray:
    x *= 2
    return x


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encode_state": in_place}, "encode_state: expected its input to stay as it is"),
        ({"encode_state": lambda x: x[..., :3]}, r"encode_state: expected float64 \[3, 14\]"),
        ({"encode_state": lambda x: x.astype(np.float32)}, "as it was given, found float32"),
        ({"encode_state": lambda x: x * np.inf}, "expected finite values for finite ones"),
        ({"encode_state": lambda x: x - x.mean()}, "the same of a row alone and in a batch"),
        ({"encode_actions": lambda x: x}, "to be each other's inverse, found values"),
    ],
)
def test_broken_conventions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_robot(replace(ROBOTS["aloha"], **changes))


def test_no_such_robot(tmp_path: Path) -> None:
    with pytest.raises(Pi0Error, match="found 'r2d2'"):
        check_robot("r2d2")
    with pytest.raises(Pi0Error, match="expected a TOML file"):
        check_robot(str(tmp_path / "arm.toml"))
