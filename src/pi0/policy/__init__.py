"""From a robot's observation to its actions: images, prompt, state, normalisation, robots."""

from pi0.policy.policy import Policy
from pi0.policy.robots import ROBOTS, Camera, Robot

__all__ = ["ROBOTS", "Camera", "Policy", "Robot"]
