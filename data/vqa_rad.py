"""VQA-RAD: clinicians' questions about radiology images (Lau et al., 2018, "A dataset of clinically generated visual questions and
answers about radiology images"; CC0-1.0).

Published layout under root: images/*.jpg (315), trainset.json (3,064 questions), testset.json (451), each a list of objects with
image_name, question, answer, answer_type (CLOSED or OPEN), question_type, image_organ. Closed answers are yes, no and a few others; in
the test split 272 questions are closed, of which 48.9 % are answered "no", and 179 open, of which only 77 % have an answer that occurs
in train.
Note for reporting: test images also occur in train, and so do 14 (image, question) pairs of test.
Published (overall/open/closed), with encoders pretrained on medical images: 66.1/49.2/77.2 and 71.6/60.0/79.3.
"""

import csv
import json
from pathlib import Path

from fusion.errors import UserError

COLUMNS = ["image", "text", "label", "split", "id", "group", "answer_type", "question_type", "image_organ"]


def prepare(root: Path, folder: Path) -> str:
    """Write folder/manifest.csv, which refers to the images in place. Returns a summary."""
    samples, summary = [], []
    for split in ("train", "test"):
        file = root / f"{split}set.json"
        if not file.is_file():
            raise UserError(f"vqa_rad: no {file.name} under {root}; expected the published layout (images/, trainset.json, testset.json)")
        entries = json.loads(file.read_text(encoding="utf-8"))
        for i, entry in enumerate(entries):
            samples.append(
                [
                    (root / "images" / entry["image_name"]).resolve(),
                    " ".join(entry["question"].split()),
                    " ".join(str(entry["answer"]).lower().split()),  # the published answers have stray blanks and capitals
                    split,
                    f"{split}-{i}",
                    entry["image_name"],
                    entry["answer_type"].strip(),
                    entry["question_type"].strip(),
                    entry["image_organ"].strip(),
                ]
            )
        closed = sum(entry["answer_type"].strip() == "CLOSED" for entry in entries)
        images = len({entry["image_name"] for entry in entries})
        summary.append(f"{split}: {len(entries):,} questions ({closed:,} closed, {len(entries) - closed:,} open) on {images:,} images")
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file_out:
        csv.writer(file_out).writerows([COLUMNS, *samples])
    missing = len({sample[0] for sample in samples if not sample[0].is_file()})
    shared = len({sample[0] for sample in samples if sample[3] == "train"} & {sample[0] for sample in samples if sample[3] == "test"})
    summary.append(f"{missing} images are missing; {shared} images occur in train and in test, as published")
    return f"VQA-RAD in {root}\n  " + "\n  ".join(summary)
