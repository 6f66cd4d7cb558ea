"""The processes that train together, one or several: started by torchrun, told by its variables."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from pi0.errors import ConfigError

PATIENCE = timedelta(hours=6)  # the first process may decode a dataset's videos


@dataclass(frozen=True)
class Processes:
    """This process among all that train together.

    Attributes:
        rank: of this one, from 0.
        count: of all.
        device: that this one computes on.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """This process's part of a batch.

        Raises:
            ConfigError: the batch cannot be shared equally.
        """
        if batch_size % self.count:
            raise ConfigError(
                f"batch_size: expected a multiple of the {self.count} processes, found "
                f"{batch_size}."
            )
        part = batch_size // self.count
        return slice(self.rank * part, (self.rank + 1) * part)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.count > 1:
            dist.all_reduce(values)
            values = values / self.count
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is set in at least one process."""
        if self.count == 1:
            return flag
        return bool(self.mean(torch.tensor([float(flag)], device=self.device)).item() > 0)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The block, in the first process before all others: for files that it makes."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


@contextlib.contextmanager
def join_processes(device: str | None) -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone.

    Args:
        device: cpu, cuda or cuda:N; None: a GPU if there is one.

    Raises:
        ConfigError: no such device.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    try:
        chosen = torch.device(name)
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device: expected cpu, cuda or cuda:N of this machine, found {name!r}."
        ) from error
    if count == 1:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes(rank, count, chosen)
    finally:
        dist.destroy_process_group()
