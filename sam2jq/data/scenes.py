"""Drawn scenes with their masks, so that everything runs with nothing downloaded.

Letters: S image side in pixels; x, y image coordinates in [0, 1]; u, v an object's own coordinates, turned with it,
in which it spans about [-1, 1]. A shape is a function of u and v that is negative inside; its outline may be wavy,
sharp, or hold a hole. Colours come from one palette per scene, so an object is not told by its colour alone.
"""

import math
from typing import NamedTuple

import numpy as np

MAX_OBJECTS = 6
MIN_VISIBLE = 0.003  # of the image: what is left of an object behind others should still be something to point at
MIN_SIZE = 32  # pixels: below it a thin bar is thinner than a pixel


class Scene(NamedTuple):
    """image: uint8 [S, S, 3]; masks: bool [objects, S, S], the visible part of each object, disjoint, never empty."""

    image: np.ndarray
    masks: np.ndarray


def draw_scene(seed: int, size: int = 256) -> Scene:
    """The scene that belongs to `seed`: 2 to 6 textured objects, front ones covering those behind, lit from one side.

    Objects whose visible part is under 0.3 % of the image have no mask, but at least one object has.
    """
    if size < MIN_SIZE:
        raise ValueError(f"scene size must be at least {MIN_SIZE} pixels, got {size}")
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*[(np.arange(size, dtype=np.float32) + 0.5) / size] * 2, indexing="ij")
    vivid = rng.uniform(0.1, 0.9, (4, 3))
    palette = 0.6 * vivid + 0.4 * vivid.mean(axis=1, keepdims=True)  # paler: photographs are
    canvas = paint(rng, 2 * x - 1, 2 * y - 1, palette)
    front = np.full((size, size), -1)
    objects = int(rng.integers(2, MAX_OBJECTS + 1))
    for index in range(objects):  # from back to front
        u, v, radius = place(rng, x, y)
        inside = SHAPES[rng.integers(len(SHAPES))](rng, u, v)
        canvas = cover(canvas, paint(rng, u, v, palette), inside, radius * size)
        front[inside < 0] = index
    masks = front == np.arange(objects)[:, None, None]
    visible = masks.mean(axis=(1, 2))
    canvas = canvas * light(rng, x - 0.5, y - 0.5, 0.5) + 0.02 * rng.standard_normal(canvas.shape, dtype=np.float32)
    image = np.round(255 * np.clip(canvas, 0, 1)).astype(np.uint8)
    return Scene(image, masks[visible >= min(MIN_VISIBLE, visible.max())])


def scene_seed(name: str) -> int:
    """The seed of the scene called "scenes:<seed>/<index>"; no two names share one."""
    seed, _, index = name.removeprefix("scenes:").partition("/")
    if not (seed.isdecimal() and index.isdecimal()):
        raise ValueError(f"{name}: not the name of a scene; write it like scenes:7/0003")
    return (int(seed) << 32) + int(index)


def place(rng, x, y):
    """u, v [S, S] of an object put anywhere in the image at any angle, and its radius as a part of the image's side."""
    left, top = rng.uniform(0.12, 0.88), rng.uniform(0.12, 0.88)
    angle, radius = rng.uniform(0, 2 * math.pi), rng.uniform(0.11, 0.3)
    return *turn((x - left) / radius, (y - top) / radius, angle), radius


def turn(u, v, angle: float):
    """u, v in coordinates turned by `angle` radians."""
    c, s = math.cos(angle), math.sin(angle)  # not np.cos, whose float64 would spread to every array
    return c * u + s * v, c * v - s * u


def ellipse(rng, u, v):
    return np.hypot(u, v / rng.uniform(0.4, 1)) - 1


def rectangle(rng, u, v):
    return np.maximum(np.abs(u), np.abs(v) / rng.uniform(0.4, 1)) - 0.85


def bar(rng, u, v):
    return np.maximum(np.abs(u) / 1.7, np.abs(v) / rng.uniform(0.14, 0.22)) - 1


def ring(rng, u, v):
    width = rng.uniform(0.3, 0.55)
    return np.abs(np.hypot(u, v / rng.uniform(0.6, 1)) - 1 + width / 2) - width / 2


def blob(rng, u, v):
    """A circle whose radius sways 2 to 5 times on the way round."""
    swings, phases = rng.uniform(0, 0.5, 4).tolist(), rng.uniform(0, 2 * math.pi, 4).tolist()
    angle = np.arctan2(v, u)
    sway = sum(a / n * np.cos(n * angle + phase) for n, a, phase in zip(range(2, 6), swings, phases))
    return np.hypot(u, v) - 0.8 - sway


def star(rng, u, v):
    """A star of 3 to 7 points: all its half points folded onto one, whose edge is a straight line from tip to notch."""
    half, depth = math.pi / int(rng.integers(3, 8)), rng.uniform(0.4, 0.8)
    angle, radius = np.abs((np.arctan2(v, u) + half) % (2 * half) - half), np.hypot(u, v)
    back, rise = 1 - depth * math.cos(half), depth * math.sin(half)  # from the tip at (1, 0) to the notch
    return (radius * (back * np.sin(angle) + rise * np.cos(angle)) - rise) / math.hypot(back, rise)


SHAPES = (ellipse, rectangle, bar, ring, blob, star)


def paint(rng, u, v, palette):
    """A texture [S, S, 3]: two colours of the palette mixed by a pattern that turns with the object, and grain."""
    colours = palette[rng.choice(len(palette), 2, replace=False)] + rng.normal(0, 0.08, (2, 3))
    grain = noise(rng, len(u))
    wave = math.pi * rng.uniform(2, 6)
    match rng.integers(4):
        case 0:
            mix = 0.5 + 0.5 * grain
        case 1:
            mix = 0.5 + 0.5 * np.sin(wave * u + 2 * grain)
        case 2:
            mix = np.clip(0.5 + 6 * np.sin(wave * u) * np.sin(wave * v), 0, 1)
        case _:
            mix = 0.3 * (1 + u)
    base, other = colours.astype(np.float32)
    shade = light(rng, u, v, 0.15)
    return shade * (base + 0.06 * grain[..., None]) + (shade * mix[..., None]) * (other - base)


def light(rng, u, v, strength: float):
    """Brightness [S, S, 1] that grows by `strength` per unit in a direction of its own."""
    return (1 + strength * turn(u, v, rng.uniform(0, 2 * math.pi))[0])[..., None]


def cover(canvas, paint, inside, radius: float):
    """The canvas with `paint` where `inside` < 0: edges soft over about a pixel, a faint shadow round it."""
    shadow = 1 - 0.35 * np.exp(-8 * np.maximum(inside, 0))
    alpha = np.clip(0.5 - radius * inside, 0, 1)
    return canvas * (shadow * (1 - alpha))[..., None] + paint * alpha[..., None]


def noise(rng, size: int, octaves: int = 4):
    """Smooth noise [S, S], about in [-1, 1]; each octave is twice as fine and half as strong as the one before."""
    return sum(octave(rng, size, cells=3 * 2**k) / 2**k for k in range(octaves))


def octave(rng, size: int, cells: int):
    """Random values in [-1, 1] at the corners of cells x cells cells, smoothly interpolated to [S, S]."""
    corners = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    position = (np.arange(size, dtype=np.float32) + 0.5) * cells / size
    hat = np.clip(1 - np.abs(position[:, None] - np.arange(cells + 1, dtype=np.float32)), 0, 1)
    weights = hat * hat * (3 - 2 * hat)  # smoothstep: rows still sum to one, and no crease shows at cell borders
    return weights @ corners @ weights.T
