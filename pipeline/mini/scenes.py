"""Scenes of the mini world: 2-4 coloured shapes at free places, drawn by code, with all that MMUD says of a picture.

A scene is a pure function of its seed. Splits never share a scene: the *signature* of a scene (its objects and
the cells that they lie in) is hashed, and the hash alone decides the split that may hold it.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pipeline.data.prompts import join_phrases
from pipeline.mini import grammar
from pipeline.mini.grammar import COLOURS, GRID, SHAPES, SIZES, Name

SIDE = 128
"""Width and height of a scene in pixels."""

_CELL = SIDE / GRID
_SUPERSAMPLE = 4
_RADIUS = {"small": (11.0, 13.0), "large": (20.0, 23.0)}
"""Radius in pixels of the circle round an object, by size."""
_RGB = {
    "red": (214, 48, 44),
    "green": (52, 160, 70),
    "blue": (52, 92, 214),
    "yellow": (240, 208, 54),
    "purple": (146, 66, 178),
    "white": (244, 244, 244),
}
_CELL_MARGIN = 3.0
"""An object's centre keeps this many pixels from the border of its cell, so that the cell is never in doubt."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One object: attributes, centre and radius in pixels, rotation in radians."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def name(self) -> Name:
        return (self.size, self.colour, self.shape)

    @property
    def text(self) -> str:
        return " ".join(self.name)

    @property
    def row(self) -> int:
        return int(self.y // _CELL)

    @property
    def column(self) -> int:
        return int(self.x // _CELL)

    @property
    def cell(self) -> int:
        """Row-major index of the text map's cell that holds the centre."""
        return self.row * GRID + self.column

    @property
    def place(self) -> str:
        """The quarter of the picture, such as "top left"."""
        return f"{'top' if self.row < GRID // 2 else 'bottom'} {'left' if self.column < GRID // 2 else 'right'}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in reading order of their cells, and the background's grey level and noise seed."""

    objects: tuple[Shape, ...]
    background: tuple[int, int, int]
    noise_seed: int

    def signature(self) -> str:
        return " ".join(f"{o.cell}:{grammar.map_word(o.name)}" for o in self.objects)

    def caption(self) -> str:
        """ "A small red circle at the top left, a ... and a ... ." in reading order."""
        parts = [f"a {o.text} at the {o.place}" for o in self.objects]
        text = join_phrases(parts) + "."
        return text[0].upper() + text[1:]

    def text_map(self) -> list[str]:
        """The GRID x GRID cells row by row: an object's map word, or the empty cell's."""
        words = [grammar.EMPTY_CELL] * (GRID * GRID)
        for o in self.objects:
            words[o.cell] = grammar.map_word(o.name)
        return words


def make_scene(rng: np.random.Generator) -> Scene:
    """Draws one scene: distinct objects, each likely to share a colour or a shape with an earlier one.

    Sharing is what makes referring a test: "the red circle" then stands beside another red thing or another circle.
    """
    names: list[Name] = []
    count = (2, 2, 2, 3, 3, 3, 3, 4, 4, 4)[rng.integers(10)]
    while len(names) < count:
        size, colour, shape = (values[rng.integers(len(values))] for values in (SIZES, COLOURS, SHAPES))
        if names and rng.random() < 0.75:
            like = names[rng.integers(len(names))]
            if rng.random() < 0.5:
                colour = like[1]
            else:
                shape = like[2]
        if (size, colour, shape) not in names:
            names.append((size, colour, shape))
    while True:
        placed = _place(names, rng)
        if placed is not None:
            break
    grey = int(rng.integers(60, 120))
    tint = rng.integers(-14, 15, 3)
    background = tuple(int(np.clip(grey + t, 0, 255)) for t in tint)
    objects = tuple(sorted(placed, key=lambda o: o.cell))
    return Scene(objects=objects, background=background, noise_seed=int(rng.integers(2**31)))  # type: ignore[arg-type]


def _place(names: list[Name], rng: np.random.Generator) -> list[Shape] | None:
    """Free, non-overlapping places in different cells, or None when the draw leaves no room."""
    placed: list[Shape] = []
    for size, colour, shape in names:
        radius = float(rng.uniform(*_RADIUS[size]))
        for _ in range(60):
            u, v, w = rng.random(3).tolist()
            x, y = (radius + 2 + t * (SIDE - 2 * radius - 4) for t in (u, v))
            if any(not _CELL_MARGIN <= t % _CELL <= _CELL - _CELL_MARGIN for t in (x, y)):
                continue
            candidate = Shape(size, colour, shape, x, y, radius, 0.5 * w - 0.25)
            if all(o.cell != candidate.cell and math.hypot(o.x - x, o.y - y) > o.radius + radius + 2 for o in placed):
                placed.append(candidate)
                break
        else:
            return None
    return placed


def _outline(o: Shape) -> list[tuple[float, float]]:
    """Corners of a polygonal object, in pixels."""

    def polar(radius: float, degrees: float) -> tuple[float, float]:
        a = math.radians(degrees) + o.angle
        return o.x + radius * math.cos(a), o.y + radius * math.sin(a)

    r = o.radius
    if o.shape == "square":
        return [polar(r, 45 + 90 * i) for i in range(4)]
    if o.shape == "triangle":
        return [polar(r, -90 + 120 * i) for i in range(3)]
    if o.shape == "star":
        return [polar(r if i % 2 == 0 else 0.42 * r, -90 + 36 * i) for i in range(10)]
    assert o.shape == "cross", o.shape
    arm, c, s = 0.34 * r, math.cos(o.angle), math.sin(o.angle)
    corners = [(-arm, -r), (arm, -r), (arm, -arm), (r, -arm), (r, arm), (arm, arm)]
    corners += [(arm, r), (-arm, r), (-arm, arm), (-r, arm), (-r, -arm), (-arm, -arm)]
    return [(o.x + 0.94 * (c * x - s * y), o.y + 0.94 * (s * x + c * y)) for x, y in corners]


def _draw(draw: ImageDraw.ImageDraw, o: Shape, fill: int | tuple[int, int, int]) -> None:
    k = _SUPERSAMPLE
    if o.shape == "circle":
        draw.ellipse(
            [k * (o.x - o.radius), k * (o.y - o.radius), k * (o.x + o.radius), k * (o.y + o.radius)], fill=fill
        )
    else:
        draw.polygon([(k * x, k * y) for x, y in _outline(o)], fill=fill)


def render(scene: Scene) -> np.ndarray:
    """The picture, uint8 [SIDE, SIDE, 3]: antialiased shapes on a grey ground with light noise."""
    big = Image.new("RGB", (SIDE * _SUPERSAMPLE, SIDE * _SUPERSAMPLE), scene.background)
    draw = ImageDraw.Draw(big)
    for o in scene.objects:
        _draw(draw, o, _RGB[o.colour])
    picture = np.asarray(big.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    noise = np.random.default_rng(scene.noise_seed).normal(0, 4, (SIDE, SIDE, 1)).astype(np.float32)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def object_mask(o: Shape) -> np.ndarray:
    """The object's mask, bool [SIDE, SIDE]: pixels at least half covered."""
    big = Image.new("L", (SIDE * _SUPERSAMPLE, SIDE * _SUPERSAMPLE), 0)
    _draw(ImageDraw.Draw(big), o, 255)
    return np.asarray(big.resize((SIDE, SIDE), Image.Resampling.BOX)) >= 128


def encode_jpeg(picture: np.ndarray) -> bytes:
    """JPEG bytes of a picture, without chroma subsampling (small coloured shapes would bleed)."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


SPLITS = ("train", "valid", "test")


def split_of(scene: Scene) -> str:
    """The only split that may hold this scene: by its signature's hash, 80 % train, 10 % valid, 10 % test."""
    bucket = int.from_bytes(hashlib.sha256(scene.signature().encode()).digest()[:4], "big") % 10
    return "train" if bucket < 8 else SPLITS[bucket - 7]


def scene_at(split: str, index: int, seed: int = 0) -> Scene:
    """The index-th scene of a split: drawn from (seed, split, index, try) until a draw belongs to the split."""
    for attempt in range(10_000):
        scene = make_scene(np.random.default_rng([seed, SPLITS.index(split), index, attempt]))
        if split_of(scene) == split:
            return scene
    raise AssertionError(f"no scene of split {split} in 10,000 draws")
