"""The embedded default: questions about pictures of coloured shapes, made from nothing; neither picture nor question alone answers."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fusion.data.prepare import Preparer
from fusion.data.scenes import COLOURS, SHAPES, SIDE, SIZES, Scenes, area, draw_scenes, render
from fusion.errors import UserError, nearest
from fusion.evaluation.bounds import bounds
from fusion.tasks import Classification

KINDS = ("existence", "colour", "counting", "position", "comparison")
SPLITS = ("train", "val", "test")
VERSION = 2  # of the generator: raise it when the same options would give other bytes
CLEARLY = 8  # pixels between a centre and the middle of the picture, at least, before its half is asked for
LARGEST_COUNT = 3
LOTS = 24  # in about so many lots a question's uses are dealt out: more are slower, fewer even out a scene's answers less


class Shapes(Preparer):
    """Scenes of 3 to 5 coloured shapes in three sizes, 64x64 pixels, and questions of five kinds about them.

    Balanced exactly: within every split each question string has each of its answers equally often, so the best that can be scored from
    the text alone is the mean of 1 / number of answers; each scene's answers are varied, which keeps the image alone low. Every answer
    can be seen: shapes stand apart, what is pointed at is there once, no relation is asked that is a matter of a few pixels.

    Args:
        scenes: number of scenes, at least 20.
        questions_per_scene: number of questions about each scene, as nearly as the balance allows; at least 1.
        kinds: kinds of questions, some of existence, colour, counting, position, comparison.
        seed: of the scenes and questions, at least 0; the same seed gives the same bytes.
        val: share of the scenes that goes into the val split, above 0.
        test: share of the scenes that goes into the test split, above 0; val and test together are below 1.

    Raises UserError for options that are unknown or clash, and for splits too small to balance.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     card = Shapes(scenes=300, questions_per_scene=4, kinds=["existence", "colour"]).prepare(Path(folder))
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['card.json', 'card.md', 'images', 'manifest.csv']
    """

    def __init__(
        self,
        scenes: int = 4000,
        questions_per_scene: int = 6,
        kinds: Sequence[str] = KINDS,
        seed: int = 0,
        val: float = 0.1,
        test: float = 0.15,
    ) -> None:
        wrong = []
        given = [kinds] if isinstance(kinds, str) else list(kinds)
        wrong += [f"unknown kind of question '{kind}'. {nearest(kind, KINDS)}" for kind in given if kind not in KINDS]
        if len(set(given)) < len(given) or not given:
            wrong.append(f"kinds is {given}; expected at least one kind, each once")
        for name, value, least in (("scenes", scenes, 20), ("questions_per_scene", questions_per_scene, 1), ("seed", seed, 0)):
            if value < least:
                wrong.append(f"{name} {value}; expected at least {least}")
        if not (val > 0 and test > 0 and val + test < 1):
            wrong.append(f"val {val} and test {test} must be shares above 0 that leave something to train on")
        if wrong:
            raise UserError("shapes: " + "; ".join(wrong))
        self.scenes, self.questions_per_scene, self.seed = scenes, questions_per_scene, seed
        self.kinds = tuple(kind for kind in KINDS if kind in given)
        self.val, self.test = val, test

    @property
    def options(self) -> dict[str, Any]:
        names = ("scenes", "questions_per_scene", "kinds", "seed", "val", "test")
        return {name: getattr(self, name) for name in names}

    def key(self, root: Path | None = None) -> str:
        """A folder name that changes with every option and with the version of the generator.

        >>> Shapes().key() == Shapes(kinds=tuple(reversed(KINDS))).key(), Shapes().key() == Shapes(seed=1).key()
        (True, False)
        """
        return f"shapes-v{VERSION}-{hashlib.sha256(json.dumps(self.options).encode()).hexdigest()[:12]}"

    def prepare(self, folder: Path, root: Path | None = None) -> str:
        """Write manifest.csv, images/*.png, card.json and card.md into `folder`; the card as text. Nothing is read: `root` is not used."""
        rng = np.random.default_rng(self.seed)
        scenes = draw_scenes(self.scenes, rng)
        rows = self.ask(scenes, rng)
        (folder / "images").mkdir(parents=True)
        for number, picture in enumerate(render(scenes)):
            Image.fromarray(picture).save(folder / image_of(number), compress_level=1)
        with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["image", "text", "label", "split", "id", "group", "kind"])
            writer.writerows([image_of(r.scene), r.text, r.label, r.split, i, r.scene, r.kind] for i, r in enumerate(rows))
        card = make_card(rows, self.options)
        (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        (folder / "card.md").write_text(card_markdown(card), encoding="utf-8")
        return card_text(card)

    def ask(self, scenes: Scenes, rng: np.random.Generator) -> list["Row"]:
        """The rows of the manifest, split by split."""
        order, val, test = rng.permutation(self.scenes), round(self.val * self.scenes), round(self.test * self.scenes)
        members = {"train": order[val + test :], "val": order[:val], "test": order[val : val + test]}
        questions = [question for question in every_question(scenes) if question.kind in self.kinds]
        rows: list[Row] = []
        for split in SPLITS:
            chosen = balance(questions, np.sort(members[split]), self.questions_per_scene, self.kinds, rng)
            part = [Row(split, s, questions[q].text, questions[q].answers[a], questions[q].kind) for s, q, a in chosen]
            if not part:
                raise UserError(
                    f"shapes: the {len(members[split])} scenes of {split} are too few to balance a single question: "
                    f"give more than {self.scenes} scenes, or {split} a larger share"
                )
            rows += part
            known = {row.text for row in rows}
            questions = [question for question in questions if question.text in known]  # nothing is asked later that train never asks
        return rows


@dataclass(frozen=True)
class Row:
    """One question about one scene."""

    split: str
    scene: int
    text: str
    label: str
    kind: str


def image_of(scene: int) -> str:
    return f"images/{scene:06}.png"


# Questions: each with its answer for every scene at once.


@dataclass(frozen=True)
class Question:
    """A question string, its possible answers, and `answer` (S,): the number of the right one, -1 where it can't be asked."""

    kind: str
    text: str
    answers: tuple[str, ...]
    answer: np.ndarray


def every_question(scenes: Scenes) -> Iterator[Question]:
    """Every question there is, with its answers.

    What a question points at, it points at by one word where that will do: fewer strings, each asked more often.
    """
    is_shape = {name: scenes.there & (scenes.shape == i) for i, name in enumerate(SHAPES)}
    is_colour = {name: scenes.there & (scenes.colour == i) for i, name in enumerate(COLOURS)}
    is_size = {name: scenes.there & (scenes.size == i) for i, name in enumerate(SIZES)}
    for shape in SHAPES:
        for word, which in (is_colour | is_size).items():
            yield yes_no("existence", f"is there a {word} {shape}?", (which & is_shape[shape]).any(axis=1))
        yield colour_of(f"what colour is the {shape}?", is_shape[shape], scenes)
        for size in SIZES:
            yield colour_of(f"what colour is the {size} {shape}?", is_size[size] & is_shape[shape], scenes)

    several = [
        {f"{colour} shapes": which for colour, which in is_colour.items()},
        {"crosses" if shape == "cross" else f"{shape}s": which for shape, which in is_shape.items()},
    ]
    one = [
        {f"the {colour} shape": which for colour, which in is_colour.items()},
        {f"the {shape}": which for shape, which in is_shape.items()},
    ]
    for names in several:
        numbers = {name: which.sum(axis=1) for name, which in names.items()}
        for name, number in numbers.items():
            answers = tuple(str(n) for n in range(LARGEST_COUNT + 1))
            yield Question("counting", f"how many {name} are there?", answers, np.where(number <= LARGEST_COUNT, number, -1))
        for a, b in ordered_pairs(numbers):
            any_there = numbers[a] + numbers[b] > 0
            yield yes_no("comparison", f"are there more {a} than {b}?", numbers[a] > numbers[b], any_there)
    for names in one:
        for name, which in names.items():
            yield from halves(name, which, scenes)
        for a, b in ordered_pairs(names):
            yield larger(a, b, names[a], names[b], scenes)


def halves(name: str, which: np.ndarray, scenes: Scenes) -> Iterator[Question]:
    """Where in the picture a shape is that is there once."""
    single = which.sum(axis=1) == 1
    # Twice the distance from the middle, which lies between two pixels.
    right, down = (2 * value_of(which, column) - (SIDE - 1) for column in (scenes.x, scenes.y))
    # Only one half of each pair: with both, an answer would depend on which half is named as XOR does, and nothing is learnt for long.
    for half, beyond in (("left", -right), ("upper", -down)):
        yield yes_no("position", f"is {name} in the {half} half?", beyond > 0, single & (abs(beyond) >= 2 * CLEARLY))


def larger(a: str, b: str, is_a: np.ndarray, is_b: np.ndarray, scenes: Scenes) -> Question:
    """Of two shapes that are there once each. A large triangle covers hardly more than a medium square: side and area must agree."""
    both = (is_a.sum(axis=1) == 1) & (is_b.sum(axis=1) == 1)
    side = value_of(is_a, scenes.size) - value_of(is_b, scenes.size)
    pixels_a, pixels_b = (value_of(which, area(scenes.shape, scenes.size)) for which in (is_a, is_b))
    clear = ((side > 0) & (4 * pixels_a >= 5 * pixels_b)) | ((side < 0) & (4 * pixels_b >= 5 * pixels_a))
    return yes_no("comparison", f"is {a} larger than {b}?", side > 0, both & clear)


def ordered_pairs(names: dict[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    return ((a, b) for a in names for b in names if a != b)


def yes_no(kind: str, text: str, true: np.ndarray, asked: np.ndarray | None = None) -> Question:
    return Question(kind, text, ("no", "yes"), true.astype(int) if asked is None else np.where(asked, true.astype(int), -1))


def colour_of(text: str, which: np.ndarray, scenes: Scenes) -> Question:
    return Question("colour", text, tuple(COLOURS), np.where(which.sum(axis=1) == 1, value_of(which, scenes.colour), -1))


def value_of(which: np.ndarray, column: np.ndarray) -> np.ndarray:
    """(S,) the column's value for the first shape meant; without sense where none is."""
    return np.take_along_axis(column, which.argmax(axis=1)[:, None], axis=1)[:, 0]


# Balance.


def balance(
    questions: Sequence[Question], members: np.ndarray, per_scene: int, kinds: Sequence[str], rng: np.random.Generator
) -> list[tuple[int, int, int]]:
    """(scene, question, answer) for the scenes `members`: every question as often with each of its answers.

    Each scene has room for equally many questions of every kind; what then stays empty, because a scene has too few shapes that can be
    pointed at, is filled with any kind. An exact answer to "which question about which scene" is a large matching; dealing in lots comes
    within a few percent of full.
    """
    labels = sorted({answer for question in questions for answer in question.answers})
    offers = [[labels.index(answer) for answer in question.answers] for question in questions]
    asked = np.full((len(questions), len(members)), -1)
    for q, question in enumerate(questions):
        asked[q] = np.where(question.answer[members] >= 0, np.array(offers[q])[question.answer[members]], -1)
    deal = Deal(asked, offers, np.zeros((len(members), len(labels)), dtype=int), rng)

    room = {kind: np.full(len(members), per_scene // len(kinds)) for kind in kinds}
    first = rng.integers(len(kinds), size=len(members))
    for extra in range(per_scene % len(kinds)):  # what doesn't divide goes to other kinds in other scenes
        for i, kind in enumerate(kinds):
            room[kind] += (first + extra) % len(kinds) == i
    # Questions that fit every scene come last: they can still even out the answers that the choosier ones have left.
    for kind in sorted(kinds, key=lambda kind: (kind == "existence", KINDS.index(kind))):
        deal([q for q, question in enumerate(questions) if question.kind == kind], room[kind])
    deal(list(range(len(questions))), np.sum(list(room.values()), axis=0))

    chosen = np.concatenate([np.empty((0, 3), dtype=int), *deal.chosen])
    chosen = chosen[rng.permutation(len(chosen))]
    return [(int(members[s]), int(q), offers[q].index(label)) for s, q, label in chosen.tolist()]


@dataclass
class Deal:
    """Questions dealt to S scenes, a lot of scenes for each answer at a time, so that the balance holds at every moment.

    asked (Q, S): the number of the right answer, -1 where the question can't be put, or has been. offers: each question's answers.
    given (S, A): how often each answer is right in each scene so far.
    """

    asked: np.ndarray
    offers: list[list[int]]
    given: np.ndarray
    rng: np.random.Generator
    chosen: list[np.ndarray] = field(default_factory=list)

    def __call__(self, questions: list[int], room: np.ndarray) -> None:
        """Put these questions until no scene that still has `room` (S,) for one can be matched with scenes for its other answers.

        Of the scenes that fit, those come first that have had the answer least and have most room; equals in an order of chance.
        """
        active = set(questions)
        lot = 1 + int(room.sum()) // (1 + LOTS * sum(len(self.offers[q]) for q in active))
        while active:
            for q in self.rng.permutation(sorted(active)).tolist():
                fits = [np.flatnonzero((self.asked[q] == label) & (room > 0)) for label in self.offers[q]]
                size = min(lot, *map(len, fits))
                if not size:
                    active.remove(q)
                    continue
                for label, scenes in zip(self.offers[q], fits, strict=True):
                    merit = room[scenes] - 2.0 * self.given[scenes, label] + self.rng.random(len(scenes))
                    best = np.sort(scenes[np.argpartition(-merit, size - 1)[:size]])
                    room[best] -= 1
                    self.given[best, label] += 1
                    self.asked[q, best] = -1
                    self.chosen.append(np.column_stack([best, np.full(size, q), np.full(size, label)]))


# The card.


DEFINED = "Ceilings: the best accuracy on exactly these questions of any predictor that sees the image alone, or the text alone; counted."


def make_card(rows: Sequence[Row], options: dict[str, Any]) -> dict[str, Any]:
    """What was made, in numbers."""
    return {
        "name": "shapes",
        "version": VERSION,
        "options": options,
        "splits": {split: numbers_of([row for row in rows if row.split == split]) for split in SPLITS},
        **numbers_of(rows),
        "strings": len({row.text for row in rows}),
        "answers": dict(Counter(row.label for row in rows).most_common()),
        "ceilings_are": DEFINED,
    }


def numbers_of(rows: Sequence[Row]) -> dict[str, Any]:
    kinds = Counter(row.kind for row in rows)
    return {
        "scenes": len({row.scene for row in rows}),
        "questions": len(rows),
        "kinds": {kind: kinds[kind] for kind in KINDS if kind in kinds},
        "ceilings": bounds(
            Classification(), {"image": [row.scene for row in rows], "text": [row.text for row in rows]}, [row.label for row in rows]
        ),
    }


def card_table(card: dict[str, Any]) -> list[list[str]]:
    kinds = list(card["kinds"])
    table = [["split", "scenes", "questions", *kinds, "image-only", "text-only", "majority"]]
    for split, part in [*card["splits"].items(), ("all", card)]:
        counts = [part["scenes"], part["questions"], *(part["kinds"].get(kind, 0) for kind in kinds)]
        best = (part["ceilings"][name] for name in ("image", "text", "majority"))
        table.append([split, *(f"{count:,}" for count in counts), *(f"{bound:.2%}" for bound in best)])
    return table


def card_text(card: dict[str, Any]) -> str:
    table = card_table(card)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [title(card)]
    for split, *numbers in table:
        lines.append("  ".join(["", split.ljust(widths[0]), *(n.rjust(width) for n, width in zip(numbers, widths[1:], strict=True))]))
    return "\n".join([*lines, f"  {answers(card)}", f"  {DEFINED}"])


def card_markdown(card: dict[str, Any]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in card_table(card))
    rule = "|" + " --- |" + " ---: |" * (head.count("|") - 2)
    options = ", ".join(f"{name}={value}" for name, value in card["options"].items())
    lines = [f"# {title(card)}", "", head, rule, *body, "", answers(card) + ".", "", DEFINED, "", f"Options: {options}.", ""]
    return "\n".join(lines)


def title(card: dict[str, Any]) -> str:
    return f"shapes, seed {card['options']['seed']}: {card['strings']} question strings, {len(card['answers'])} answers"


def answers(card: dict[str, Any]) -> str:
    return "Answers: " + ", ".join(f"{answer} {count:,}" for answer, count in card["answers"].items())
