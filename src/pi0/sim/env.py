"""The tabletop as a Gymnasium environment: `gymnasium.make("pi0/Tabletop-v0")`.

    observation  the robot table `tabletop`: two pictures [S, S, 3] uint8, a state [5] float32
    action       [4] float32: the fingertips' move in units of 3 cm, and the gripper (above 0 open,
                 else closed); ten a second. Beyond [-1, 1] it is clipped: 3 cm is the greatest move
    reward       1 when what the sentence says is done, which ends the episode
    info         prompt, task, success, wrong, moved, target_position, goal_position

The seed of `reset` alone decides an episode, together with what its options ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict
from numpy.typing import NDArray

from pi0.errors import ConfigError, ObservationError
from pi0.sim.arm import WIDTH
from pi0.sim.layout import draw_instruction, draw_layout, other_instruction
from pi0.sim.scene import HALF_CUBE, REACH, TICK, Scene
from pi0.sim.tasks import DIRECTIONS, PUSHED, VERBS, Instruction, check_task, done, wrong

Floats = NDArray[np.float64]
Observation = dict[str, Any]

IMAGE_SIZE = 112
MOVE = 0.03  # metres of an action of 1
FILM = (480, 640)  # pixels, height and width, of what `render` gives
RISE = 0.1  # metres, to where a lifted cube is to be
OPTIONS = {"task", "instruction"}


class TabletopEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """A Panda over a table with three of four cubes, a bowl and a plate.

    Args:
        image_size: pixels along a side of both cameras' pictures.
        render_mode: "rgb_array" or None.
    """

    metadata = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": round(1 / TICK),
        "robot": "tabletop",  # whose keys the observations have
    }
    tasks = VERBS

    def __init__(self, image_size: int = IMAGE_SIZE, render_mode: str | None = None) -> None:
        self.scene = Scene()
        if not 1 <= image_size <= self.scene.most_pixels:
            raise ConfigError(
                f"image_size: expected 1 to {self.scene.most_pixels} pixels, found {image_size}."
            )
        self.render_mode = render_mode
        self.image_size = image_size
        picture = Box(0, 255, (image_size, image_size, 3), np.uint8)
        low = np.array([*REACH[0], 0, 0], np.float32)
        high = np.array([*REACH[1], 1, 1.1 * WIDTH], np.float32)
        self.observation_space = Dict(
            {
                "observation/image": picture,
                "observation/wrist_image": picture,
                "observation/state": Box(low, high, dtype=np.float32),
            }
        )
        self.action_space = Box(-1, 1, (4,), np.float32)
        self.instruction = Instruction("lift", "red", "")
        self.task = "lift"
        self._start: Mapping[str, Floats] = {}
        self._started = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begins an episode.

        Args:
            options: "task", one of `pi0.sim.tasks.TASKS`; "instruction": "swapped" gives another
                sentence that the same scene allows, by which success is then judged.

        Raises:
            ConfigError: an option that there is not.
        """
        super().reset(seed=seed)
        options = options or {}
        unknown = set(options) - OPTIONS
        swap = options.get("instruction")
        if unknown or swap not in (None, "swapped"):
            raise ConfigError(
                'options: expected "task" and "instruction": "swapped", found '
                f"{', '.join(f'{key}: {value!r}' for key, value in options.items())}."
            )
        self.task = check_task(options.get("task") or VERBS[self.np_random.integers(len(VERBS))])
        self.instruction, colors = draw_instruction(self.task, self.np_random)
        layout, allowed = draw_layout(self.instruction, colors, self.np_random)
        if swap:
            self.instruction = other_instruction(self.instruction, allowed, self.np_random)
        self.scene.reset(layout, self.np_random)
        self._start = self.scene.cubes()
        self._started = True
        return self._observe(), self._info()

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Executes one action for a tenth of a second.

        Raises:
            ObservationError: not four finite numbers.
        """
        if not self._started:
            raise ObservationError("step: expected reset before it, found none.")
        values = np.asarray(action, np.float64)
        if values.shape != (4,) or not np.isfinite(values).all():
            raise ObservationError(f"action: expected 4 finite numbers, found {values.tolist()}.")
        self.scene.step(np.clip(values[:3], -1, 1) * MOVE, float(values[3] > 0))
        info = self._info()
        success = info["success"]
        return self._observe(), float(success), success, False, info

    def render(self) -> NDArray[np.uint8] | None:
        """A picture [480, 640, 3] from beside the table camera, for films."""
        return self.scene.picture("film", *FILM) if self.render_mode else None

    def close(self) -> None:
        self.scene.close()

    def _observe(self) -> Observation:
        size = self.image_size
        return {
            "observation/image": self.scene.picture("table", size, size),
            "observation/wrist_image": self.scene.picture("wrist", size, size),
            "observation/state": self.scene.state,
        }

    def _info(self) -> dict[str, Any]:
        scene, instruction = self.scene, self.instruction
        cubes, places = scene.cubes(), scene.places()
        judged = (instruction, self._start, cubes, places)
        success = done(*judged, released=scene.opening > 0)
        return {
            "prompt": instruction.prompt,
            "task": self.task,
            "success": success,
            "wrong": not success and wrong(*judged),
            "moved": {color: now - self._start[color] for color, now in cubes.items()},
            "target_position": cubes[instruction.color],
            "goal_position": self._goal(places),
        }

    def _goal(self, places: Mapping[str, Floats]) -> Floats:
        """Where the named cube is to be, [3] metres."""
        start, goal = self._start[self.instruction.color], self.instruction.goal
        if self.instruction.verb == "lift":
            there, further = start, np.array([0, 0, RISE])
        elif self.instruction.verb == "put":
            there, further = places[goal], np.array([0, 0, HALF_CUBE])
        else:
            there, further = start, np.append(DIRECTIONS[goal] * PUSHED, 0)
        return np.asarray(there + further)
