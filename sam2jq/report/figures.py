"""Pictures of masks on their images."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw

COLORS = np.array(
    [[0, 114, 178], [230, 159, 0], [0, 158, 115], [204, 121, 167]], np.float32
)  # for colour-blind readers
SHADES = ((0.9, 0.95), (0.45, 1.0), (0.85, 0.6))  # saturation and value of further colours
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}  # of PIL, by ending
FORMATS |= dict.fromkeys((".tif", ".tiff"), "TIFF")
SIDE = 320  # pixels, of the pictures on a sheet
MARK = {1: (60, 220, 60), 0: (235, 50, 50)}  # a click: foreground green, background red
CORNER = (255, 255, 255)  # a corner of a box that is given as points labelled 2 and 3


def object_color(index: int) -> np.ndarray:
    """RGB float32 [3], 0..255: one of COLORS, then hues a golden ratio apart, alternately full, pale and dark."""
    if index < len(COLORS):
        return COLORS[index]
    hue, (saturation, value) = index * 0.618034 % 1, SHADES[index % len(SHADES)]
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32) * 255


def overlay(image: np.ndarray, masks: np.ndarray) -> Image.Image:
    """`image` uint8 [H, W, 3] with each of `masks` bool [M, H, W] tinted and outlined in its own colour.

    Large masks lie below small ones.
    """
    canvas = image.astype(np.float32)
    for i in sorted(range(len(masks)), key=lambda i: -masks[i].sum()):
        color, outline = object_color(i), edge(masks[i])
        canvas[masks[i]] = 0.5 * canvas[masks[i]] + 0.5 * color
        canvas[outline] = color
    return Image.fromarray(canvas.round().astype(np.uint8))


def draw_prompts(picture: Image.Image, points: np.ndarray, labels: np.ndarray, box: np.ndarray | None = None) -> None:
    """Draws clicks [N, 2] and a box [4], in pixels, onto `picture`."""
    draw, radius = ImageDraw.Draw(picture), max(3, min(picture.size) // 100)
    if box is not None:
        draw.rectangle(tuple(map(float, box)), outline="white", width=max(1, radius // 2))
    for (x, y), label in zip(points, labels):
        if label >= 0:  # -1 is padding
            fill = MARK.get(int(label), CORNER)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline="white")


def write(picture: Image.Image, words: str) -> None:
    """Writes `words` into the upper left corner of `picture`."""
    ImageDraw.Draw(picture).text((4, 4), words, fill="white", stroke_width=1, stroke_fill="black")


def side_by_side(rows: list[list[Image.Image]], titles: list[list[str]]) -> Image.Image:
    """One picture with rows of pictures, each scaled to a height of SIDE pixels, with its title above it."""
    band = 16
    scaled = [[p.resize((round(p.width * SIDE / p.height), SIDE)) for p in row] for row in rows]
    sheet = Image.new("RGB", (max(sum(p.width for p in row) for row in scaled), len(rows) * (SIDE + band)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, names) in enumerate(zip(scaled, titles)):
        x, y = 0, i * (SIDE + band)
        for picture, name in zip(row, names):
            draw.text((x + 2, y + 2), name, fill="black")
            sheet.paste(picture, (x, y + band))
            x += picture.width
    return sheet


def shown_frames(count: int, shown: int = 8) -> list[int]:
    """The numbers of the frames of a clip that a strip shows, evenly spaced, the first and the last included."""
    return np.linspace(0, count - 1, min(shown, count)).round().astype(int).tolist()


def strip(pictures: dict[int, Image.Image]) -> Image.Image:
    """One picture with those of some frames of a clip, by number, four in a row."""
    rows = [list(pictures)[i : i + 4] for i in range(0, len(pictures), 4)]
    return side_by_side([[pictures[i] for i in row] for row in rows], [[f"frame {i}" for i in row] for row in rows])


def tint(masks: list[tuple[np.ndarray, tuple[int, int, int]]]) -> Image.Image:
    """A transparent RGBA picture with each mask, bool [H, W], half transparent in its colour, with an opaque edge."""
    canvas = np.zeros((*masks[0][0].shape, 4), np.uint8)
    for mask, color in masks:
        canvas[mask] = (*color, 130)
        canvas[edge(mask)] = (*color, 255)
    return Image.fromarray(canvas)


def edge(mask: np.ndarray) -> np.ndarray:
    """bool [H, W]: the pixels of `mask` that have a neighbour outside it."""
    padded = np.pad(mask, 1, mode="edge")
    neighbours = [padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]]
    return mask & ~np.logical_and.reduce(neighbours)
