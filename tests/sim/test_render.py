"""Drawing beside other libraries."""

import contextlib
import importlib.util
import os
import signal
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_draw():
    """They waited for ever for threads of the parent's Mesa."""
    script = (
        "import gymnasium, pi0.sim\n"
        "gymnasium.make('pi0/Tabletop-v0', image_size=16).reset(seed=0)\n"
        "envs = gymnasium.make_vec('pi0/Tabletop-v0', 2, 'async', {'context': 'fork'})\n"
        "envs.reset(seed=[0, 1], options={'task': 'lift'})\n"
        "envs.step(envs.action_space.sample())\n"
        "envs.close()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], start_new_session=True) as process:
        try:
            assert process.wait(timeout=120) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
