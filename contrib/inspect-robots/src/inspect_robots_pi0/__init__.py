"""π0 policies and Gymnasium environments for inspect-robots 0.60."""

from inspect_robots_pi0.embodiment import GymnasiumEmbodiment
from inspect_robots_pi0.policy import Pi0Policy
from inspect_robots_pi0.tasks import tabletop, wrong_object

__all__ = ["GymnasiumEmbodiment", "Pi0Policy", "tabletop", "wrong_object"]
