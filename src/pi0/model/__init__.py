"""The published π0 model in plain PyTorch.

Reading order: `pi0.py` (the whole), `gemma.py`, `siglip.py` (the parts), `flow.py` (time and the
sampler), `precision.py` (dtypes).
"""

from pi0.model.gemma import Tap
from pi0.model.pi0 import STAGES, Pi0, PrefixCache

__all__ = ["STAGES", "Pi0", "PrefixCache", "Tap"]
