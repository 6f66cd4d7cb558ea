"""Engine `cpu`: `engine.py`; its kernels in PyTorch (`int8.py`) and in C (`rows.c`, `products.c`,
compiled by `native.py` and called by `native_kernels.py`)."""
