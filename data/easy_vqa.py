"""easy-VQA: simple questions about one coloured shape (https://github.com/vzhou842/easy-VQA, MIT).

Published layout under root: {train,test}/images/<image id>.png (64x64 RGB), {train,test}/questions.json with entries
[question, answer, image id], answers.txt. 4,000 images and 38,575 questions for training, 1,000 and 9,673 for testing, 13 answers.
There is no validation split; one is carved out of train by image. Accuracies on test: majority class 37.3 %; published 99.5 %
(its own Keras example, with a bigger model and twice the data).
"""

import csv
import json
from pathlib import Path

from fusion.errors import UserError


def prepare(root: Path, folder: Path) -> str:
    """Write folder/manifest.csv, which refers to the images in place. Returns a summary."""
    summary, samples, missing = [], [], 0
    for split in ("train", "test"):
        questions = root / split / "questions.json"
        if not questions.is_file():
            raise UserError(f"easy_vqa: no {split}/questions.json under {root}; expected the published layout (train/, test/, answers.txt)")
        entries = json.loads(questions.read_text(encoding="utf-8"))
        images = {path.stem for path in (root / split / "images").glob("*.png")}
        for i, (question, answer, image) in enumerate(entries):
            missing += str(image) not in images
            path = (root / split / "images" / f"{image}.png").resolve()
            samples.append([path, question, answer, split, f"{split}-{i}", f"{split}-{image}", kind(question)])
        summary.append(f"{split}: {len(entries):,} questions on {len({image for *_, image in entries}):,} images")
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "text", "label", "split", "id", "group", "kind"], *samples])
    answers = len({label for _, _, label, *_ in samples})
    return f"easy-VQA in {root}\n  " + "\n  ".join([*summary, f"{answers} answers; {missing} questions whose image is missing"])


def kind(question: str) -> str:
    """The question's kind by its first words: colour, shape or yes/no."""
    return "colour" if question.startswith("what color") else "shape" if question.startswith("what") else "yes/no"
