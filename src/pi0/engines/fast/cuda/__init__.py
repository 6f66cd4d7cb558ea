"""Engine `cuda`: the fast network as one CUDA graph, with fused Triton kernels."""
