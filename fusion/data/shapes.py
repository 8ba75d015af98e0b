"""The embedded default data set: generated images of coloured shapes and questions that neither image nor text alone answers."""

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
CLEARLY = 8  # minimum pixels between a shape's centre and the image's middle for a question about its half
LARGEST_COUNT = 3
LOTS = 24  # approximate number of lots in which a question is assigned: more are slower, fewer balance a scene's answers less well


class Shapes(Preparer):
    """Scenes of 3 to 5 coloured shapes in three sizes, 64x64 pixels, and questions of five kinds about them.

    Balanced exactly: within every split each question string has each of its answers equally often, so the upper bound from the text alone
    is the mean of 1 / number of answers; each scene's answers vary, so the upper bound from the image alone is low. Every answer is
    visible: shapes are apart, a shape that a question refers to occurs once, and no relation depends on a few pixels.

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
        """Write manifest.csv, images/*.png, card.json and card.md into `folder`. Returns the card as text; `root` is not used."""
        rng = np.random.default_rng(self.seed)
        scenes = draw_scenes(self.scenes, rng)
        samples = self.ask(scenes, rng)
        (folder / "images").mkdir(parents=True)
        for number, image in enumerate(render(scenes)):
            Image.fromarray(image).save(folder / image_of(number), compress_level=1)
        with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["image", "text", "label", "split", "id", "group", "kind"])
            writer.writerows([image_of(s.scene), s.text, s.label, s.split, i, s.scene, s.kind] for i, s in enumerate(samples))
        card = make_card(samples, self.options)
        (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        (folder / "card.md").write_text(card_markdown(card), encoding="utf-8")
        return card_text(card)

    def ask(self, scenes: Scenes, rng: np.random.Generator) -> list["Sample"]:
        """The samples of the manifest, split by split."""
        order, val, test = rng.permutation(self.scenes), round(self.val * self.scenes), round(self.test * self.scenes)
        members = {"train": order[val + test :], "val": order[:val], "test": order[val : val + test]}
        questions = [question for question in every_question(scenes) if question.kind in self.kinds]
        samples: list[Sample] = []
        for split in SPLITS:
            chosen = balance(questions, np.sort(members[split]), self.questions_per_scene, self.kinds, rng)
            part = [Sample(split, s, questions[q].text, questions[q].answers[a], questions[q].kind) for s, q, a in chosen]
            if not part:
                raise UserError(
                    f"shapes: the {len(members[split])} scenes of {split} are too few to balance a single question: "
                    f"give more than {self.scenes} scenes, or {split} a larger share"
                )
            samples += part
            known = {sample.text for sample in samples}
            questions = [question for question in questions if question.text in known]  # only questions that occur in train
        return samples


@dataclass(frozen=True)
class Sample:
    """One question about one scene."""

    split: str
    scene: int
    text: str
    label: str
    kind: str


def image_of(scene: int) -> str:
    return f"images/{scene:06}.png"


# Questions, each with its answers for all scenes


@dataclass(frozen=True)
class Question:
    """A question string, its possible answers, and `answer` (S,): the index of the correct one, -1 where it doesn't apply."""

    kind: str
    text: str
    answers: tuple[str, ...]
    answer: np.ndarray


def every_question(scenes: Scenes) -> Iterator[Question]:
    """All questions with their answers.

    Questions refer to a shape by one word where that suffices: there are fewer strings, each used more often.
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
    """Questions about the position of a shape that occurs once."""
    single = which.sum(axis=1) == 1
    # Twice the distance from the middle, which lies between two pixels.
    right, down = (2 * value_of(which, column) - (SIDE - 1) for column in (scenes.x, scenes.y))
    # Only one half of each pair: with both, the answer would be an XOR of position and named half, which takes long to learn.
    for half, beyond in (("left", -right), ("upper", -down)):
        yield yes_no("position", f"is {name} in the {half} half?", beyond > 0, single & (abs(beyond) >= 2 * CLEARLY))


def larger(a: str, b: str, is_a: np.ndarray, is_b: np.ndarray, scenes: Scenes) -> Question:
    """A question about two shapes that occur once each; side and area must agree: large triangles cover little more than medium squares."""
    both = (is_a.sum(axis=1) == 1) & (is_b.sum(axis=1) == 1)
    side = value_of(is_a, scenes.size) - value_of(is_b, scenes.size)
    pixels_a, pixels_b = (value_of(which, area(scenes.shape, scenes.size)) for which in (is_a, is_b))
    clear = ((side > 0) & (4 * pixels_a >= 5 * pixels_b)) | ((side < 0) & (4 * pixels_b >= 5 * pixels_a))
    return yes_no("comparison", f"is {a} larger than {b}?", side > 0, both & clear)


def ordered_pairs(names: dict[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    return ((a, b) for a in names for b in names if a != b)


def yes_no(kind: str, text: str, true: np.ndarray, applies: np.ndarray | None = None) -> Question:
    return Question(kind, text, ("no", "yes"), true.astype(int) if applies is None else np.where(applies, true.astype(int), -1))


def colour_of(text: str, which: np.ndarray, scenes: Scenes) -> Question:
    return Question("colour", text, tuple(COLOURS), np.where(which.sum(axis=1) == 1, value_of(which, scenes.colour), -1))


def value_of(which: np.ndarray, column: np.ndarray) -> np.ndarray:
    """(S,) the column's value for the first shape of `which`; meaningless where there is none."""
    return np.take_along_axis(column, which.argmax(axis=1)[:, None], axis=1)[:, 0]


# Balancing


def balance(
    questions: Sequence[Question], members: np.ndarray, per_scene: int, kinds: Sequence[str], rng: np.random.Generator
) -> list[tuple[int, int, int]]:
    """(scene, question, answer) for the scenes `members`: every question equally often with each of its answers.

    Each scene has capacity for equally many questions of every kind; capacity that remains, because a scene has too few shapes to which
    questions can refer, is filled with any kind. The exact assignment is a large matching problem; assigning in lots fills all but a few
    percent of the capacity.
    """
    labels = sorted({answer for question in questions for answer in question.answers})
    offers = [[labels.index(answer) for answer in question.answers] for question in questions]
    answer = np.full((len(questions), len(members)), -1)
    for q, question in enumerate(questions):
        answer[q] = np.where(question.answer[members] >= 0, np.array(offers[q])[question.answer[members]], -1)
    deal = Deal(answer, offers, np.zeros((len(members), len(labels)), dtype=int), rng)

    capacity = {kind: np.full(len(members), per_scene // len(kinds)) for kind in kinds}
    first = rng.integers(len(kinds), size=len(members))
    for extra in range(per_scene % len(kinds)):  # the remainder goes to different kinds in different scenes
        for i, kind in enumerate(kinds):
            capacity[kind] += (first + extra) % len(kinds) == i
    # Questions that apply to every scene come last: they can balance the answers that remain from the more selective ones.
    for kind in sorted(kinds, key=lambda kind: (kind == "existence", KINDS.index(kind))):
        deal([q for q, question in enumerate(questions) if question.kind == kind], capacity[kind])
    deal(list(range(len(questions))), np.sum(list(capacity.values()), axis=0))

    chosen = np.concatenate([np.empty((0, 3), dtype=int), *deal.chosen])
    chosen = chosen[rng.permutation(len(chosen))]
    return [(int(members[s]), int(q), offers[q].index(label)) for s, q, label in chosen.tolist()]


@dataclass
class Deal:
    """Assigns questions to S scenes, one lot of scenes for each answer at a time, so that they are balanced at every step.

    answer (Q, S): the index of the correct answer, -1 where the question doesn't apply or is assigned already. offers: each question's
    answers. given (S, A): how often each answer is correct in each scene so far.
    """

    answer: np.ndarray
    offers: list[list[int]]
    given: np.ndarray
    rng: np.random.Generator
    chosen: list[np.ndarray] = field(default_factory=list)

    def __call__(self, questions: list[int], capacity: np.ndarray) -> None:
        """Assign these questions until no scene with `capacity` (S,) left can be matched with scenes for a question's other answers.

        Of the candidate scenes, those with the fewest such answers and the largest capacity come first; ties are broken at random.
        """
        active = set(questions)
        lot = 1 + int(capacity.sum()) // (1 + LOTS * sum(len(self.offers[q]) for q in active))
        while active:
            for q in self.rng.permutation(sorted(active)).tolist():
                candidates = [np.flatnonzero((self.answer[q] == label) & (capacity > 0)) for label in self.offers[q]]
                size = min(lot, *map(len, candidates))
                if not size:
                    active.remove(q)
                    continue
                for label, scenes in zip(self.offers[q], candidates, strict=True):
                    merit = capacity[scenes] - 2.0 * self.given[scenes, label] + self.rng.random(len(scenes))
                    best = np.sort(scenes[np.argpartition(-merit, size - 1)[:size]])
                    capacity[best] -= 1
                    self.given[best, label] += 1
                    self.answer[q, best] = -1
                    self.chosen.append(np.column_stack([best, np.full(size, q), np.full(size, label)]))


# Card


DEFINED = "Ceilings: the best accuracy on exactly these questions of any predictor that sees the image alone, or the text alone; counted."


def make_card(samples: Sequence[Sample], options: dict[str, Any]) -> dict[str, Any]:
    """The statistics of the data set and its upper bounds."""
    return {
        "name": "shapes",
        "version": VERSION,
        "options": options,
        "splits": {split: numbers_of([sample for sample in samples if sample.split == split]) for split in SPLITS},
        **numbers_of(samples),
        "strings": len({sample.text for sample in samples}),
        "answers": dict(Counter(sample.label for sample in samples).most_common()),
        "ceilings_are": DEFINED,
    }


def numbers_of(samples: Sequence[Sample]) -> dict[str, Any]:
    kinds = Counter(sample.kind for sample in samples)
    return {
        "scenes": len({sample.scene for sample in samples}),
        "questions": len(samples),
        "kinds": {kind: kinds[kind] for kind in KINDS if kind in kinds},
        "ceilings": bounds(
            Classification(),
            {"image": [sample.scene for sample in samples], "text": [sample.text for sample in samples]},
            [sample.label for sample in samples],
        ),
    }


def card_table(card: dict[str, Any]) -> list[list[str]]:
    kinds = list(card["kinds"])
    table = [["split", "scenes", "questions", *kinds, "image-only", "text-only", "majority"]]
    for split, part in [*card["splits"].items(), ("all", card)]:
        counts = [part["scenes"], part["questions"], *(part["kinds"].get(kind, 0) for kind in kinds)]
        limits = (part["ceilings"][name] for name in ("image", "text", "majority"))
        table.append([split, *(f"{count:,}" for count in counts), *(f"{bound:.2%}" for bound in limits)])
    return table


def card_text(card: dict[str, Any]) -> str:
    table = card_table(card)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [title(card)]
    for split, *numbers in table:
        lines.append("  ".join(["", split.ljust(widths[0]), *(n.rjust(width) for n, width in zip(numbers, widths[1:], strict=True))]))
    return "\n".join([*lines, f"  {answers(card)}", f"  {DEFINED}"])


def card_markdown(card: dict[str, Any]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in card_table(card))
    rule = "|" + " --- |" + " ---: |" * (head.count("|") - 2)
    options = ", ".join(f"{name}={value}" for name, value in card["options"].items())
    lines = [f"# {title(card)}", "", head, rule, *body, "", answers(card) + ".", "", DEFINED, "", f"Options: {options}.", ""]
    return "\n".join(lines)


def title(card: dict[str, Any]) -> str:
    return f"shapes, seed {card['options']['seed']}: {card['strings']} question strings, {len(card['answers'])} answers"


def answers(card: dict[str, Any]) -> str:
    return "Answers: " + ", ".join(f"{answer} {count:,}" for answer, count in card["answers"].items())
