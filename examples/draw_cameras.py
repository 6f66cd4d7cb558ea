"""Draw the two synthetic camera pictures that the examples feed to the policy.

One small tabletop scene (wooden table, robot arm, red cube, blue bowl, green cylinder) is
described by signed distance functions and ray-marched with numpy, once from a camera in front
of the table and once from a camera in the gripper. No simulator, no assets, no randomness that
is not seeded: running it twice writes the same bytes.

    python examples/draw_cameras.py

writes cameras/base.png and cameras/wrist.png (640x480 RGB) next to this file. It needs only
numpy and Pillow, and takes about a minute.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Array = np.ndarray
Sdf = Callable[[Array], Array]  # points (3, n) -> distance to the surface (n,)

WIDTH, HEIGHT, SUPERSAMPLE = 640, 480, 2
OUT_DIR = Path(__file__).parent / "cameras"
NOISE_TABLE = np.random.default_rng(7).random((64, 64), dtype=np.float32)


def vec(*values: float) -> Array:
    """A column vector that broadcasts against points of shape (3, n)."""
    return np.array(values, np.float32)[:, None]


def unit(v: Array) -> Array:
    return v / np.sqrt((v * v).sum(0))


LIGHT = unit(vec(-0.55, -0.60, 1.0))
BASE, CUBE, BOWL, CAN = vec(-0.46, 0.20, 0), vec(0.12, -0.06, 0), vec(0.22, 0.09, 0), vec(0.37, -0.1, 0)
REACH = float(np.linalg.norm(CUBE - BASE))
ALONG = (CUBE - BASE) / REACH  # horizontal direction in which the arm reaches
ACROSS = vec(-ALONG[1, 0], ALONG[0, 0], 0)


# --- shapes -----------------------------------------------------------------------------------


def rounded(qx: Array, qy: Array, qz: Array | float, radius: float) -> Array:
    """Distance to a rounded box, from the distances to its (shrunk) faces along each axis."""
    outside = np.sqrt(np.maximum(qx, 0) ** 2 + np.maximum(qy, 0) ** 2 + np.maximum(qz, 0) ** 2)
    return outside + np.minimum(np.maximum(np.maximum(qx, qy), qz), 0) - radius


def box(centre: Array, half: tuple[float, float, float], forward: Array, radius: float) -> Sdf:
    """A box standing upright, its first side along the horizontal direction `forward`."""
    fx, fy = forward[0, 0], forward[1, 0]

    def distance(p: Array) -> Array:
        x, y, z = p - centre
        qx = np.abs(x * fx + y * fy) - half[0] + radius
        qy = np.abs(y * fx - x * fy) - half[1] + radius
        return rounded(qx, qy, np.abs(z) - half[2] + radius, radius)

    return distance


def tube(start: Array, end: Array, thickness: float, radius: float = 0.008) -> Sdf:
    """A solid cylinder between two points, its rims rounded."""
    axis, half = unit(end - start), float(np.linalg.norm(end - start)) / 2

    def distance(p: Array) -> Array:
        q = p - (start + end) / 2
        t = (q * axis).sum(0)
        across = np.sqrt(np.maximum((q * q).sum(0) - t * t, 0))
        return rounded(across - thickness + radius, np.abs(t) - half + radius, -1.0, radius)

    return distance


def bowl(centre: Array, size: float, cut: float, thickness: float) -> Sdf:
    """A hollow sphere standing on the table, open above `cut` over its middle."""
    rim = float(np.sqrt(size * size - cut * cut))

    def distance(p: Array) -> Array:
        x, y, z = p - centre - vec(0, 0, size + thickness)
        r = np.sqrt(x * x + y * y)
        at_rim = np.sqrt((r - rim) ** 2 + (z - cut) ** 2)
        at_wall = np.abs(np.sqrt(r * r + z * z) - size)
        return np.where(cut * r < rim * z, at_rim, at_wall) - thickness

    return distance


def arm_point(along: float, up: float, side: float = 0.0) -> Array:
    """A point in the plane of the arm, `side` off that plane."""
    return BASE + ALONG * along + ACROSS * side + vec(0, 0, up)


def build_scene() -> list[tuple[str, Sdf]]:
    """Every solid of the scene with the name of its material."""
    x_axis, tilted = vec(1, 0, 0), vec(np.cos(0.5), np.sin(0.5), 0)
    shoulder, elbow, wrist = (0.0, 0.17), (0.17, 0.50), (REACH - 0.06, 0.40)
    scene: list[tuple[str, Sdf]] = [
        ("wood", box(vec(0, -0.1, -0.025), (0.82, 0.6, 0.025), x_axis, 0.006)),
        ("wall", lambda p: 0.95 - p[1]),
        ("floor", lambda p: p[2] + 0.75),
        ("red", box(CUBE + vec(0, 0, 0.028), (0.028, 0.028, 0.028), tilted, 0.003)),
        ("blue", bowl(BOWL, 0.085, -0.018, 0.004)),
        ("green", tube(CAN, CAN + vec(0, 0, 0.11), 0.034, 0.004)),
        ("dark", tube(arm_point(0, 0), arm_point(0, 0.03), 0.085)),
        ("white", tube(arm_point(0, 0.03), arm_point(0, 0.20), 0.062, 0.02)),
    ]
    for (along, up), size in ((shoulder, 0.058), (elbow, 0.048), (wrist, 0.037)):
        scene.append(("white", tube(arm_point(along, up, -0.06), arm_point(along, up, 0.06), size, 0.012)))
        scene.append(("cap", tube(arm_point(along, up, -0.068), arm_point(along, up, 0.068), size * 0.8)))
    hand = (REACH, 0.40)
    scene += [
        ("white", tube(arm_point(*shoulder), arm_point(*elbow), 0.044)),
        ("white", tube(arm_point(*elbow), arm_point(*wrist), 0.035)),
        ("white", tube(arm_point(*wrist), arm_point(*hand), 0.031)),
        ("white", tube(arm_point(REACH, 0.44), arm_point(REACH, 0.27), 0.034, 0.012)),
        ("cap", tube(arm_point(REACH, 0.30), arm_point(REACH, 0.31), 0.036, 0.003)),
        ("dark", tube(arm_point(REACH, 0.275), arm_point(REACH, 0.235), 0.030, 0.004)),
        ("dark", box(arm_point(REACH, 0.215), (0.068, 0.030, 0.020), ALONG, 0.008)),
    ]
    for sign in (-1, 1):
        finger = arm_point(REACH + sign * 0.056, 0.14)
        scene.append(("dark", box(finger, (0.008, 0.014, 0.07), ALONG, 0.004)))
        pad = arm_point(REACH + sign * 0.046, 0.092)
        scene.append(("pad", box(pad, (0.004, 0.012, 0.022), ALONG, 0.002)))
    return scene


# --- materials: colour (linear RGB), strength and sharpness of the highlight ------------------

MATERIALS: dict[str, tuple[tuple[float, float, float], float, float]] = {
    "wood": ((0.46, 0.255, 0.125), 0.10, 30),
    "wall": ((0.66, 0.65, 0.61), 0.0, 1),
    "floor": ((0.22, 0.21, 0.20), 0.0, 1),
    "red": ((0.68, 0.035, 0.03), 0.20, 40),
    "blue": ((0.03, 0.13, 0.50), 0.45, 90),
    "green": ((0.05, 0.36, 0.10), 0.25, 50),
    "white": ((0.70, 0.71, 0.72), 0.25, 50),
    "cap": ((0.09, 0.22, 0.34), 0.25, 50),
    "dark": ((0.035, 0.037, 0.042), 0.25, 30),
    "pad": ((0.16, 0.16, 0.16), 0.05, 10),
}


def smooth_noise(x: Array, y: Array) -> Array:
    """Value noise in [0, 1]: a random lattice, smoothly interpolated."""
    i, j = np.floor(x).astype(int), np.floor(y).astype(int)
    u, v = x - i, y - j
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    i, j, i1, j1 = i % 64, j % 64, (i + 1) % 64, (j + 1) % 64
    low = NOISE_TABLE[i, j] * (1 - u) + NOISE_TABLE[i1, j] * u
    return low * (1 - v) + (NOISE_TABLE[i, j1] * (1 - u) + NOISE_TABLE[i1, j1] * u) * v


def wood_shade(p: Array) -> Array:
    """Brightness of the table top: planks along x, each with its own tone and grain."""
    plank = np.floor(p[1] / 0.13)
    x, y = p[0] + plank * 3.7, p[1]
    bend = smooth_noise(x * 2.5, y * 9)
    rings = 0.5 + 0.5 * np.sin(6.28 * (y * 26 + bend * 4.5))
    fibre = smooth_noise(x * 9, y * 230)
    tone = smooth_noise(plank * 5.3, plank * 2.1 + 0.5)
    seam = np.clip(np.abs(p[1] / 0.13 - np.round(p[1] / 0.13)) / 0.012, 0, 1)
    return (0.74 + 0.28 * tone + 0.15 * rings + 0.12 * fibre) * (0.55 + 0.45 * seam)


# --- rendering --------------------------------------------------------------------------------


def nearest(scene: list[tuple[str, Sdf]], p: Array) -> Array:
    distance = scene[0][1](p)
    for _, sdf in scene[1:]:
        np.minimum(distance, sdf(p), out=distance)
    return distance


def march(scene: list[tuple[str, Sdf]], origin: Array, rays: Array) -> Array:
    """How far each ray travels until it meets a surface."""
    t = np.full(rays.shape[1], 0.01, np.float32)
    active = np.arange(t.size)
    for _ in range(140):
        step = nearest(scene, origin + rays[:, active] * t[active])
        t[active] += step
        active = active[(step > 3e-4 * t[active]) & (t[active] < 6)]
        if active.size == 0:
            break
    return t


def soft_shadow(scene: list[tuple[str, Sdf]], p: Array) -> Array:
    """Share of the key light that reaches each point, with a penumbra that grows."""
    t, light = np.full(p.shape[1], 0.006, np.float32), np.ones(p.shape[1], np.float32)
    active = np.arange(t.size)
    for _ in range(60):
        gap = nearest(scene, p[:, active] + LIGHT * t[active])
        light[active] = np.minimum(light[active], 0.5 + 0.5 * gap / (0.09 * t[active]))
        t[active] += np.clip(np.abs(gap), 0.006, 0.06)
        active = active[(light[active] > 0.0) & (t[active] < 0.95)]
        if active.size == 0:
            break
    light = np.clip(light, 0, 1)
    return light * light * (3 - 2 * light)


def shade(scene: list[tuple[str, Sdf]], p: Array, rays: Array) -> Array:
    """Colour (linear RGB) of the surface points that the rays have met."""
    which = np.argmin([sdf(p) for _, sdf in scene], axis=0)
    table = [MATERIALS[name] for name, _ in scene]
    colour = np.array([m[0] for m in table], np.float32)[which].T
    gloss = np.array([m[1] for m in table], np.float32)[which]
    sharpness = np.array([m[2] for m in table], np.float32)[which]
    wooden = which == 0
    colour[:, wooden] *= wood_shade(p[:, wooden])

    corners = [vec(1, -1, -1), vec(-1, -1, 1), vec(-1, 1, -1), vec(1, 1, 1)]
    normal = unit(sum(c * nearest(scene, p + 6e-4 * c) for c in corners))
    p = p + normal * 2e-3
    opening = sum(nearest(scene, p + normal * h) / (h * 3) for h in (0.015, 0.05, 0.12))
    opening = np.clip(opening, 0, 1)

    key = np.maximum((normal * LIGHT).sum(0), 0) * soft_shadow(scene, p)
    fill = np.maximum((normal * unit(vec(0.8, -0.7, 0.35))).sum(0), 0) * 0.16
    sky = (0.30 + 0.14 * normal[2]) * (0.25 + 0.75 * opening)
    highlight = np.maximum((normal * unit(LIGHT - rays)).sum(0), 0) ** sharpness * gloss * key
    warm, cool = vec(1.0, 0.95, 0.87), vec(0.93, 0.98, 1.06)
    return colour * (1.05 * key * warm + (sky + fill * opening) * cool) + highlight * 0.8


def render(scene: list[tuple[str, Sdf]], eye: Array, target: Array, up: Array, fov: float) -> Image.Image:
    """The picture a pinhole camera at `eye` takes; `fov` is its vertical angle in degrees."""
    forward = unit(target - eye)
    right = unit(np.cross(forward, up, axis=0))
    width, height = WIDTH * SUPERSAMPLE, HEIGHT * SUPERSAMPLE
    across = ((np.arange(width, dtype=np.float32) + 0.5) * 2 - width) / height
    down = ((np.arange(height, dtype=np.float32) + 0.5) * 2 - height) / height
    scale = np.float32(np.tan(np.radians(fov) / 2))
    strips = []
    for rows in np.split(down, height // 48):
        gx, gy = (g.ravel() for g in np.meshgrid(across, rows))
        rays = unit(forward + scale * (right * gx - np.cross(right, forward, axis=0) * gy))
        points = eye + rays * march(scene, eye, rays)
        vignette = 1 - 0.09 * (gx * gx + gy * gy)
        strips.append((shade(scene, points, rays) * vignette).T.reshape(len(rows), width, 3))
    linear = np.concatenate(strips)
    srgb = np.clip(linear / (1 + 0.12 * linear), 0, 1) ** (1 / 2.2)
    full = Image.fromarray(np.round(srgb * 255).astype(np.uint8))
    return full.resize((WIDTH, HEIGHT), Image.Resampling.BOX)


def main() -> None:
    scene = build_scene()
    up = vec(0, 0, 1)
    palm = arm_point(REACH - 0.004, 0.19)
    views = {
        "base": render(scene, vec(0.22, -1.12, 0.66), vec(-0.04, 0.1, 0.17), up, 43),
        "wrist": render(scene, palm, palm + ALONG * 0.01 - up * 0.17, ALONG, 74),
    }
    OUT_DIR.mkdir(parents=True, exist_ok=True)
    for name, picture in views.items():
        picture.save(OUT_DIR / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
