"""The Ray cluster that replicas run on: joined where there is one, else started here."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from pi0.errors import ConfigError, Pi0Error, install_hint

OBJECT_STORE = 200 << 20  # bytes, where Ray is started here; an observation is a few megabytes
NICENESS = "RAY_worker_niceness"
REACH = 10.0  # seconds in which a cluster that is named must take a connection


@dataclass(frozen=True)
class Scale:
    """How many replicas there are, and what each of them gets.

    Attributes:
        replicas: how many, or with `most` the fewest.
        most: the most replicas to grow to under load; None: always `replicas`.
        cpus, gpus: of a replica; CPUs are threads, too.
        name: of Ray's application, one for each server of a cluster.
    """

    replicas: int
    most: int | None = None
    cpus: int = 1
    gpus: int = 0
    name: str = "pi0"

    def __post_init__(self) -> None:
        """Raises ConfigError for numbers that contradict each other."""
        if self.most is not None and self.most < self.replicas:
            raise ConfigError(
                f"--max-replicas: expected at least --replicas ({self.replicas}), found "
                f"{self.most}."
            )


def require_ray() -> None:
    """Raises Pi0Error if Ray is not installed."""
    if find_spec("ray") is None:
        raise Pi0Error(
            "--replicas: expected the package ray, which the extra pi0[ray] brings, found none. "
            f"{install_hint('ray')}"
        )


def connect() -> bool:
    """Connects to Ray; whether one was started for that.

    Raises:
        Pi0Error: the cluster that RAY_ADDRESS names does not answer, or no Ray starts here.
    """
    import ray

    named = os.environ.get("RAY_ADDRESS")
    if named:
        _require_reachable(named)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:
            if named:
                raise
            os.environ.setdefault(NICENESS, "0")  # Ray's own is 15: behind everything else here
            ray.init(object_store_memory=OBJECT_STORE, include_dashboard=False, **quiet)
            return True
    except Exception as error:  # a node that is slow to start is an Exception, of no class
        where = f"a Ray cluster at RAY_ADDRESS, {named}" if named else "Ray to start here"
        raise Pi0Error(
            f"--replicas: expected {where}, found an error: {reason(error)}. Start it, or try "
            "again when the machine is less busy."
        ) from error
    return False


def _require_reachable(address: str) -> None:
    """Raises Pi0Error if nobody listens at HOST:PORT: Ray would try again for many minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not port.isdigit():  # "auto" or "local", which Ray knows
        return
    try:
        socket.create_connection((host, int(port)), REACH).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise Pi0Error(
            f"RAY_ADDRESS: expected a Ray cluster that answers at {address}, found none ({error}). "
            "Start it, or unset RAY_ADDRESS for a Ray on this machine."
        ) from error


def require_room(resources: Mapping[str, float], scale: Scale, leave: Callable[[], None]) -> None:
    """Leaves, and raises ConfigError, if the cluster can never hold that number: Ray would wait."""
    for what, each in (("CPU", scale.cpus), ("GPU", scale.gpus)):
        have = resources.get(what, 0)
        if each * scale.replicas > have:
            leave()
            raise ConfigError(
                f"--replicas: expected a Ray cluster with {each * scale.replicas} {what}s for "
                f"{scale.replicas} replicas, found {have:g}. Ask for fewer, or add machines."
            )


def reason(error: Exception) -> str:
    """The last line of what Ray says, which is the error itself."""
    lines = str(error).strip().splitlines()
    return (lines[-1] if lines else type(error).__name__).strip().rstrip(".")
