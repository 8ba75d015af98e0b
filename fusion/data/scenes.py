"""Scenes of several coloured shapes, as arrays and rendered as images."""

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
SIDE = 64  # pixels of an image
FEWEST, MOST = 3, 5  # shapes of a scene
GAP = 2  # pixels of background between the bounding squares of any two shapes, at least
BACKGROUND = (245, 245, 240)
TRIES = 40  # positions drawn for a shape before it is left out of the scene
BATCH = 2048  # scenes drawn at a time: the tried positions fit into the processor's cache


@dataclass(frozen=True)
class Scenes:
    """S scenes of up to K = MOST shapes: shape, colour and size (each an index into the list of that name) and x, y, the centre in pixels
    from the top left corner, all (S, K) int; there (S, K) bool: which of the K exist.
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
    """`count` distinct scenes, in which no two shapes touch and at least two colours, or two kinds of shape, occur exactly once.

    Without the last condition, three scenes in ten would have no two shapes that a single word each identifies, and no questions on them.

    >>> scenes = draw_scenes(5, np.random.default_rng(0))
    >>> scenes.x.shape, bool((scenes.there.sum(axis=1) >= FEWEST).all())
    ((5, 5), True)
    """
    columns: list[list[np.ndarray]] = [[] for _ in fields(Scenes)]
    seen: set[bytes] = set()
    while len(seen) < count:
        drawn = draw_batch(BATCH, rng)
        useful = (drawn.there.sum(axis=1) >= FEWEST) & (singled_out(drawn.shape, drawn.there) | singled_out(drawn.colour, drawn.there))
        selected = []
        for s in np.flatnonzero(useful).tolist():
            if len(seen) < count and (what := fingerprint(drawn, s)) not in seen:
                seen.add(what)
                selected.append(s)
        for column, field in zip(columns, fields(Scenes), strict=True):
            column.append(getattr(drawn, field.name)[selected])
    return Scenes(*(np.concatenate(column) for column in columns))


def draw_batch(count: int, rng: np.random.Generator) -> Scenes:
    """Random scenes. Half of them have colours from a palette of two or three, so that counts of 2 and 3 are not rare."""
    shape = rng.integers(len(SHAPES), size=(count, MOST))
    palette = rng.permuted(np.tile(np.arange(len(COLOURS)), (count, 1)), axis=1)
    colours = np.where(rng.random(count) < 0.5, len(COLOURS), rng.integers(2, 4, size=count))
    colour = np.take_along_axis(palette, rng.integers(colours[:, None], size=(count, MOST)), axis=1)
    size = rng.integers(len(SIZES), size=(count, MOST))
    wanted = np.arange(MOST) < rng.integers(FEWEST, MOST + 1, size=count)[:, None]
    return Scenes(shape, colour, size, *place(size, wanted, rng))


def place(size: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y, there (S, K): positions of the wanted shapes in turn, each the first tried one that is free; left out if none is."""
    half = np.array(list(SIZES.values()))[size]
    x, y, there = np.zeros_like(half), np.zeros_like(half), np.zeros_like(wanted)
    scene = np.arange(len(size))
    for k in range(MOST):
        h = half[:, k, None]
        tried_x, tried_y = (rng.integers(h + 1, SIDE - h - 1, size=(len(size), TRIES)) for _ in "xy")
        free = np.ones((len(size), TRIES), dtype=bool)
        for other in range(k):
            # Bounding squares are apart if they are apart along one axis: the same rule for every pair of shapes, whatever their outlines.
            apart = np.maximum(abs(tried_x - x[:, other, None]), abs(tried_y - y[:, other, None])) > h + half[:, other, None] + GAP
            free &= apart | ~there[:, other, None]
        first = free.argmax(axis=1)
        x[:, k], y[:, k] = tried_x[scene, first], tried_y[scene, first]
        there[:, k] = wanted[:, k] & free[scene, first]
    return x, y, there


def singled_out(attribute: np.ndarray, there: np.ndarray) -> np.ndarray:
    """(S,) bool: at least two values of the attribute (S, K) occur exactly once."""
    counts = (there[:, :, None] & (attribute[:, :, None] == np.arange(attribute.max() + 1))).sum(axis=1)
    return (counts == 1).sum(axis=1) >= 2


def fingerprint(scenes: Scenes, s: int) -> bytes:
    """Equal for two scenes if and only if their images are: the existing shapes, in any order."""
    columns = (scenes.shape, scenes.colour, scenes.size, scenes.x, scenes.y)
    return bytes(sorted(zip(*(column[s, scenes.there[s]].tolist() for column in columns), strict=True)).__repr__(), "ascii")


def stencil(shape: str, half: int) -> np.ndarray:
    """The pixels of a shape in its bounding square, (2 * half + 1,) * 2 bool; integer arithmetic only, so the same on every machine.

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
    """Number of pixels of the shapes, elementwise."""
    return np.array([[mask.sum() for mask in sizes] for sizes in stencils()])[shape, size]


def stencils() -> list[list[np.ndarray]]:
    """The stencils of every shape in every size."""
    return [[stencil(shape, half) for half in SIZES.values()] for shape in SHAPES]


def render(scenes: Scenes) -> Iterator[np.ndarray]:
    """The image of each scene, (SIDE, SIDE, 3) uint8."""
    masks, colours = stencils(), np.array(list(COLOURS.values()), dtype=np.uint8)
    for s in range(len(scenes)):
        image = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
        image[:] = BACKGROUND
        for k in np.flatnonzero(scenes.there[s]).tolist():
            mask = masks[scenes.shape[s, k]][scenes.size[s, k]]
            half, x, y = len(mask) // 2, scenes.x[s, k], scenes.y[s, k]
            image[y - half : y + half + 1, x - half : x + half + 1][mask] = colours[scenes.colour[s, k]]
        yield image
