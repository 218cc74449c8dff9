"""Shapes and textures of synthetic scenes, functions of the local coordinates u and v of a sprite (see scenes.py).

A shape is negative inside and spans about [-1, 1]. Random parameters of shapes and textures come from `rng` alone, so
that the same generator state gives the same sprite at any coordinates.
"""

import functools
import math

import numpy as np

TILE = 256  # side of the noise tile, a power of two


def rotate_coordinates(u, v, angle: float):
    """(u, v) in coordinates rotated by `angle` radians."""
    c, s = math.cos(angle), math.sin(angle)  # np.cos would return float64, to which all arrays would be promoted
    return c * u + s * v, c * v - s * u


def plane(rng, u, v):
    """The whole plane."""
    return np.full(u.shape, -1, np.float32)


def edge(rng, u, v):
    """A half plane with a wavy edge."""
    return u + 0.03 * np.sin(rng.uniform(2, 8) * v)


def stroke(rng, u, v):
    """A thin curved line."""
    return limb(u + 1, v + 0.3 * u * u, 2, rng.uniform(0.02, 0.035))


def ellipse(rng, u, v):
    return np.hypot(u, v / rng.uniform(0.5, 1)) - 1


def rectangle(rng, u, v):
    return np.maximum(np.abs(u), np.abs(v) / rng.uniform(0.4, 1)) - 0.85


def bar(rng, u, v):
    return limb(u + 1, v, 2, rng.uniform(0.14, 0.22))


def ring(rng, u, v):
    width = rng.uniform(0.3, 0.55)
    return np.abs(np.hypot(u, v / rng.uniform(0.7, 1)) - 1 + width / 2) - width / 2


def frame(rng, u, v):
    """A square with a square hole."""
    width = rng.uniform(0.25, 0.4)
    return np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.85 + width / 2) - width / 2


def blob(rng, u, v):
    """A circle whose radius varies by harmonics 2 to 5 of the angle."""
    swings, phases = rng.uniform(0, 0.35, 4).tolist(), rng.uniform(0, 2 * math.pi, 4).tolist()
    angle = np.arctan2(v, u)
    sway = sum(a / n * np.cos(n * angle + phase) for n, a, phase in zip(range(2, 6), swings, phases))
    return np.hypot(u, v) - 0.8 - sway


def star(rng, u, v):
    """A star of 3 to 7 points: by symmetry, half a point, whose edge is a straight line from tip to notch."""
    half, depth = math.pi / int(rng.integers(3, 8)), rng.uniform(0.4, 0.65)
    angle, radius = np.abs((np.arctan2(v, u) + half) % (2 * half) - half), np.hypot(u, v)
    back, rise = 1 - depth * math.cos(half), depth * math.sin(half)  # from the tip at (1, 0) to the notch
    return (radius * (back * np.sin(angle) + rise * np.cos(angle)) - rise) / math.hypot(back, rise)


def crescent(rng, u, v):
    """A disc minus another."""
    return np.maximum(np.hypot(u, v) - 0.95, 0.85 - np.hypot(u - rng.uniform(0.5, 0.8), v))


def hammer(rng, u, v):
    """A bar with a crossbar at its end."""
    head = np.maximum(np.abs(u - 0.7) - rng.uniform(0.2, 0.3), np.abs(v) - rng.uniform(0.4, 0.7))
    return np.minimum(head, limb(u + 1, v, 1.6, rng.uniform(0.12, 0.2)))


def mug(rng, u, v):
    """A block with a round handle at its side."""
    block = np.maximum(np.abs(u + 0.3) - 0.6, np.abs(v) - rng.uniform(0.6, 0.8))
    return np.minimum(block, np.abs(np.hypot(u - 0.4, v) - 0.5) - rng.uniform(0.11, 0.15))


def creature(rng, u, v):
    """A round body with 3 to 6 limbs."""
    legs = int(rng.integers(3, 7))
    angles = 2 * math.pi / legs * (np.arange(legs) + rng.uniform(-0.3, 0.3, legs))
    body = np.hypot(u, v / rng.uniform(0.6, 1)) - rng.uniform(0.4, 0.6)
    width = rng.uniform(0.1, 0.17)
    return functools.reduce(
        np.minimum, (limb(*rotate_coordinates(u, v, a), 0.95, width) for a in angles.tolist()), body
    )


def limb(u, v, length: float, width: float):
    """A capsule: the points within `width` of the segment from (0, 0) to (length, 0)."""
    return np.hypot(u - np.clip(u, 0, length), v) - width


SHAPES = (ellipse, rectangle, bar, ring, frame, blob, star, crescent, hammer, mug, creature)


def paint(rng, u, v, colours):
    """A texture [3, points]: two colours mixed by a pattern, and noise; u, v: [points], in image sides."""
    grain = noise(rng, *(rng.uniform(0.5, 1.5) * u, rng.uniform(0.5, 1.5) * v))
    u, v = rotate_coordinates(u, v, rng.uniform(0, 2 * math.pi))
    wave = 2 * math.pi * math.exp(rng.uniform(math.log(4), math.log(18)))  # periods of 1/18 to 1/4
    match rng.integers(6):
        case 0:
            mix = 0.5 + 0.5 * grain
        case 1:
            mix = 0.5 + 0.5 * np.sin(wave * u + 3 * grain)
        case 2:
            mix = 0.5 + 4 * np.sin(wave * u) * np.sin(wave * v)
        case 3:
            mix = 4 * (np.cos(wave * u) + np.cos(wave * v) - rng.uniform(0.3, 1))
        case 4:
            mix = 0.5 + 5 * grain
        case _:
            mix = 0.5 + 2 * u
    base, other = colours[..., None]
    contrast = rng.uniform(0.1, 0.6) * np.clip(mix, 0, 1)
    return (base + contrast * (other - base)) * (1 + rng.uniform(0.05, 0.2) * grain)


def noise(rng, u, v):
    """Smooth noise of about [-1, 1] at points u, v, from a periodic tile of side 1 placed at random."""
    u, v = (TILE * (w + rng.random()) for w in (u, v))
    left, top = np.floor(u), np.floor(v)
    u, v = u - left, v - top
    at = (left.astype(np.int32) & (TILE - 1)) + (TILE + 1) * (top.astype(np.int32) & (TILE - 1))
    tile = noise_tile()
    upper = tile.take(at) * (1 - u) + tile.take(at + 1) * u
    lower = tile.take(at + TILE + 1) * (1 - u) + tile.take(at + TILE + 2) * u
    return upper + v * (lower - upper)


@functools.cache
def noise_tile():
    """Periodic noise of amplitude 1 / frequency^1.5, float32 [(TILE + 1)^2]; the last row and column are the first."""
    spectrum = np.fft.rfft2(np.random.default_rng(0).standard_normal((TILE, TILE)))
    frequency = TILE * np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE))
    tile = np.fft.irfft2(spectrum / np.maximum(frequency, 3) ** 1.5)
    return np.pad(0.5 * (tile - tile.mean()) / tile.std(), (0, 1), mode="wrap").astype(np.float32).ravel()
