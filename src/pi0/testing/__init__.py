"""Conformance checks, for the tests of people who write an engine or describe a robot.

from pi0.testing import check_engine, check_robot

def test_mine():
    check_engine(MyEngine)
    check_robot(MY_ARM)
"""

from pi0.testing.engines import check_engine
from pi0.testing.robots import check_robot

__all__ = ["check_engine", "check_robot"]
