"""Shapes, checked from its files alone: the manifest is read again and the pictures are looked at, pixel by pixel."""

import csv
import json
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusion.data.scenes import Scenes, render
from fusion.data.shapes import KINDS, Shapes
from fusion.errors import UserError

SPLITS = ("train", "val", "test")
BACKGROUND = (245, 245, 240)
COLOURS = {
    (220, 40, 40): "red",
    (40, 170, 60): "green",
    (50, 80, 220): "blue",
    (235, 205, 50): "yellow",
    (150, 60, 190): "purple",
    (130, 130, 130): "grey",
}
SIZES = {11: "small", 17: "medium", 25: "large"}

Row = dict[str, str]


@dataclass(frozen=True)
class Made:
    folder: Path
    told: str
    rows: list[Row]
    card: dict


def make(folder: Path, **options) -> Made:
    told = Shapes(**options).prepare(folder)
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return Made(folder, told, list(csv.DictReader(file)), json.loads((folder / "card.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("shapes"), scenes=600, seed=3)


# Looking at a picture: what a person would see.


@dataclass(frozen=True)
class Seen:
    words: frozenset[str]  # its colour, shape and size
    x: float
    y: float
    side: int
    pixels: int
    box: tuple[int, int, int, int]


def look(path: Path) -> list[Seen]:
    """Every patch of one colour, flooded from its first pixel."""
    with Image.open(path) as picture:
        assert picture.size == (64, 64)
        assert picture.mode == "RGB"
        pixels = picture.tobytes()
    colour_at = {(i % 64, i // 64): tuple(pixels[3 * i : 3 * i + 3]) for i in range(64 * 64)}
    left = {place for place, colour in colour_at.items() if colour != BACKGROUND}
    seen = []
    while left:
        start = left.pop()
        patch, edge = {start}, [start]
        while edge:
            x, y = edge.pop()
            near = {(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)} & left
            near = {place for place in near if colour_at[place] == colour_at[start]}
            left -= near
            patch |= near
            edge += near
        seen.append(recognise(patch, COLOURS[colour_at[start]]))
    return seen


def recognise(patch: set[tuple[int, int]], colour: str) -> Seen:
    xs, ys = [x for x, _ in patch], [y for _, y in patch]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    side = x1 - x0 + 1
    assert y1 - y0 + 1 == side
    if (x0, y0) in patch:
        shape = "square"
    elif (x0, y1) in patch:
        shape = "triangle"  # stands on its base
    elif (x0 + side // 4, y0 + side // 4) in patch:
        shape = "circle"
    else:
        shape = "cross"
    words = frozenset((colour, shape, SIZES[side]))
    return Seen(words, (x0 + x1) / 2, (y0 + y1) / 2, side, len(patch), (x0, y0, x1, y1))


# Answering a question from what is seen. It fails on a question that a person could not answer.


def meant(phrase: str, seen: list[Seen]) -> list[Seen]:
    words = {"cross" if word == "crosses" else word.removesuffix("s") if word != "cross" else word for word in phrase.split()}
    return [one for one in seen if words - {"shape"} <= one.words]


def the_one(phrase: str, seen: list[Seen]) -> Seen:
    (one,) = meant(phrase, seen)
    return one


def answer(question: str, seen: list[Seen]) -> str:
    def found(pattern: str) -> re.Match[str] | None:
        return re.fullmatch(pattern, question)

    if match := found(r"is there a (\w+ \w+)\?"):
        return yes(bool(meant(match[1], seen)))
    if match := found(r"what colour is the ([\w ]+)\?"):
        (colour,) = the_one(match[1], seen).words & set(COLOURS.values())
        return colour
    if match := found(r"how many ([\w ]+) are there\?"):
        return str(len(meant(match[1], seen)))
    if match := found(r"are there more ([\w ]+) than ([\w ]+)\?"):
        return yes(len(meant(match[1], seen)) > len(meant(match[2], seen)))
    if match := found(r"is the ([\w ]+) larger than the ([\w ]+)\?"):
        a, b = the_one(match[1], seen), the_one(match[2], seen)
        larger, smaller = sorted((a, b), key=lambda one: one.side, reverse=True)
        assert larger.side > smaller.side
        assert larger.pixels >= 1.25 * smaller.pixels
        return yes(a is larger)
    match = found(r"is the ([\w ]+) in the (left|right|upper|lower) half\?")
    assert match, question
    one = the_one(match[1], seen)
    from_middle = (one.x if match[2] in ("left", "right") else one.y) - 31.5
    assert abs(from_middle) >= 8
    return yes((from_middle < 0) == (match[2] in ("left", "upper")))


def yes(true: bool) -> str:
    return "yes" if true else "no"


def test_every_answer_can_be_seen_in_the_picture(made: Made) -> None:
    seen = {image: look(made.folder / image) for image in {row["image"] for row in made.rows}}
    wrong = [row for row in made.rows if answer(row["text"], seen[row["image"]]) != row["label"]]
    assert not wrong


def test_scenes_have_three_to_five_shapes_with_background_between_them(made: Made) -> None:
    for image in sorted((made.folder / "images").iterdir())[:200]:
        seen = look(image)
        assert 3 <= len(seen) <= 5
        for i, a in enumerate(seen):
            for b in seen[:i]:
                across = max(a.box[0] - b.box[2], b.box[0] - a.box[2])
                along = max(a.box[1] - b.box[3], b.box[1] - a.box[3])
                assert max(across, along) > 2  # of the bounding boxes, so at least 2 pixels of background


def test_a_picture_shows_each_shape_where_the_scene_has_it() -> None:
    one = {name: np.array([[value]]) for name, value in {"shape": 1, "colour": 0, "size": 0, "x": 20, "y": 40}.items()}
    (picture,) = render(Scenes(**one, there=np.array([[True]])))
    red = (picture == (220, 40, 40)).all(axis=2)
    assert red.sum() == 121
    assert red[35:46, 15:26].all()


def test_each_string_has_each_of_its_answers_equally_often_in_every_split(made: Made) -> None:
    possible = defaultdict(set)
    for row in made.rows:
        possible[row["text"]].add(row["label"])
    for split in SPLITS:
        labels = defaultdict(Counter)
        for row in made.rows:
            if row["split"] == split:
                labels[row["text"]][row["label"]] += 1
        for text, counts in labels.items():
            assert set(counts) == possible[text]
            assert len(set(counts.values())) == 1, (split, text, counts)


def test_what_may_be_answered_depends_on_the_kind_alone(made: Made) -> None:
    labels = defaultdict(set)
    for row in made.rows:
        labels[row["kind"]].add(row["label"])
    assert labels["colour"] == set(COLOURS.values())
    assert labels["counting"] == {"0", "1", "2", "3"}
    assert labels["existence"] == labels["position"] == labels["comparison"] == {"yes", "no"}


def test_the_cards_ceilings_are_those_counted_from_the_decoded_pictures_and_the_manifest(made: Made) -> None:
    pixels = {}
    for row in made.rows:
        with Image.open(made.folder / row["image"]) as picture:
            pixels[row["image"]] = picture.tobytes()
    parts = [(made.card, made.rows)]
    parts += [(made.card["splits"][split], [row for row in made.rows if row["split"] == split]) for split in SPLITS]
    for part, rows in parts:
        best = {}
        for name, seen in (("image", lambda row: pixels[row["image"]]), ("text", lambda row: row["text"]), ("majority", lambda row: None)):
            groups = defaultdict(list)
            for row in rows:
                groups[seen(row)].append(row["label"])
            best[name] = sum(max(labels.count(label) for label in set(labels)) for labels in groups.values())
        assert part["ceilings"] == {name: pytest.approx(right / len(rows), abs=1e-12) for name, right in best.items()}
        assert part["questions"] == len(rows)
        assert part["scenes"] == len({row["group"] for row in rows})
        assert part["kinds"] == Counter(row["kind"] for row in rows)
    assert made.card["answers"] == Counter(row["label"] for row in made.rows)
    assert made.card["strings"] == len({row["text"] for row in made.rows})


def test_neither_modality_alone_answers_more_than_two_in_five(made: Made) -> None:
    assert made.card["ceilings"]["image"] < 0.4
    assert made.card["ceilings"]["text"] < 0.4


def test_a_predictor_that_learns_the_answers_of_train_by_heart_is_at_chance_for_each_string_of_test(made: Made) -> None:
    learnt = {row["text"]: row["label"] for row in made.rows if row["split"] == "train"}
    test = [row for row in made.rows if row["split"] == "test"]
    right = sum(learnt[row["text"]] == row["label"] for row in test)
    assert right / len(test) == pytest.approx(made.card["splits"]["test"]["ceilings"]["text"], abs=1e-12)


def test_no_two_pictures_are_alike(made: Made) -> None:
    files = list((made.folder / "images").iterdir())
    pictures = set()
    for file in files:
        with Image.open(file) as picture:
            pictures.add(picture.tobytes())
    assert len(pictures) == len(files) == 600


def test_all_questions_on_a_scene_are_in_one_split_and_none_is_asked_twice(made: Made) -> None:
    splits = defaultdict(set)
    for row in made.rows:
        splits[row["group"]].add(row["split"])
        assert row["image"] == f"images/{int(row['group']):06}.png"
    assert all(len(where) == 1 for where in splits.values())
    assert len({(row["image"], row["text"]) for row in made.rows}) == len({row["id"] for row in made.rows}) == len(made.rows)
    assert Counter(next(iter(where)) for where in splits.values()) == {"train": 450, "val": 60, "test": 90}


def test_scenes_get_the_questions_asked_for_and_kinds_are_even(made: Made) -> None:
    assert len(made.rows) >= 0.98 * 600 * 6
    assert max(Counter(row["group"] for row in made.rows).values()) == 6
    kinds = Counter(row["kind"] for row in made.rows)
    assert set(kinds) == set(KINDS)
    assert all(abs(count / len(made.rows) - 0.2) < 0.05 for count in kinds.values())


def test_nothing_is_asked_in_val_or_test_that_train_never_asks(made: Made) -> None:
    texts = {split: {row["text"] for row in made.rows if row["split"] == split} for split in SPLITS}
    assert texts["val"] | texts["test"] <= texts["train"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_others(tmp_path: Path) -> None:
    once, again, other = (contents(make(tmp_path / name, scenes=200, seed=seed).folder) for name, seed in (("a", 5), ("b", 5), ("c", 6)))
    assert once == again
    assert once.keys() == other.keys()
    assert all(once[name] != other[name] for name in once)


def test_a_subset_of_kinds_is_balanced_too(tmp_path: Path) -> None:
    made = make(tmp_path, scenes=400, questions_per_scene=4, kinds=["existence", "colour"])
    assert {row["kind"] for row in made.rows} == {"existence", "colour"}
    assert made.card["ceilings"]["image"] < 0.4
    assert made.card["ceilings"]["text"] < 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_can_be_had_alone(tmp_path: Path, kind: str) -> None:
    made = make(tmp_path, scenes=300, questions_per_scene=2, kinds=[kind])
    assert {row["kind"] for row in made.rows} == {kind}
    assert made.card["ceilings"]["text"] == pytest.approx({"colour": 1 / 6, "counting": 1 / 4}.get(kind, 1 / 2))


def test_the_card_is_told_in_a_few_aligned_lines_and_kept_as_markdown(made: Made) -> None:
    lines = made.told.splitlines()
    assert len(lines) <= 15
    table = lines[1:6]
    assert len({len(line) for line in table}) == 1
    assert [line.split()[0] for line in table] == ["split", "train", "val", "test", "all"]
    assert f"{made.card['ceilings']['image']:.2%}" in table[-1]
    markdown = (made.folder / "card.md").read_text(encoding="utf-8")
    assert "| all | 600 |" in markdown
    assert "seed=3" in markdown


def test_the_key_changes_with_every_option_and_not_with_the_order_of_kinds() -> None:
    options = [{}, {"scenes": 4001}, {"questions_per_scene": 5}, {"kinds": ["colour"]}, {"seed": 1}, {"val": 0.11}, {"test": 0.16}]
    assert len({Shapes(**option).key() for option in options}) == len(options)
    assert Shapes(kinds=["colour", "existence"]).key() == Shapes(kinds=["existence", "colour"]).key()
    assert re.fullmatch(r"shapes-v\d+-[0-9a-f]{12}", Shapes().key())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kinds": ["colour", "countng"]}, r"unknown kind of question 'countng'\. Did you mean counting\?"),
        ({"kinds": "colur"}, r"'colur'\. Did you mean colour\?"),
        ({"kinds": []}, "at least one kind"),
        ({"kinds": ["colour", "colour"]}, "each once"),
        ({"scenes": 3}, "scenes 3; expected at least 20"),
        ({"questions_per_scene": 0}, "questions_per_scene 0"),
        ({"seed": -1}, "seed -1"),
        ({"val": 0.0}, "val 0.0"),
        ({"val": 0.5, "test": 0.5}, "leave something to train on"),
        ({"seed": -1, "kinds": ["position", "color"]}, r"Did you mean colour\?; .*seed -1"),
    ],
)
def test_bad_options_are_refused_with_what_would_do(options: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Shapes(**options)


def test_a_split_too_small_to_balance_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the 1 scenes of val are too few to balance"):
        Shapes(scenes=20, val=0.05).prepare(tmp_path)
    assert not list(tmp_path.iterdir())


def test_twenty_thousand_questions_are_made_in_seconds(tmp_path: Path) -> None:
    start = time.perf_counter()
    made = make(tmp_path, scenes=4000)
    assert time.perf_counter() - start < 30
    assert len(made.rows) >= 20_000
