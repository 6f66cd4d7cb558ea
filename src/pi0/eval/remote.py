"""A policy behind `pi0 serve`, as an evaluation sees it: over openpi's protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pi0.errors import ConfigError
from pi0.policy import Camera, Robot
from pi0.serve.client import ServerPolicy

NEEDED = ("robot", "noise_shape", "engine", "steps", "n_action_steps")  # of a greeting

if TYPE_CHECKING:
    from pi0.eval.plan import ServedPolicy


@dataclass(frozen=True)
class RemoteSurface:
    """What an environment is compared with; see `environment.Surface`."""

    robot: Robot
    action_dim: int
    rename: Mapping[str, str] = field(default_factory=dict)  # the server renames by itself


class RemotePolicy(ServerPolicy):
    """A connection, one robot's, with what the greeting says of the policy.

    Attributes:
        pipeline: keys of observations, and the number of actions.
        noise_shape, n_action_steps: see `Policy`.
        on_limit: for actions beyond the environment's action space; the server has its own.
        real_time: chunks continue the previous one; else the server is not asked to.
        metadata: the greeting, with the address as the checkpoint.
    """

    def __init__(self, options: ServedPolicy) -> None:
        """
        Raises:
            Pi0Error: there is no server, or it is none that this evaluation can use.
        """
        super().__init__(options.address, options.api_key)
        try:
            greeting = self.metadata
            found = [key for key in NEEDED if not greeting.get(key)]
            if found:
                raise ConfigError(
                    f"server {options.address}: expected the greeting of `pi0 serve`, found one "
                    f"without {found[0]}."
                )
            running = (greeting.get("real_time") or {}).get("jacobian")
            if options.real_time not in (None, running):
                raise ConfigError(
                    f"server {options.address}: expected one started with --real-time "
                    f"{options.real_time}, found {running or 'none'}."
                )
            robot = _robot(options.address, greeting["robot"])
        except BaseException:
            self.close()
            raise
        self.pipeline = RemoteSurface(robot, greeting["robot"]["action_dim"])
        self.noise_shape: tuple[int, int] = tuple(greeting["noise_shape"])
        self.n_action_steps: int = greeting["n_action_steps"]
        self.on_limit = options.on_limit
        self.real_time = options.real_time
        # A server of before there was a choice says no sampler: it was Euler's.
        self.metadata = {"sampler": "euler", **greeting, "checkpoint": options.address}


def _robot(address: str, table: Mapping[str, Any]) -> Robot:
    """The robot that a greeting describes, as far as a client needs it."""
    try:
        return Robot(
            name=table["name"],
            cameras=tuple(
                Camera(camera["key"], tuple(camera["names"]), camera["required"])
                for camera in table["cameras"]
            ),
            state=tuple(table["state"].items()),
            action_dim=table["action_dim"],
            action_names=tuple(table["action_names"]),
            action_units=tuple(table["action_units"]),
            control_hz=table["control_hz"],
        )
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise ConfigError(
            f"server {address}: expected the greeting of `pi0 serve`, found one whose table of "
            f"the robot cannot be read ({type(error).__name__}: {error})."
        ) from error
