"""The tabletop as MuJoCo simulates and draws it: one model, of which each episode varies what it
shows.

Knows positions and pixels, not sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files

import numpy as np
from numpy.typing import NDArray

from pi0.errors import Pi0Error
from pi0.sim.arm import JOINTS, READY, WIDTH, Arm
from pi0.sim.render import INSTALL, mujoco
from pi0.sim.tasks import COLORS, PLACES

Floats = NDArray[np.float64]

TICK = 0.1  # seconds of a control step
HALF_CUBE = 0.018  # metres
# Metres in the robot's frame, least and greatest: where commanded fingertips may be.
REACH = np.array([[0.28, -0.36, 0.012], [0.74, 0.36, 0.32]])
TABLES = ("oak", "slate", "linen", "walnut", "stone")
AWAY = np.array([3.0, 0.0, -2.0])  # where cubes are that a scene does not show
SMOOTH = 200_000  # pixels from which pictures get smooth edges, which takes twice the time
CAMERA_SHIFT, CAMERA_TURN = 0.02, 0.02  # metres and radians, greatest, on each axis
LIGHT_SHIFT = 0.4  # metres


@dataclass(frozen=True)
class Layout:
    """What lies where when an episode begins: centres [2] on the table in metres, cubes with their
    turn in radians, and the fingertips [3]."""

    cubes: Mapping[str, tuple[Floats, float]]
    places: Mapping[str, Floats]
    hand: Floats


class Scene:
    """The simulated tabletop.

    Attributes:
        commanded: where the fingertips have been told to be, [3] metres.
        opening: what the gripper has been told, 1 open or 0 closed.
    """

    def __init__(self) -> None:
        with as_file(files("pi0.sim") / "assets") as folder:
            self.model = mujoco.MjModel.from_xml_path(str(folder / "tabletop.xml"))
        self.data = mujoco.MjData(self.model)
        self.arm = Arm(self.model)
        self._as_loaded = {
            name: getattr(self.model, name).copy()
            for name in ("cam_pos", "cam_quat", "light_pos", "light_diffuse")
        }
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}
        self._ticks = round(TICK / self.model.opt.timestep)
        self.commanded, self.opening = np.zeros(3), 1.0

    def reset(self, layout: Layout, rng: np.random.Generator) -> None:
        """Lays out an episode, with light, camera and table drawn from `rng`."""
        mujoco.mj_resetData(self.model, self.data)
        self._vary(rng)
        for name, centre in layout.places.items():
            self.model.body(name).pos = [*centre, 0]
        for color in COLORS:
            shown = color in layout.cubes
            centre, turn = layout.cubes[color] if shown else (AWAY, 0.0)
            position = [*centre, HALF_CUBE] if shown else AWAY
            half = turn / 2
            self.data.joint(color).qpos = [*position, np.cos(half), 0, 0, np.sin(half)]
            # One that is not shown stays where it is instead of falling for ever.
            body = self.model.body(color).id
            self.model.body_gravcomp[body] = 0.0 if shown else 1.0
        self.commanded, self.opening = layout.hand.copy(), 1.0
        joints = READY
        for _ in range(5):  # far from READY one call of a few iterations does not converge
            joints = self.arm.joints_at(self.commanded, joints)
        self.data.qpos[:JOINTS] = self.data.ctrl[:JOINTS] = joints
        self.data.qpos[JOINTS : JOINTS + 2] = WIDTH / 2
        self.data.ctrl[JOINTS] = 1
        mujoco.mj_forward(self.model, self.data)

    def step(self, move: Floats, opening: float) -> None:
        """One control step: the commanded fingertips are moved by [3] metres, from where they were
        commanded to be (from where they are they would lag behind), the gripper opens or closes."""
        self.commanded = np.clip(self.commanded + move, *REACH)
        self.opening = opening
        ctrl = self.data.ctrl
        goal = self.arm.joints_at(self.commanded, ctrl[:JOINTS])
        start = ctrl[:JOINTS].copy()
        for tick in range(self._ticks):  # a jump of the servos' target would throw cubes about
            ctrl[:JOINTS] = start + (goal - start) * (tick + 1) / self._ticks
            ctrl[JOINTS] = opening
            mujoco.mj_step(self.model, self.data)

    @property
    def most_pixels(self) -> int:
        """The greatest side of a square picture."""
        screen = self.model.vis.global_
        return int(min(screen.offwidth, screen.offheight))

    @property
    def state(self) -> NDArray[np.float32]:
        """[5]: commanded fingertips in metres, commanded opening, measured width in metres."""
        width = self.data.qpos[JOINTS : JOINTS + 2].sum()
        return np.array([*self.commanded, self.opening, width], np.float32)

    def cubes(self) -> dict[str, Floats]:
        """Centre [3] of each cube that the scene shows, in metres."""
        centres = {color: self.data.body(color).xpos.copy() for color in COLORS}
        return {color: centre for color, centre in centres.items() if centre[0] < AWAY[0] - 1}

    def places(self) -> dict[str, Floats]:
        """Centre [3] of bowl and plate on the table, in metres."""
        return {name: self.model.body(name).pos.copy() for name in PLACES}

    def in_picture(self, camera: str, point: Floats) -> Floats:
        """Where a point [3] in metres is in a camera's square picture: (u, v) in [0, 1] from the
        top left, if it is in it."""
        number = self.model.camera(camera).id
        rotation = self.data.cam_xmat[number].reshape(3, 3)
        x, y, z = rotation.T @ (point - self.data.cam_xpos[number])  # the camera looks along -z
        size = 2 * np.tan(np.radians(self.model.cam_fovy[number]) / 2) * -z
        return np.array([0.5 + x / size, 0.5 - y / size])

    def picture(self, camera: str, height: int, width: int) -> NDArray[np.uint8]:
        """[height, width, 3] of what a camera sees ("table", "wrist" or "film")."""
        renderer = self._renderer(height, width)
        renderer.update_scene(self.data, camera)
        return np.array(renderer.render())

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()

    def _renderer(self, height: int, width: int) -> mujoco.Renderer:
        if (height, width) not in self._renderers:
            self.model.vis.quality.offsamples = 4 if height * width >= SMOOTH else 0
            try:
                self._renderers[height, width] = mujoco.Renderer(self.model, height, width)
            except Exception as error:  # of whatever library draws
                raise Pi0Error(
                    f"simulator: expected to draw {width} × {height} pixels without a screen, "
                    f"found {type(error).__name__}: {error}. {INSTALL}; set MUJOCO_GL to egl or "
                    "osmesa."
                ) from error
        return self._renderers[height, width]

    def _vary(self, rng: np.random.Generator) -> None:
        """Draws the table's surface, the lamp, and where the table camera stands."""
        model, loaded = self.model, self._as_loaded
        for name, values in loaded.items():
            getattr(model, name)[:] = values
        table = TABLES[rng.integers(len(TABLES))]
        model.geom("table").matid = model.material(table).id
        lamp, camera = model.light("lamp").id, model.camera("table").id
        model.light_pos[lamp] += rng.uniform(-LIGHT_SHIFT, LIGHT_SHIFT, 3)
        model.light_diffuse[lamp] *= rng.uniform(0.7, 1.3)
        model.cam_pos[camera] += rng.uniform(-CAMERA_SHIFT, CAMERA_SHIFT, 3)
        turn = np.zeros(4)
        vector = rng.uniform(-CAMERA_TURN, CAMERA_TURN, 3)
        angle = float(np.linalg.norm(vector))
        mujoco.mju_axisAngle2Quat(turn, vector / angle, angle)
        mujoco.mju_mulQuat(model.cam_quat[camera], loaded["cam_quat"][camera], turn)
