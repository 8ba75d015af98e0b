"""Scenes of several coloured shapes, as numbers and as pictures."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 50),
    "purple": (150, 60, 190),
    "grey": (130, 130, 130),
}
SIZES = {"small": 5, "medium": 8, "large": 12}  # half the side without the middle pixel: sides of 11, 17 and 25
SIDE = 64  # pixels of a picture
FEWEST, MOST = 3, 5  # shapes of a scene
GAP = 2  # pixels of background between the bounding squares of any two shapes, at least
BACKGROUND = (245, 245, 240)
TRIES = 40  # places drawn for a shape before the scene goes without it
BATCH = 2048  # scenes drawn at a time: keeps the places tried within the processor's cache


@dataclass(frozen=True)
class Scenes:
    """S scenes of up to K = MOST shapes: shape, colour and size (each a number into the list of that name) and x, y, the centre in
    pixels from the top left corner, all (S, K) int; there (S, K) bool says which of the K exist.
    """

    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray
    x: np.ndarray
    y: np.ndarray
    there: np.ndarray

    def __len__(self) -> int:
        return len(self.there)


def draw_scenes(count: int, rng: np.random.Generator) -> Scenes:
    """`count` scenes, no two alike, in which no two shapes touch and at least two colours, or two kinds of shape, occur just once.

    Without the last, three scenes in ten would have no two shapes that a single word each singles out, and nothing to ask about them.

    >>> scenes = draw_scenes(5, np.random.default_rng(0))
    >>> scenes.x.shape, bool((scenes.there.sum(axis=1) >= FEWEST).all())
    ((5, 5), True)
    """
    columns: list[list[np.ndarray]] = [[] for _ in fields(Scenes)]
    seen: set[bytes] = set()
    while len(seen) < count:
        drawn = draw_batch(BATCH, rng)
        useful = (drawn.there.sum(axis=1) >= FEWEST) & (singled_out(drawn.shape, drawn.there) | singled_out(drawn.colour, drawn.there))
        keep = []
        for s in np.flatnonzero(useful).tolist():
            if len(seen) < count and (what := fingerprint(drawn, s)) not in seen:
                seen.add(what)
                keep.append(s)
        for column, field in zip(columns, fields(Scenes), strict=True):
            column.append(getattr(drawn, field.name)[keep])
    return Scenes(*(np.concatenate(column) for column in columns))


def draw_batch(count: int, rng: np.random.Generator) -> Scenes:
    """Half of the scenes draw their colours from a palette of two or three, so that counts of 2 and 3 are not rare."""
    shape = rng.integers(len(SHAPES), size=(count, MOST))
    palette = rng.permuted(np.tile(np.arange(len(COLOURS)), (count, 1)), axis=1)
    colours = np.where(rng.random(count) < 0.5, len(COLOURS), rng.integers(2, 4, size=count))
    colour = np.take_along_axis(palette, rng.integers(colours[:, None], size=(count, MOST)), axis=1)
    size = rng.integers(len(SIZES), size=(count, MOST))
    wanted = np.arange(MOST) < rng.integers(FEWEST, MOST + 1, size=count)[:, None]
    return Scenes(shape, colour, size, *place(size, wanted, rng))


def place(size: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y, there (S, K): the wanted shapes one after another, each at the first place tried that is free; left out if none is."""
    half = np.array(list(SIZES.values()))[size]
    x, y, there = np.zeros_like(half), np.zeros_like(half), np.zeros_like(wanted)
    rows = np.arange(len(size))
    for k in range(MOST):
        h = half[:, k, None]
        tried_x, tried_y = (rng.integers(h + 1, SIDE - h - 1, size=(len(size), TRIES)) for _ in "xy")
        free = np.ones((len(size), TRIES), dtype=bool)
        for other in range(k):
            # Bounding squares are apart when they are along one axis: alike for every pair of shapes, and no corner slips into a gap.
            apart = np.maximum(abs(tried_x - x[:, other, None]), abs(tried_y - y[:, other, None])) > h + half[:, other, None] + GAP
            free &= apart | ~there[:, other, None]
        first = free.argmax(axis=1)
        x[:, k], y[:, k] = tried_x[rows, first], tried_y[rows, first]
        there[:, k] = wanted[:, k] & free[rows, first]
    return x, y, there


def singled_out(attribute: np.ndarray, there: np.ndarray) -> np.ndarray:
    """(S,) bool: at least two values of the attribute (S, K) occur just once."""
    counts = (there[:, :, None] & (attribute[:, :, None] == np.arange(attribute.max() + 1))).sum(axis=1)
    return (counts == 1).sum(axis=1) >= 2


def fingerprint(scenes: Scenes, s: int) -> bytes:
    """Alike for two scenes just when their pictures are: the shapes that are there, whatever their order."""
    columns = (scenes.shape, scenes.colour, scenes.size, scenes.x, scenes.y)
    return bytes(sorted(zip(*(column[s, scenes.there[s]].tolist() for column in columns), strict=True)).__repr__(), "ascii")


def stencil(shape: str, half: int) -> np.ndarray:
    """The pixels of a shape in its bounding square, (2 * half + 1,) * 2 bool; integers only, so alike on every machine.

    >>> for row in stencil("triangle", 2):
    ...     print("".join("#" if pixel else "." for pixel in row))
    ..#..
    ..#..
    .###.
    .###.
    #####
    """
    row, column = np.mgrid[-half : half + 1, -half : half + 1]
    if shape == "circle":
        return row**2 + column**2 <= half**2 + half // 2
    if shape == "triangle":
        return 2 * abs(column) <= row + half
    if shape == "cross":
        return np.minimum(abs(row), abs(column)) <= half // 3
    return np.ones_like(row, dtype=bool)


def area(shape: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Pixels of the shapes, elementwise."""
    return np.array([[mask.sum() for mask in sizes] for sizes in stencils()])[shape, size]


def stencils() -> list[list[np.ndarray]]:
    """Of every shape in every size."""
    return [[stencil(shape, half) for half in SIZES.values()] for shape in SHAPES]


def render(scenes: Scenes) -> Iterator[np.ndarray]:
    """The picture of each scene, (SIDE, SIDE, 3) uint8."""
    masks, colours = stencils(), np.array(list(COLOURS.values()), dtype=np.uint8)
    for s in range(len(scenes)):
        picture = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
        picture[:] = BACKGROUND
        for k in np.flatnonzero(scenes.there[s]).tolist():
            mask = masks[scenes.shape[s, k]][scenes.size[s, k]]
            half, x, y = len(mask) // 2, scenes.x[s, k], scenes.y[s, k]
            picture[y - half : y + half + 1, x - half : x + half + 1][mask] = colours[scenes.colour[s, k]]
        yield picture
