"""LeRobot's policy type `pi0rt`: π0 and π0.5 checkpoints of LeRobot, computed by pi0's engines.

LeRobot finds the modules by their names: `configuration_`, `modeling_` and `processor_`.
"""

from lerobot_policy_pi0rt.configuration_pi0rt import Pi0rtConfig

__all__ = ["Pi0rtConfig"]
