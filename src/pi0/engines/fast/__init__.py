"""π0 without the work that has no effect, for CPUs and CUDA devices.

`network.py` is the arithmetic, once for all devices; it calls the few operations of `kernels.py`,
which the engines replace by faster ones. `plan.py` says which tokens take part, `weights.py` packs
a checkpoint, `weight_cache.py` keeps packed weights in a file. `cpu/` and `cuda/` are the engines,
each with its kernels.
"""
