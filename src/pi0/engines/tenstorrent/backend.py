"""The seam: where the network's operations run.

A handle is a tensor of a backend; it has a `shape`. Operations are named as in TTNN and take
handles, numbers and TTNN's own options. Names of dtypes are TTNN's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Handle = Any


@dataclass(frozen=True)
class Grid:
    """Compute cores of a device."""

    x: int
    y: int

    @property
    def cores(self) -> int:
        return self.x * self.y


@dataclass(frozen=True)
class Upload:
    """A tensor on its way to the backend, in the dtype and layout it will have there."""

    value: Tensor
    dtype: str
    tiled: bool = True


class Backend(ABC):
    """Runs TTNN operations.

    Attributes:
        ttnn: the library.
        arch: TTNN's name of the architecture.
        grid: the cores that programs are laid out for.
        stage: what the network is computing, for error messages.
    """

    ttnn: Any
    arch: Any
    grid: Grid
    stage: str = ""

    @abstractmethod
    def put(self, upload: Upload) -> Handle:
        """Uploads a tensor."""

    @abstractmethod
    def get(self, handle: Handle) -> Tensor:
        """Reads a tensor back as float32."""

    @abstractmethod
    def dtype(self, handle: Handle) -> str:
        """A handle's dtype by its name in TTNN."""

    @abstractmethod
    def run(self, name: str, *args: Any, dtype: str | None = None, **options: Any) -> Any:
        """Runs an operation such as `transformer.scaled_dot_product_attention`.

        Raises:
            EngineError: TTNN rejects it; the sentence names the stage.
        """

    def option(self, path: str) -> Any:
        """A constant or class of the library by its name, e.g. `GeluVariant.Tanh`."""
        value = self.ttnn
        for part in path.split("."):
            value = getattr(value, part)
        return value
