"""Generated questions about scenes whose answers are label sets or numbers, or need a table: embedded data for other tasks and inputs."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from fusion.data.prepare import Preparer
from fusion.data.scenes import COLOURS, SHAPES, SIDE, SIZES, Scenes, area, draw_scenes, render
from fusion.data.shapes import image_of
from fusion.errors import UserError
from fusion.evaluation.bounds import bounds
from fusion.tasks import Classification, MultiLabel, Ordinal, Regression, Task

VERSION = 1  # of the generator: raise it when the same options would give other bytes
TARGETS = ("labels", "number", "count", "table", "caption", "tasks")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}


class SceneTargets(Preparer):
    """The scenes of Shapes, 64x64 pixels, and questions drawn at random from ten about each.

    labels: "which colours do the crosses have?", "which shapes are red?": a set of labels separated by ;, often empty.
    number: "how much of the picture is red?", "how much do the crosses cover?": percent of the pixels.
    count: "how many crosses are there?", "how many red ones are there?": an ordered class.
    caption: "a small red circle, a large blue cross and a medium red square", naming the objects in an order of its own: pairs for
    retrieval, without a label. questions_per_scene counts the captions of a scene, in different orders.
    tasks: "crosses" or "red ones", with columns for all of these: labels (their colours or shapes), percent and count.
    table: "is there a red one like this?", where two more columns give its shape and its side in pixels. Of two such questions about a
    colour one is answered yes, the other has the shape and side of another colour in the image: without the image, the text or the table
    accuracy is at chance. questions_per_scene counts the pairs, at most 5.

    Neither the image nor the text alone determines the answer; the card has the upper bounds of each.

    Args:
        target: "labels" (for the task MultiLabel), "number" (for Regression), "count" (for Ordinal), "table" (for Classification, with a
            TableInput), "caption" (for Retrieval), or "tasks"
            (for MultiTask).
        scenes: number of scenes, at least 20.
        questions_per_scene: number of questions about each scene, 1 to 10, all different.
        seed: seed of the scenes and questions, at least 0; the same seed gives the same bytes.
        val: share of the scenes for validation, above 0.
        test: share of the scenes for testing, above 0; val and test together are below 1.

    Raises UserError for options out of their range.
    """

    def __init__(
        self,
        target: Literal["labels", "number", "count", "table", "caption", "tasks"],
        scenes: int = 4000,
        questions_per_scene: int = 6,
        seed: int = 0,
        val: float = 0.1,
        test: float = 0.15,
    ) -> None:
        if target not in TARGETS:
            raise UserError(f"scenes: target is '{target}'; expected {', '.join(TARGETS[:-1])} or {TARGETS[-1]}")
        if scenes < 20 or not 1 <= questions_per_scene <= len(SHAPES) + len(COLOURS) or seed < 0:
            raise UserError(
                f"scenes: {scenes} scenes, {questions_per_scene} questions per scene, seed {seed}; expected at least 20, 1 to "
                f"{len(SHAPES) + len(COLOURS)}, and 0 or more"
            )
        if not (val > 0 and test > 0 and val + test < 1):
            raise UserError(f"scenes: val {val} and test {test} must be shares above 0 that leave something to train on")
        self.target, self.scenes, self.questions_per_scene = target, scenes, questions_per_scene
        self.seed, self.val, self.test = seed, val, test

    @property
    def options(self) -> dict[str, Any]:
        names = ("target", "scenes", "questions_per_scene", "seed", "val", "test")
        return {name: getattr(self, name) for name in names}

    def key(self, root: Path | None = None) -> str:
        return f"scenes-v{VERSION}-{hashlib.sha256(json.dumps(self.options).encode()).hexdigest()[:12]}"

    def prepare(self, folder: Path, root: Path | None = None) -> str:
        """Write manifest.csv and images/*.png into `folder`. Returns the card as text; `root` is not used."""
        count = self.scenes
        rng = np.random.default_rng([self.seed, VERSION])
        scenes = draw_scenes(count, rng)
        order = rng.permutation(count)
        val, test = round(self.val * count), round(self.test * count)
        split_of = np.full(count, "train", dtype=object)
        split_of[order[:val]], split_of[order[val : val + test]] = "val", "test"
        (folder / "images").mkdir(parents=True)
        for number, image in enumerate(render(scenes)):
            Image.fromarray(image).save(folder / image_of(number), compress_level=1)
        if self.target == "table":
            samples = pairs_like(scenes, self.questions_per_scene, rng)
        elif self.target == "caption":
            samples = captions(scenes, self.questions_per_scene, rng)
        elif self.target == "tasks":
            samples = questions_of_tasks(scenes, self.questions_per_scene, rng)
        else:
            answers = QUESTIONS[self.target](scenes)
            texts = list(answers)
            drawn = ((scene, texts[q]) for scene in range(count) for q in rng.permutation(len(texts))[: self.questions_per_scene].tolist())
            samples = [Question(scene, text, answers[text][scene]) for scene, text in drawn]
        with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            more = {"table": ["shape", "side"], "tasks": ["labels", "percent", "count"]}.get(self.target, [])
            writer.writerow(["image", "text", "label", "split", "id", "group", *more])
            for i, one in enumerate(samples):
                writer.writerow([image_of(one.scene), one.text, one.label, split_of[one.scene], i, one.scene, *one.facts])
        tested = [one for one in samples if split_of[one.scene] == "test"]
        if self.target == "caption":
            return caption_card(len(samples), tested)
        if self.target == "tasks":
            samples, tested = ([Question(one.scene, one.text, one.facts[2]) for one in questions] for questions in (samples, tested))
        tasks: dict[str, Task] = {"labels": MultiLabel(), "number": Regression(), "count": Ordinal(), "table": Classification()}
        task = tasks.get(self.target, tasks["count"])
        task.learn({"train": [one.label for one in samples]}, column="label", on_unseen="error")
        return card(len(samples), tested, task)


class Question(NamedTuple):
    """A question about a scene, its answer and, for target "table", the values of its table columns."""

    scene: int
    text: str
    label: str
    facts: tuple[str, ...] = ()


def pairs_like(scenes: Scenes, per_scene: int, rng: np.random.Generator) -> list[Question]:
    """Pairs of questions about a colour, of which one is answered yes and one no."""
    questions = []
    colours, shapes, sides = list(COLOURS), list(SHAPES), [2 * half + 1 for half in SIZES.values()]
    for s in range(len(scenes)):
        present = np.flatnonzero(scenes.there[s]).tolist()
        appearance = {k: (int(scenes.shape[s, k]), int(scenes.size[s, k])) for k in present}
        of_colour: dict[int, set[tuple[int, int]]] = {}
        for k in present:
            of_colour.setdefault(int(scenes.colour[s, k]), set()).add(appearance[k])
        pairs = 0
        for k in rng.permutation(present).tolist():
            colour = int(scenes.colour[s, k])
            others = sorted(set(appearance.values()) - of_colour[colour])
            if pairs == per_scene or not others:
                continue
            pairs += 1
            other = others[int(rng.integers(len(others)))]
            for (shape, size), label in ((appearance[k], "yes"), (other, "no")):
                facts = (shapes[shape], str(sides[size]))
                questions.append(Question(s, f"is there a {colours[colour]} one like this?", label, facts))
    return questions


def questions_of_tasks(scenes: Scenes, per_scene: int, rng: np.random.Generator) -> list[Question]:
    """Questions about every scene with an answer for each of three tasks, and none in the label's column."""
    texts = [PLURALS[shape] for shape in SHAPES] + [f"{colour} ones" for colour in COLOURS]
    answers = [list(QUESTIONS[name](scenes).values()) for name in ("labels", "number", "count")]
    drawn = ((scene, q) for scene in range(len(scenes)) for q in rng.permutation(len(texts))[:per_scene].tolist())
    return [Question(scene, texts[q], "", tuple(of_task[q][scene] for of_task in answers)) for scene, q in drawn]


def captions(scenes: Scenes, per_scene: int, rng: np.random.Generator) -> list[Question]:
    """Descriptions of every scene, as texts without answer."""
    shapes, colours, sizes = list(SHAPES), list(COLOURS), list(SIZES)
    texts = []
    for s in range(len(scenes)):
        objects = [
            f"a {sizes[scenes.size[s, k]]} {colours[scenes.colour[s, k]]} {shapes[scenes.shape[s, k]]}"
            for k in np.flatnonzero(scenes.there[s]).tolist()
        ]
        for _ in range(per_scene):
            *others, last = [objects[i] for i in rng.permutation(len(objects)).tolist()]
            texts.append(Question(s, f"{', '.join(others)} and {last}", ""))
    return texts


def caption_card(count: int, tested: Sequence[Question]) -> str:
    """The number of captions, and the best recall_1 on test that any model can expect: scenes of the same objects can't be told apart."""
    objects = {one.scene: " ".join(sorted(one.text.replace(" and ", ", ").split(", "))) for one in tested}
    alike = Counter(objects.values())
    best = sum(1 / alike[same] for same in objects.values()) / max(1, len(objects))
    return f"scenes: {count:,} captions. On test, recall_1 is at most {best:.4f}, since some scenes have the same objects"


def label_questions(scenes: Scenes) -> dict[str, list[str]]:
    """The answer to each question for every scene: labels in the order of their lists."""
    answers = {}
    for i, shape in enumerate(SHAPES):
        which = scenes.there & (scenes.shape == i)
        answers[f"which colours do the {PLURALS[shape]} have?"] = joined(which, scenes.colour, list(COLOURS))
    for i, colour in enumerate(COLOURS):
        answers[f"which shapes are {colour}?"] = joined(scenes.there & (scenes.colour == i), scenes.shape, list(SHAPES))
    return answers


def joined(which: np.ndarray, value: np.ndarray, names: Sequence[str]) -> list[str]:
    """(S,) the names of the values (S, K) that occur in each scene, separated by ;."""
    present = np.stack([(which & (value == i)).any(axis=1) for i in range(len(names))], axis=1)
    return [";".join(np.array(names)[row].tolist()) for row in present]


def number_questions(scenes: Scenes) -> dict[str, list[str]]:
    """The answer to each question for every scene, in percent of the pixels."""
    percent = area(scenes.shape, scenes.size) / SIDE**2 * 100

    def covered(which: np.ndarray) -> list[str]:
        return [f"{share:.4f}" for share in np.where(which & scenes.there, percent, 0.0).sum(axis=1).tolist()]

    answers = {f"how much do the {PLURALS[shape]} cover?": covered(scenes.shape == i) for i, shape in enumerate(SHAPES)}
    return answers | {f"how much of the picture is {colour}?": covered(scenes.colour == i) for i, colour in enumerate(COLOURS)}


def count_questions(scenes: Scenes) -> dict[str, list[str]]:
    """The answer to each question for every scene: how many objects have a shape, or a colour."""

    def counted(which: np.ndarray) -> list[str]:
        return [str(count) for count in (which & scenes.there).sum(axis=1).tolist()]

    answers = {f"how many {PLURALS[shape]} are there?": counted(scenes.shape == i) for i, shape in enumerate(SHAPES)}
    return answers | {f"how many {colour} ones are there?": counted(scenes.colour == i) for i, colour in enumerate(COLOURS)}


QUESTIONS = {"labels": label_questions, "number": number_questions, "count": count_questions}


def card(count: int, tested: Sequence[Question], task: Task) -> str:
    """The number of questions, and upper bounds on test of a constant answer and of parts of the inputs alone."""
    parts: dict[str, list[Hashable]] = {"image": [one.scene for one in tested], "text": [one.text for one in tested]}
    if tested and tested[0].facts:
        parts |= {
            "image and text": [(one.scene, one.text) for one in tested],
            "image and table": [(one.scene, one.facts) for one in tested],
            "text and table": [(one.text, one.facts) for one in tested],
        }
    limits = bounds(task, parts, [one.label for one in tested])
    shown = ", ".join(f"{name} {value:.4f}" for name, value in limits.items())
    return f"scenes: {count:,} questions. Bounds of {task.bounded} on test from one answer, and from parts of the inputs alone: {shown}"
