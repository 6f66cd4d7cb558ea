"""LeRobot's processor files as programs: what a checkpoint of LeRobot does around its model."""

from pi0.policy.lerobot.program import LerobotProgram, has_processors, is_lerobot, read_program
from pi0.policy.lerobot.robot import robot_of, unread_relative
from pi0.policy.lerobot.statistics import lerobot_normalizer

__all__ = [
    "LerobotProgram",
    "has_processors",
    "is_lerobot",
    "lerobot_normalizer",
    "read_program",
    "robot_of",
    "unread_relative",
]
