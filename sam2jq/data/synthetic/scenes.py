"""Drawn scenes and clips with exact masks, so that everything runs, and trains, with nothing downloaded.

A seed describes a world: a ground with clutter on it, 2 to 6 objects, thin strokes in front, a light and a camera, all
of which may move. `render` paints the world at a time t; a scene is time 0, a clip is t = 0, 1, 2, ... frames.

Letters: S image side in pixels, T frames; lengths are in image sides, times in frames. A point is a complex number
x + iy, and so is a size: its modulus is a radius, its argument an angle. u, v are a thing's own coordinates, in which
it spans about [-1, 1]; they move, turn, swell and bend with it, and its texture is a function of them. A shape is a
function of u and v that is negative inside. Colours come from one palette per world, and ground and objects share the
textures, so no object is told by its colour alone; what tells it is its texture, its shaded rim and its shadow.
"""

import cmath
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

from sam2jq.data.synthetic.shapes import SHAPES, blob, edge, noise, paint, plane, stroke
from sam2jq.errors import UserError

MAX_OBJECTS = 6
MIN_VISIBLE = 0.01  # of the image: what is left of an object behind others should still be something to point at
MIN_SIZE = 32  # pixels: below it a thin bar is thinner than a pixel
CENTRE = 0.5 + 0.5j
REACH = 1.3  # no shape, even bent, leaves the circle |u + iv| < REACH


class Scene(NamedTuple):
    """image: uint8 [S, S, 3]; masks: bool [objects, S, S], the visible part of each object, disjoint, never empty."""

    image: np.ndarray
    masks: np.ndarray


class Clip(NamedTuple):
    """frames: uint8 [T, S, S, 3]; masks: bool [T, objects, S, S], visible parts, disjoint within a frame.

    Every object is visible in frame 0; in later frames it may be missing, its mask empty, and come back.
    """

    frames: np.ndarray
    masks: np.ndarray


class Motion(NamedTuple):
    """The way of a thing or of the camera: a line, a sway, and a round trip to start + trip every `period` frames."""

    start: complex
    size: complex
    velocity: complex = 0
    sway: complex = 0
    trip: complex = 0
    spin: float = 0  # radians per frame
    swell: float = 0  # greatest change of log |size|
    wobble: float = 0  # radians per frame by which a thing's bend runs along it
    period: float = 24


class Thing(NamedTuple):
    """What is painted. Its looks are drawn from its seed `look` in every frame anew, so they are the same in all."""

    look: int
    shape: Callable
    colours: np.ndarray  # [2, 3]
    motion: Motion
    height: float  # over the ground, the length of its shadow; at 0 it is flat


class World(NamedTuple):
    """Things from back to front, of which only `objects` have masks, and how they are lit and seen."""

    seed: int
    ground: list[Thing]
    objects: list[Thing]
    strokes: list[Thing]
    camera: Motion
    light: complex  # of length 1, the way shadows fall
    slope: complex  # brightness gained per image side
    dapple: float  # strength of the patches in the light
    blurs: np.ndarray  # of the ground and of the whole image: deviations in pixels at S = 256, none if negative
    grain: float  # deviation of the pixel noise, alike in all colours


def draw_scene(seed: int, size: int = 256) -> Scene:
    """The scene that belongs to `seed`: 2 to 6 textured objects, front ones covering those behind, lit from one side.

    Objects whose visible part is under 1 % of the image have no mask, but at least one object has.
    """
    image, owner = render(build_world(seed), 0, size)
    return Scene(image, owner == pointable(owner)[:, None, None])


def draw_clip(seed: int, frames: int = 24, size: int = 256) -> Clip:
    """The clip that belongs to `seed`, whose frame 0 is `draw_scene(seed)`: the same objects, moving."""
    world = build_world(seed)
    images, owners = zip(*[render(world, t, size) for t in range(frames)])
    return Clip(np.stack(images), np.stack(owners)[:, None] == pointable(owners[0])[:, None, None])


def scene_seed(name: str) -> int:
    """The seed of the scene called "scenes:<seed>/<index>"; no two names share one."""
    seed, _, index = name.removeprefix("scenes:").partition("/")
    if not (seed.isdecimal() and index.isdecimal()):
        raise UserError(f"{name}: not the name of a scene; write it like scenes:7/0003")
    return (int(seed) << 32) + int(index)


def scene_names(spec: str, num_samples: int | None) -> list[str]:
    """["scenes:7/0000", "scenes:7/0001", ...] for "scenes:7"."""
    seed = spec.removeprefix("scenes:")
    if not seed.isdecimal():
        raise UserError(f"{spec}: the seed must be a whole number that is not negative; write it like scenes:7")
    if num_samples is None:
        raise UserError(f"{spec}: drawn scenes have no end; give num_samples")
    return [f"scenes:{int(seed)}/{index:04d}" for index in range(num_samples)]


def pointable(owner):
    """The numbers of the objects that show enough of themselves to be pointed at, from back to front."""
    visible = np.bincount(owner.ravel(), minlength=MAX_OBJECTS + 1)[1:] / owner.size
    return 1 + np.flatnonzero(visible >= min(MIN_VISIBLE, visible.max()))


def build_world(seed: int) -> World:
    """The world that belongs to `seed`."""
    rng = np.random.default_rng(seed)
    pairs = colour_pairs(rng)  # the ground and every object have one each, so that no two of them look the same
    return World(
        seed,
        lay_ground(rng, pairs),
        set_objects(rng, pairs[2:]),
        [draw_stroke(rng, pairs[1:]) for _ in range(max(0, rng.integers(-3, 3)))],
        steer(rng),
        light=span(rng, 1, 1),
        slope=span(rng, 0, 0.6),
        dapple=rng.uniform(0, 0.3),
        blurs=rng.uniform(-2, (2, 1.2)),
        grain=rng.uniform(0.005, 0.03),
    )


def colour_pairs(rng):
    """Ten pairs [10, 2, 3] of colours: all there are in a palette of five that differ in brightness."""
    saturation, grey = rng.uniform(0.05, 0.2), np.linspace(0.15, 0.85, 5) + rng.uniform(-0.05, 0.05, 5)
    palette = np.clip(grey[:, None] + saturation * rng.standard_normal((5, 3)), 0.05, 0.95).astype(np.float32)
    return rng.permutation(palette[list(itertools.combinations(rng.permutation(5), 2))])


def lay_ground(rng, pairs) -> list[Thing]:
    """A textured plane, in half of the worlds another from some line on, and flat clutter too small for a mask."""
    planes = [(plane, CENTRE), (edge, point(rng, 0.2, 0.8))][: rng.integers(1, 3)]
    clutter = [(choose(rng, SHAPES), point(rng, -0.2, 1.2)) for _ in range(rng.integers(16))]
    return [
        thing(rng, shape, pair, Motion(start, span(rng, 1.5, 1.5))) for (shape, start), pair in zip(planes, pairs)
    ] + [thing(rng, shape, choose(rng, pairs[1:]), Motion(start, span(rng, 0.015, 0.04))) for shape, start in clutter]


def set_objects(rng, pairs) -> list[Thing]:
    """2 to 6 moving objects; in two worlds of five the front or the rearmost one goes out of sight and comes back."""
    motions = [move(rng, motion) for motion in scatter(rng, int(rng.integers(2, MAX_OBJECTS + 1)))]
    shapes = [choose(rng, SHAPES) for _ in motions]
    match rng.integers(5):
        case 0:
            motions[-1] = leave(rng, motions[-1])
        case 1:
            shapes[-1], motions[-1], motions[0] = blob, *hide(rng, motions[-1])
    return [thing(rng, *parts, rng.uniform(0.01, 0.03)) for parts in zip(shapes, pairs, motions)]


def draw_stroke(rng, pairs) -> Thing:
    """A long thin thing, such as a twig, to stand before the objects."""
    return thing(rng, stroke, choose(rng, pairs), Motion(point(rng, 0.1, 0.9), span(rng, 0.5, 0.8)), 0.02)


def thing(rng, shape, colours, motion: Motion, height: float = 0) -> Thing:
    return Thing(int(rng.integers(2**32)), shape, colours, motion, height)


def choose(rng, options):
    return options[rng.integers(len(options))]


def point(rng, low: float, high: float) -> complex:
    return complex(*rng.uniform(low, high, 2))


def span(rng, low: float, high: float) -> complex:
    """A size between `low` and `high` at any angle."""
    return cmath.rect(rng.uniform(low, high), rng.uniform(0, 2 * math.pi))


def steer(rng) -> Motion:
    """A camera's way: in half of the worlds it rests, else it pans, rolls and zooms slowly."""
    if rng.random() < 0.5:
        return Motion(CENTRE, 1)
    pan, sway = span(rng, 0, 0.008), span(rng, 0, 0.04)
    spin, swell = rng.normal(0, (0.005, 0.08)).tolist()
    return Motion(CENTRE, 1, pan, sway, spin=spin, swell=swell, period=rng.uniform(24, 48))


def scatter(rng, count: int) -> list[Motion]:
    """Resting places for `count` objects, each the farthest of three points from those before it."""
    motions = []
    for _ in range(count):
        points = [point(rng, 0.12, 0.88) for _ in range(3)]
        start = max(points, key=lambda p: min([abs(p - other.start) for other in motions], default=0))
        motions.append(Motion(start, span(rng, 0.15, 0.36 if count < 5 else 0.3)))
    return motions


def move(rng, motion: Motion) -> Motion:
    """`motion` set going, roughly towards the middle so that most objects stay in view; one in seven is fast."""
    speed = rng.uniform(0, 0.02) if rng.random() < 0.85 else rng.uniform(0.02, 0.04)
    heading = point(rng, 0.2, 0.8) - motion.start
    spin, swell, wobble = rng.normal(0, (0.03, 0.1, 0.2)).tolist()
    velocity, sway = speed * heading / abs(heading), span(rng, 0, 0.04)
    return Motion(motion.start, motion.size, velocity, sway, 0, spin, swell, wobble, rng.uniform(18, 40))


def leave(rng, motion: Motion) -> Motion:
    """The motion of a small object that goes out of the image over one side and comes back."""
    radius, side = rng.uniform(0.12, 0.15), choose(rng, (1, 1j, -1, -1j))
    start = CENTRE + side * complex(0.28, rng.uniform(-0.3, 0.3))
    trip = side * (0.22 + REACH * radius) * rng.uniform(1.1, 1.3)
    return Motion(start, radius * motion.size / abs(motion.size), trip=trip, spin=motion.spin, wobble=motion.wobble)


def hide(rng, front: Motion) -> tuple[Motion, Motion]:
    """`front` made large, and the motion of a small object that goes behind it and comes back."""
    heading, inwards = front.size / abs(front.size), (CENTRE - front.start) / abs(CENTRE - front.start)
    front = front._replace(size=rng.uniform(0.26, 0.32) * heading, swell=0, period=24)
    trip = -inwards * cmath.rect(rng.uniform(0.36, 0.44), rng.uniform(-0.6, 0.6))
    return front, front._replace(start=front.start - trip, size=rng.uniform(0.12, 0.14) * heading, trip=trip)


def render(world: World, t: int, size: int):
    """The image at time t, uint8 [S, S, 3], and owner [S, S]: the number from 1 of the object seen there, or 0."""
    if size < MIN_SIZE:
        raise UserError(f"scene size must be at least {MIN_SIZE} pixels, got {size}")
    canvas, owner = np.zeros((3, size, size), np.float32), np.zeros((size, size), np.uint8)
    ground_blur, blur = world.blurs * size / 256
    for thing in world.ground:
        cover(canvas, owner, 0, thing, world, t)
    canvas = soften(canvas, ground_blur)
    for number, thing in enumerate(world.objects, 1):
        cover(canvas, owner, number, thing, world, t)
    for thing in world.strokes:
        cover(canvas, owner, 0, thing, world, t)
    canvas = soften(canvas * illuminate(world, t, size), blur)
    grain = np.random.default_rng([world.seed, 2, t]).standard_normal(owner.shape, dtype=np.float32)
    image = np.rint(255 * np.clip(canvas + world.grain * grain, 0, 1)).astype(np.uint8)
    return np.ascontiguousarray(image.transpose(1, 2, 0)), owner


def soften(canvas, sigma: float):
    return gaussian_filter(canvas, (0, sigma, sigma), truncate=2.5) if sigma > 0 else canvas


def illuminate(world: World, t: int, size: int):
    """Brightness [S, S] that rises one way and is dappled; it lies on the world, so it moves with the camera."""
    u, v = coordinates(*view(world.camera, Motion(CENTRE, 1), t), np.s_[:], np.s_[:], size)
    dapple = world.dapple * noise(np.random.default_rng([world.seed, 1]), 0.3 * u, 0.3 * v)
    return np.maximum(1 + world.slope.real * u + world.slope.imag * v + dapple, 0.25)


def cover(canvas, owner, number: int, thing: Thing, world: World, t: int):
    """Paints `thing` onto canvas [3, S, S] in place, with its shadow, and enters its number where it is seen."""
    rng, side = np.random.default_rng(thing.look), len(owner)
    centre, size = view(world.camera, thing.motion, t)
    rows, columns = (window(middle, REACH * abs(size) + thing.height, side) for middle in (centre.imag, centre.real))
    u, v = coordinates(centre, size, rows, columns, side)
    if not u.size:
        return
    v += rng.uniform(0, 0.12) * np.sin(2.5 * u + (rng.uniform(0, 2 * math.pi) + thing.motion.wobble * t))
    inside = thing.shape(rng, u, v)
    alpha = np.clip(0.5 - abs(size) * side * inside, 0, 1)  # an edge is soft over about a pixel
    seen = np.flatnonzero(alpha)  # lists of pixels are faster than masks, and thin things fill little of their window
    radius = abs(thing.motion.size)
    colours = paint(rng, radius * u.take(seen), radius * v.take(seen), thing.colours)
    if thing.height:
        lit = shift(inside, thing.height * side * world.light)
        canvas[:, rows, columns] *= 1 - 0.45 * np.clip(0.5 - 6 * lit, 0, 1)
        colours *= relief(inside.take(seen), lit.take(seen))
    flat, pixels = canvas.reshape(3, -1), np.arange(side * side).reshape(side, side)[rows, columns].take(seen)
    under = flat.take(pixels, axis=1)
    flat[:, pixels] = under + alpha.take(seen) * (colours - under)
    owner[rows, columns][inside < 0] = number


def shift(field, step: complex):
    """The field moved by `step`, rounded to whole pixels; its border is repeated."""
    right, down = round(step.real), round(step.imag)
    height, width = field.shape
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    return field[rows][:, np.clip(np.arange(width) - right, 0, width - 1)]


def relief(inside, lit):
    """Brightness at points where the shape is `inside` and, a step towards the light, `lit`: a dark, bevelled rim."""
    rim = np.exp(8 * np.minimum(inside, 0))
    return 1 + rim * np.clip(4 * (lit - inside) - 0.25, -0.6, 0.4)


def window(middle: float, reach: float, side: int) -> slice:
    """The pixels within `reach` of `middle`."""
    return slice(*(min(max(int(side * end), 0), side) for end in (middle - reach, middle + reach + 1 / side)))


def view(camera: Motion, motion: Motion, t: float) -> tuple[complex, complex]:
    """Centre and size, in the image at time t, of what moves by `motion` in the world."""
    eye, zoom = pose(camera, t)
    centre, size = pose(motion, t)
    return CENTRE + (centre - eye) / zoom, size / zoom


def pose(motion: Motion, t: float) -> tuple[complex, complex]:
    """Centre and size at time t."""
    turn = math.pi * t / motion.period
    sway = math.sin(2 * turn)
    centre = motion.start + motion.velocity * t + motion.sway * sway + motion.trip * math.sin(turn) ** 2
    return centre, motion.size * cmath.exp(complex(motion.swell * sway, motion.spin * t))


def coordinates(centre: complex, size: complex, rows: slice, columns: slice, side: int):
    """u, v [rows, columns] of pixels, float32: u + iv = (x + iy - centre) / size."""
    pixels, inverse = (np.arange(side) + 0.5) / side, 1 / size
    x = (pixels[columns] - centre.real).astype(np.float32)
    y = (pixels[rows, None] - centre.imag).astype(np.float32)
    return inverse.real * x - inverse.imag * y, inverse.real * y + inverse.imag * x
