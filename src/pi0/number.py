"""What is a number in the places where people and files give one: true and false are none."""

from __future__ import annotations

from typing import TypeGuard

import numpy as np


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number of Python, such as of a JSON file."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a positive whole number of Python."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_whole(value: object) -> TypeGuard[int | np.integer]:
    """Whether a value is a whole number of Python or NumPy."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float | np.floating]:
    """Whether a value is a real number of Python or NumPy."""
    return is_whole(value) or isinstance(value, (float, np.floating))
