"""How far engines without a mistake are from the reference: what the limits of verify come from.

Regenerate with `python benchmarks/verify_limits.py --python`, which says on what: the largest of
sizes tiny and small, in both cases, on trained-like synthetic weights.
"""

from __future__ import annotations

# (precision, part, stage) → largest relative L2 error, largest gain error.
CLEAN: dict[tuple[str, str, str], tuple[float, float]] = {}
