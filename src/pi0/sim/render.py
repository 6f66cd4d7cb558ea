"""MuJoCo, drawing without a screen: through EGL, else OSMesa.

MuJoCo reads from MUJOCO_GL how to draw when it is imported; where the user has not set it, it is
chosen here. The other modules take MuJoCo from here. Mesa draws in the calling thread: a process
that is forked later, as by Gymnasium's AsyncVectorEnv, would wait for ever for Mesa's own threads,
which it does not have.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import os
import warnings

from pi0.errors import Pi0Error, install_hint

INSTALL = "apt-get install libegl1 libgl1-mesa-dri (or libosmesa6)"


def choose_backend() -> str:
    """The way of drawing, set in MUJOCO_GL: what is set already, else "egl" or "osmesa".

    Warns where it must fall back on OSMesa.

    Raises:
        Pi0Error: neither is on this machine.
    """
    if os.environ.get("MUJOCO_GL"):
        return os.environ["MUJOCO_GL"]
    if _has_egl_device():
        backend = "egl"
    elif ctypes.util.find_library("OSMesa"):
        backend = "osmesa"
        warnings.warn(
            "simulator: no EGL device was found, OSMesa draws instead, somewhat slower.",
            stacklevel=2,
        )
    else:
        raise Pi0Error(f"simulator: expected EGL or OSMesa to draw with, found neither. {INSTALL}.")
    os.environ["MUJOCO_GL"] = backend
    return backend


def _has_egl_device() -> bool:
    name = ctypes.util.find_library("EGL")
    if name is None:
        return False
    egl = ctypes.CDLL(name)
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    if not address:
        return False
    query = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)
    )(address)
    count = ctypes.c_int()
    return bool(query(0, None, ctypes.byref(count))) and count.value > 0


os.environ.setdefault("LP_NUM_THREADS", "0")  # of Mesa's llvmpipe
choose_backend()
with contextlib.suppress(ImportError):
    # Mesa and Triton each bring an LLVM: the process ends if Mesa's is loaded first, and PyTorch
    # may load Triton at any time.
    import triton._C.libtriton  # noqa: F401

try:
    import mujoco as mujoco
except ImportError as error:
    raise Pi0Error(
        f"simulator: expected the package mujoco, found none. {install_hint('sim')}"
    ) from error
