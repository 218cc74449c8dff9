"""Synthetic scenes and clips with exact masks, for training and tests without downloads.

A seed defines a world: a ground with small clutter, 2 to 6 objects, thin strokes in front, a light and a camera.
Objects and camera may move. `render` paints the world at a time t; a scene is t = 0, a clip is t = 0, 1, 2, ... frames.

Letters: S image side in pixels, T frames. Lengths are in image sides, times in frames. A point is a complex number
x + iy. A size is complex too: its modulus is a radius, its argument an angle. u, v are the local coordinates of a
sprite, which spans about [-1, 1] in them; they move, rotate, scale and bend with it, and its texture is a function of
them. A shape is a function of u and v that is negative inside. All colours of a world come from one palette, and ground
and objects have the same set of textures, so that color alone does not segment an object: its texture, its shaded rim
and its shadow do.
"""

import cmath
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy

from sam2jq.data.synthetic.shapes import SHAPES, blob, edge, noise, paint, plane, stroke
from sam2jq.errors import UserError

MAX_OBJECTS = 6
MIN_VISIBLE = 0.01  # share of the image; an object of which less is visible has no mask
MIN_SIZE = 32  # pixels; in smaller images a thin bar is thinner than a pixel
CENTRE = 0.5 + 0.5j
REACH = 1.3  # every shape, bent or not, lies in the circle |u + iv| < REACH


class Scene(NamedTuple):
    """image: uint8 [S, S, 3]; masks: bool [objects, S, S], the visible part of each object, disjoint, never empty."""

    image: np.ndarray
    masks: np.ndarray


class Clip(NamedTuple):
    """frames: uint8 [T, S, S, 3]; masks: bool [T, objects, S, S], visible parts, disjoint within a frame.

    Every object is visible in frame 0. It may disappear in later frames, where its mask is empty, and come back.
    """

    frames: np.ndarray
    masks: np.ndarray


class Motion(NamedTuple):
    """The motion of a sprite or of the camera: a straight line, an oscillation, and a round trip to start + trip.

    sway: amplitude of the oscillation, which takes `period` frames, as the round trip does.
    """

    start: complex
    size: complex
    velocity: complex = 0
    sway: complex = 0
    trip: complex = 0
    spin: float = 0  # radians per frame
    swell: float = 0  # greatest change of log |size|
    wobble: float = 0  # radians per frame: phase velocity of the bending wave along the sprite
    period: float = 24


class Sprite(NamedTuple):
    """A shape with a texture. `seed` determines both, so that they are the same in every frame."""

    seed: int
    shape: Callable
    colours: np.ndarray  # [2, 3]
    motion: Motion
    height: float  # over the ground; equals the length of the shadow; 0: no shadow and no shaded rim


class World(NamedTuple):
    """Sprites from back to front, of which only `objects` have masks; the camera; light, blur and noise."""

    seed: int
    ground: list[Sprite]
    objects: list[Sprite]
    strokes: list[Sprite]
    camera: Motion
    light: complex  # of length 1; the direction of shadows
    slope: complex  # gradient of the brightness, per image side
    dapple: float  # amplitude of smooth noise in the brightness
    blurs: np.ndarray  # [2]: standard deviations for the ground and for the image, pixels at S = 256; negative: no blur
    grain: float  # standard deviation of the pixel noise, which all channels share


def draw_scene(seed: int, size: int = 256) -> Scene:
    """The scene of `seed`: 2 to 6 textured objects that occlude each other, lit from one side.

    Objects whose visible part is below 1 % of the image have no mask, but at least one object has one.
    Raises UserError if `size` is below MIN_SIZE.
    """
    image, labels = render(build_world(seed), 0, size)
    return Scene(image, labels == promptable_objects(labels)[:, None, None])


def draw_clip(seed: int, frames: int = 24, size: int = 256) -> Clip:
    """The clip of `seed`: the scene `draw_scene(seed)`, which is frame 0, in motion. Raises UserError as that does."""
    world = build_world(seed)
    images, labels = zip(*[render(world, t, size) for t in range(frames)])
    return Clip(np.stack(images), np.stack(labels)[:, None] == promptable_objects(labels[0])[:, None, None])


def promptable_objects(labels):
    """The numbers of the objects of which enough is visible for a prompt, from back to front; labels: [S, S]."""
    visible = np.bincount(labels.ravel(), minlength=MAX_OBJECTS + 1)[1:] / labels.size
    return 1 + np.flatnonzero(visible >= min(MIN_VISIBLE, visible.max()))


def build_world(seed: int) -> World:
    """The world of `seed`."""
    rng = np.random.default_rng(seed)
    pairs = colour_pairs(rng)  # one for the ground and one for each object, all different
    return World(
        seed,
        make_ground(rng, pairs),
        make_objects(rng, pairs[2:]),
        [make_stroke(rng, pairs[1:]) for _ in range(max(0, rng.integers(-3, 3)))],
        make_camera(rng),
        light=random_size(rng, 1, 1),
        slope=random_size(rng, 0, 0.6),
        dapple=rng.uniform(0, 0.3),
        blurs=rng.uniform(-2, (2, 1.2)),
        grain=rng.uniform(0.005, 0.03),
    )


def colour_pairs(rng):
    """All ten pairs of a random palette of five colours that differ in brightness, [10, 2, 3], in random order."""
    saturation, grey = rng.uniform(0.05, 0.2), np.linspace(0.15, 0.85, 5) + rng.uniform(-0.05, 0.05, 5)
    palette = np.clip(grey[:, None] + saturation * rng.standard_normal((5, 3)), 0.05, 0.95).astype(np.float32)
    return rng.permutation(palette[list(itertools.combinations(rng.permutation(5), 2))])


def make_ground(rng, pairs) -> list[Sprite]:
    """A textured plane, in half of the worlds a second one beyond an edge, and flat clutter too small for a mask."""
    planes = [(plane, CENTRE), (edge, random_point(rng, 0.2, 0.8))][: rng.integers(1, 3)]
    clutter = [(random_choice(rng, SHAPES), random_point(rng, -0.2, 1.2)) for _ in range(rng.integers(16))]
    return [
        make_sprite(rng, shape, pair, Motion(start, random_size(rng, 1.5, 1.5)))
        for (shape, start), pair in zip(planes, pairs)
    ] + [
        make_sprite(rng, shape, random_choice(rng, pairs[1:]), Motion(start, random_size(rng, 0.015, 0.04)))
        for shape, start in clutter
    ]


def make_objects(rng, pairs) -> list[Sprite]:
    """2 to 6 moving objects; in two of five worlds the front or the rearmost one disappears and comes back."""
    motions = [set_in_motion(rng, motion) for motion in place_objects(rng, int(rng.integers(2, MAX_OBJECTS + 1)))]
    shapes = [random_choice(rng, SHAPES) for _ in motions]
    match rng.integers(5):
        case 0:
            motions[-1] = leave_and_return(rng, motions[-1])
        case 1:
            shapes[-1], motions[-1], motions[0] = blob, *hide_behind(rng, motions[-1])
    return [make_sprite(rng, *parts, rng.uniform(0.01, 0.03)) for parts in zip(shapes, pairs, motions)]


def make_stroke(rng, pairs) -> Sprite:
    """A long thin sprite, such as a twig, in front of the objects."""
    return make_sprite(
        rng, stroke, random_choice(rng, pairs), Motion(random_point(rng, 0.1, 0.9), random_size(rng, 0.5, 0.8)), 0.02
    )


def make_sprite(rng, shape, colours, motion: Motion, height: float = 0) -> Sprite:
    """A sprite with a random seed."""
    return Sprite(int(rng.integers(2**32)), shape, colours, motion, height)


def random_choice(rng, options):
    """One of `options`, all with equal probability."""
    return options[rng.integers(len(options))]


def random_point(rng, low: float, high: float) -> complex:
    """A point with both coordinates uniform in low..high."""
    return complex(*rng.uniform(low, high, 2))


def random_size(rng, low: float, high: float) -> complex:
    """A size with a radius uniform in low..high and a uniform angle."""
    return cmath.rect(rng.uniform(low, high), rng.uniform(0, 2 * math.pi))


def make_camera(rng) -> Motion:
    """The motion of the camera: none in half of the worlds, else a slow pan, roll and zoom."""
    if rng.random() < 0.5:
        return Motion(CENTRE, 1)
    pan, sway = random_size(rng, 0, 0.008), random_size(rng, 0, 0.04)
    spin, swell = rng.normal(0, (0.005, 0.08)).tolist()
    return Motion(CENTRE, 1, pan, sway, spin=spin, swell=swell, period=rng.uniform(24, 48))


def place_objects(rng, count: int) -> list[Motion]:
    """Motions at rest for `count` objects; each position is that of three random ones farthest from those before it."""
    motions = []
    for _ in range(count):
        points = [random_point(rng, 0.12, 0.88) for _ in range(3)]
        start = max(points, key=lambda p: min([abs(p - other.start) for other in motions], default=0))
        motions.append(Motion(start, random_size(rng, 0.15, 0.36 if count < 5 else 0.3)))
    return motions


def set_in_motion(rng, motion: Motion) -> Motion:
    """`motion` with a velocity roughly towards the middle, so that most objects stay in view; one in seven is fast."""
    speed = rng.uniform(0, 0.02) if rng.random() < 0.85 else rng.uniform(0.02, 0.04)
    heading = random_point(rng, 0.2, 0.8) - motion.start
    spin, swell, wobble = rng.normal(0, (0.03, 0.1, 0.2)).tolist()
    velocity, sway = speed * heading / abs(heading), random_size(rng, 0, 0.04)
    return Motion(motion.start, motion.size, velocity, sway, 0, spin, swell, wobble, rng.uniform(18, 40))


def leave_and_return(rng, motion: Motion) -> Motion:
    """The motion of a small object that leaves the image over one side and comes back."""
    radius, side = rng.uniform(0.12, 0.15), random_choice(rng, (1, 1j, -1, -1j))
    start = CENTRE + side * complex(0.28, rng.uniform(-0.3, 0.3))
    trip = side * (0.22 + REACH * radius) * rng.uniform(1.1, 1.3)
    return Motion(start, radius * motion.size / abs(motion.size), trip=trip, spin=motion.spin, wobble=motion.wobble)


def hide_behind(rng, front: Motion) -> tuple[Motion, Motion]:
    """(`front` enlarged, the motion of a small object that goes behind it and comes back)."""
    heading, inwards = front.size / abs(front.size), (CENTRE - front.start) / abs(CENTRE - front.start)
    front = front._replace(size=rng.uniform(0.26, 0.32) * heading, swell=0, period=24)
    trip = -inwards * cmath.rect(rng.uniform(0.36, 0.44), rng.uniform(-0.6, 0.6))
    return front, front._replace(start=front.start - trip, size=rng.uniform(0.12, 0.14) * heading, trip=trip)


def render(world: World, t: int, size: int):
    """(image uint8 [S, S, 3], labels uint8 [S, S]) at time t; labels: number of the visible object, from 1, or 0.

    Raises UserError if `size` is below MIN_SIZE.
    """
    if size < MIN_SIZE:
        raise UserError(f"scene size must be at least {MIN_SIZE} pixels, got {size}")
    canvas, labels = np.zeros((3, size, size), np.float32), np.zeros((size, size), np.uint8)
    ground_blur, blur = world.blurs * size / 256
    for sprite in world.ground:
        paint_sprite(canvas, labels, 0, sprite, world, t)
    canvas = soften(canvas, ground_blur)
    for number, sprite in enumerate(world.objects, 1):
        paint_sprite(canvas, labels, number, sprite, world, t)
    for sprite in world.strokes:
        paint_sprite(canvas, labels, 0, sprite, world, t)
    canvas = soften(canvas * illuminate(world, t, size), blur)
    grain = np.random.default_rng([world.seed, 2, t]).standard_normal(labels.shape, dtype=np.float32)
    image = np.rint(255 * np.clip(canvas + world.grain * grain, 0, 1)).astype(np.uint8)
    return np.ascontiguousarray(image.transpose(1, 2, 0)), labels


def soften(canvas, sigma: float):
    return scipy.ndimage.gaussian_filter(canvas, (0, sigma, sigma), truncate=2.5) if sigma > 0 else canvas


def illuminate(world: World, t: int, size: int):
    """Brightness [S, S]: a gradient and smooth noise, both fixed to the ground, so that they move with the camera."""
    u, v = coordinates(*to_image(world.camera, Motion(CENTRE, 1), t), np.s_[:], np.s_[:], size)
    dapple = world.dapple * noise(np.random.default_rng([world.seed, 1]), 0.3 * u, 0.3 * v)
    return np.maximum(1 + world.slope.real * u + world.slope.imag * v + dapple, 0.25)


def paint_sprite(canvas, labels, number: int, sprite: Sprite, world: World, t: int):
    """Paints a sprite and its shadow into canvas [3, S, S] and its number into labels [S, S], both in place."""
    rng, side = np.random.default_rng(sprite.seed), len(labels)
    centre, size = to_image(world.camera, sprite.motion, t)
    rows, columns = (window(middle, REACH * abs(size) + sprite.height, side) for middle in (centre.imag, centre.real))
    u, v = coordinates(centre, size, rows, columns, side)
    if not u.size:
        return
    v += rng.uniform(0, 0.12) * np.sin(2.5 * u + (rng.uniform(0, 2 * math.pi) + sprite.motion.wobble * t))
    inside = sprite.shape(rng, u, v)
    alpha = np.clip(0.5 - abs(size) * side * inside, 0, 1)  # edges are antialiased over about one pixel
    visible = np.flatnonzero(alpha)  # indices are faster than a mask: thin sprites cover little of their window
    radius = abs(sprite.motion.size)
    colours = paint(rng, radius * u.take(visible), radius * v.take(visible), sprite.colours)
    if sprite.height:
        lit = shift(inside, sprite.height * side * world.light)
        canvas[:, rows, columns] *= 1 - 0.45 * np.clip(0.5 - 6 * lit, 0, 1)
        colours *= bevel(inside.take(visible), lit.take(visible))
    flat, pixels = canvas.reshape(3, -1), np.arange(side * side).reshape(side, side)[rows, columns].take(visible)
    under = flat.take(pixels, axis=1)
    flat[:, pixels] = under + alpha.take(visible) * (colours - under)
    labels[rows, columns][inside < 0] = number


def shift(field, step: complex):
    """`field` [H, W] shifted by `step`, rounded to whole pixels; its border is repeated."""
    right, down = round(step.real), round(step.imag)
    height, width = field.shape
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    return field[rows][:, np.clip(np.arange(width) - right, 0, width - 1)]


def bevel(inside, lit):
    """Brightness [points] of a sprite with a dark, bevelled rim.

    inside: the shape's function at the points; lit: the same one step towards the light.
    """
    rim = np.exp(8 * np.minimum(inside, 0))
    return 1 + rim * np.clip(4 * (lit - inside) - 0.25, -0.6, 0.4)


def window(middle: float, reach: float, side: int) -> slice:
    """The slice of the pixels within `reach` of `middle`, both in image sides."""
    return slice(*(min(max(int(side * end), 0), side) for end in (middle - reach, middle + reach + 1 / side)))


def to_image(camera: Motion, motion: Motion, t: float) -> tuple[complex, complex]:
    """(centre, size), in the image at time t, of a sprite that moves by `motion` in the world."""
    eye, zoom = pose(camera, t)
    centre, size = pose(motion, t)
    return CENTRE + (centre - eye) / zoom, size / zoom


def pose(motion: Motion, t: float) -> tuple[complex, complex]:
    """(centre, size) at time t, in the world."""
    phase = math.pi * t / motion.period
    sway = math.sin(2 * phase)
    centre = motion.start + motion.velocity * t + motion.sway * sway + motion.trip * math.sin(phase) ** 2
    return centre, motion.size * cmath.exp(complex(motion.swell * sway, motion.spin * t))


def coordinates(centre: complex, size: complex, rows: slice, columns: slice, side: int):
    """(u, v), float32 [rows, columns], of pixels: u + iv = (x + iy - centre) / size."""
    pixels, inverse = (np.arange(side) + 0.5) / side, 1 / size
    x = (pixels[columns] - centre.real).astype(np.float32)
    y = (pixels[rows, None] - centre.imag).astype(np.float32)
    return inverse.real * x - inverse.imag * y, inverse.real * y + inverse.imag * x
