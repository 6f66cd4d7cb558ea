"""From a robot's observation to its actions: images, prompt, state, normalisation, robots."""

from pi0.engines.fastest import choose_engine
from pi0.policy.chunking import ActionBuffer
from pi0.policy.encoded import Encoded, Sampled
from pi0.policy.limits import ActionLimits
from pi0.policy.pipeline import Pipeline
from pi0.policy.policy import Policy
from pi0.policy.realtime import RealTimeChunking
from pi0.policy.recipe import PolicyRecipe
from pi0.policy.resolve import prepare
from pi0.policy.robot import Camera, Robot
from pi0.policy.robots import ROBOTS, find_robot
from pi0.policy.setup import PolicyOptions, PolicySetup

__all__ = [
    "ROBOTS",
    "ActionBuffer",
    "ActionLimits",
    "Camera",
    "Encoded",
    "Pipeline",
    "Policy",
    "PolicyOptions",
    "PolicyRecipe",
    "PolicySetup",
    "RealTimeChunking",
    "Robot",
    "Sampled",
    "choose_engine",
    "find_robot",
    "prepare",
]
