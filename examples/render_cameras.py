"""Renders the two sample camera pictures: `python examples/render_cameras.py`.

A table with a red cube, a blue bowl, a green cylinder and a robot arm, sphere-traced with NumPy:
what a camera beside the table sees (cameras/base.png) and one at the gripper (cameras/wrist.png).
Deterministic. Lengths are metres, y is up.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]

WIDTH, HEIGHT, OVERSAMPLING = 640, 480, 2
STEPS, OUTLIER_SIGMA, NEAR_ENOUGH = 110, 4.0, 4e-4
LIGHT = np.array([0.45, 0.8, 0.4], np.float32)
LIGHT /= np.linalg.norm(LIGHT)
OUT = Path(__file__).parent / "cameras"

SHOULDER, ELBOW = (-0.42, 0.34, -0.12), (-0.22, 0.62, 0.0)
WRIST, HAND = (0.02, 0.40, 0.06), (0.03, 0.26, 0.07)


def box(
    p: Floats, centre: tuple[float, ...], half: tuple[float, ...], turn: float, r: float
) -> Floats:
    """Distance to a box turned about y, its edges rounded by r."""
    q = p - np.array(centre, np.float32)
    c, s = np.cos(turn), np.sin(turn)
    x, z = c * q[:, 0] - s * q[:, 2], s * q[:, 0] + c * q[:, 2]
    d = np.abs(np.stack([x, q[:, 1], z], 1)) - np.array(half, np.float32) + r
    return np.linalg.norm(np.maximum(d, 0), axis=1) + np.minimum(d.max(1), 0) - r


def capsule(p: Floats, a: tuple[float, ...], b: tuple[float, ...], radius: float) -> Floats:
    start, way = np.array(a, np.float32), np.array(b, np.float32) - np.array(a, np.float32)
    t = np.clip((p - start) @ way / (way @ way), 0, 1)[:, None]
    return np.linalg.norm(p - start - t * way, axis=1) - radius


def cylinder(p: Floats, centre: tuple[float, ...], radius: float, half: float) -> Floats:
    q = p - np.array(centre, np.float32)
    d = np.stack([np.hypot(q[:, 0], q[:, 2]) - radius, np.abs(q[:, 1]) - half], 1)
    return np.linalg.norm(np.maximum(d, 0), axis=1) + np.minimum(d.max(1), 0)


def bowl(p: Floats, centre: tuple[float, ...], radius: float, wall: float) -> Floats:
    """A hollow half sphere, open above."""
    q = p - np.array(centre, np.float32)
    shell = np.abs(np.linalg.norm(q, axis=1) - radius) - wall
    return np.maximum(shell, q[:, 1])


def scene(p: Floats) -> list[tuple[Floats, tuple[float, float, float]]]:
    """(distance, colour) of every thing."""
    joints = [cylinder(p, (-0.42, 0.06, -0.12), 0.09, 0.06)]
    joints += [
        np.linalg.norm(p - np.array(j, np.float32), axis=1) - 0.055 for j in (SHOULDER, ELBOW)
    ]
    joints += [np.linalg.norm(p - np.array(WRIST, np.float32), axis=1) - 0.045]
    links = [
        capsule(p, (-0.42, 0.1, -0.12), SHOULDER, 0.05),
        capsule(p, SHOULDER, ELBOW, 0.04),
        capsule(p, ELBOW, WRIST, 0.034),
        capsule(p, WRIST, HAND, 0.028),
    ]
    fingers = [
        box(p, HAND, (0.06, 0.016, 0.022), 0.35, 0.006),
        box(p, (-0.015, 0.205, 0.053), (0.008, 0.05, 0.014), 0.35, 0.003),
        box(p, (0.075, 0.205, 0.087), (0.008, 0.05, 0.014), 0.35, 0.003),
    ]
    return [
        (np.maximum(np.abs(p[:, 1] + 0.02) - 0.02, np.abs(p[:, 0]) - 0.8), (0.72, 0.53, 0.36)),
        (p[:, 2] + 0.75, (0.86, 0.87, 0.84)),
        (np.minimum.reduce(links), (0.93, 0.93, 0.95)),
        (np.minimum.reduce(joints), (0.95, 0.55, 0.16)),
        (np.minimum.reduce(fingers), (0.16, 0.17, 0.2)),
        (box(p, (0.04, 0.035, 0.09), (0.035, 0.035, 0.035), 0.45, 0.004), (0.85, 0.13, 0.12)),
        (bowl(p, (0.29, 0.095, 0.02), 0.095, 0.006), (0.16, 0.38, 0.8)),
        (cylinder(p, (-0.13, 0.06, 0.23), 0.032, 0.06), (0.2, 0.6, 0.3)),
    ]


def distance(p: Floats) -> Floats:
    return np.minimum.reduce([d for d, _ in scene(p)])


def march(origin: Floats, direction: Floats, steps: int, far: float) -> Floats:
    """How far each ray goes before it meets something, at most `far`."""
    travelled = np.full(len(origin), 2e-3, np.float32)
    alive = np.arange(len(origin))
    for _ in range(steps):
        d = distance(origin[alive] + travelled[alive, None] * direction[alive])
        travelled[alive] += d
        alive = alive[(d > NEAR_ENOUGH) & (travelled[alive] < far)]
        if not len(alive):
            break
    return travelled


def shade(p: Floats, direction: Floats) -> Floats:
    """Colours [N, 3] in [0, 1] of the surface points that rays met."""
    things = scene(p)
    which = np.argmin([d for d, _ in things], axis=0)
    colour = np.array([c for _, c in things], np.float32)[which]
    grain = 0.03 * np.sin(90 * p[:, 2] + 6 * np.sin(7 * p[:, 0])) + 0.02 * np.sin(310 * p[:, 2])
    colour += np.where(which == 0, grain, 0)[:, None]
    eps = np.eye(3, dtype=np.float32) * 1e-3
    normal = np.stack([distance(p + e) - distance(p - e) for e in eps], 1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    lit = np.clip(normal @ LIGHT, 0, 1)
    sun = np.broadcast_to(LIGHT, p.shape).astype(np.float32)
    lit *= march(p + 3e-3 * normal, sun, 40, 1.5) >= 1.5
    openness = np.clip(distance(p + 0.05 * normal) / 0.05, 0, 1) * 0.5 + 0.5
    half = LIGHT - direction
    half /= np.linalg.norm(half, axis=1, keepdims=True)
    glint = (
        np.clip((normal * half).sum(1), 0, 1) ** 40 * np.where(which < 2, 0.03, 0.25) * (lit > 0)
    )
    return colour * (0.42 * openness + 0.68 * lit)[:, None] + glint[:, None]


def render(
    eye: tuple[float, ...], target: tuple[float, ...], up: tuple[float, ...], fov: float
) -> Image.Image:
    """A picture of the scene; fov is the vertical field of view in degrees."""
    w, h = WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING
    forward = np.array(target, np.float32) - np.array(eye, np.float32)
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, np.array(up, np.float32))
    right /= np.linalg.norm(right)
    scale = np.tan(np.radians(fov / 2))
    x, y = np.meshgrid((np.arange(w) + 0.5) / h * 2 - w / h, 1 - (np.arange(h) + 0.5) / h * 2)
    rays = forward + scale * (x[..., None] * right + y[..., None] * np.cross(right, forward))
    rays = (rays / np.linalg.norm(rays, axis=-1, keepdims=True)).reshape(-1, 3).astype(np.float32)
    origin = np.broadcast_to(np.array(eye, np.float32), rays.shape)
    t = march(origin, rays, STEPS, OUTLIER_SIGMA)
    pixels = np.full(rays.shape, 0.8, np.float32)
    met = np.flatnonzero(t < OUTLIER_SIGMA)
    pixels[met] = shade(origin[met] + t[met, None] * rays[met], rays[met])
    pixels = (
        np.clip(pixels, 0, 1).reshape(HEIGHT, OVERSAMPLING, WIDTH, OVERSAMPLING, 3).mean((1, 3))
    )
    return Image.fromarray((pixels ** (1 / 1.5) * 255 + 0.5).astype(np.uint8))


def main() -> None:
    OUT.mkdir(exist_ok=True)
    base = render((0.62, 0.72, 1.05), (0.0, 0.2, 0.0), (0, 1, 0), 46)
    base.save(OUT / "base.png", optimize=True)
    wrist = render((0.03, 0.37, 0.17), (0.06, 0.03, 0.08), (0, 0.2, -1), 68)
    wrist.save(OUT / "wrist.png", optimize=True)


if __name__ == "__main__":
    main()
