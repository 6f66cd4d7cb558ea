"""pi0: run π0 (pi-zero) robot policies, and know that they are right.

    from pi0 import Policy
    policy = Policy.from_checkpoint("pi0_base")
    actions = policy.infer({"images": {"base": image}, "state": state, "prompt": "..."})["actions"]

Importing this package imports nothing heavy; a name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pi0.checkpoint.load import load_model, open_checkpoint
    from pi0.config import PRESETS, Pi0Config
    from pi0.engines.base import make_engine
    from pi0.errors import Pi0Error
    from pi0.inputs import ModelInputs
    from pi0.model import Pi0
    from pi0.policy import ROBOTS, ActionBuffer, Camera, Policy, RealTimeChunking, Robot

__version__ = "0.1.0"

_HOMES = {
    "ActionBuffer": "pi0.policy",
    "Camera": "pi0.policy",
    "ModelInputs": "pi0.inputs",
    "PRESETS": "pi0.config",
    "Pi0": "pi0.model",
    "Pi0Config": "pi0.config",
    "Pi0Error": "pi0.errors",
    "Policy": "pi0.policy",
    "ROBOTS": "pi0.policy",
    "RealTimeChunking": "pi0.policy",
    "Robot": "pi0.policy",
    "load_model": "pi0.checkpoint.load",
    "make_engine": "pi0.engines.base",
    "open_checkpoint": "pi0.checkpoint.load",
}
__all__ = [
    "PRESETS",
    "ROBOTS",
    "ActionBuffer",
    "Camera",
    "ModelInputs",
    "Pi0",
    "Pi0Config",
    "Pi0Error",
    "Policy",
    "RealTimeChunking",
    "Robot",
    "__version__",
    "load_model",
    "make_engine",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pi0' has no attribute {name!r}")
