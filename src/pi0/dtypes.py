"""The names of the dtypes that the model itself runs in."""

from __future__ import annotations

import torch

from pi0.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name.

    Raises:
        ConfigError: neither float32 nor bfloat16.
    """
    if name == "float16":
        raise ConfigError(
            "dtype float16: π0's activations leave its range (65504). Use bfloat16 or float32."
        )
    if name not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, found {name!r}.")
    return DTYPES[name]
