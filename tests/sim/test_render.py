"""Drawing beside other libraries."""

import importlib.util
import subprocess
import sys

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_pictures_do_not_break_triton():
    """Triton's LLVM after Mesa's ended the process."""
    script = (
        "from pi0.sim.env import TabletopEnv\n"
        "TabletopEnv(image_size=16).reset(seed=0)\n"
        "import triton, torch._dynamo\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
