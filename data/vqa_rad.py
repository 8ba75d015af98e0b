"""VQA-RAD: clinicians' questions about radiology images (Lau et al., 2018, "A dataset of clinically generated visual questions and
answers about radiology images"; CC0-1.0).

Published layout under root: images/*.jpg (315), trainset.json (3,064 questions), testset.json (451), each a list of objects with
image_name, question, answer, answer_type (CLOSED or OPEN), question_type, image_organ. Closed answers are yes, no and a few others; in
the test split 272 questions are closed, of which 48.9 % are answered "no", and 179 open, of which only 77 % have an answer that occurs
in train.
Mind when reporting: test images also occur in train, and 14 test (image, question) pairs recur there.
Published (overall/open/closed), with encoders pretrained on medical images: 66.1/49.2/77.2 and 71.6/60.0/79.3.
"""

import csv
import json
from pathlib import Path

from fusion.errors import UserError

COLUMNS = ["image", "text", "label", "split", "id", "group", "answer_type", "question_type", "image_organ"]


def prepare(root: Path, folder: Path) -> str:
    """Write folder/manifest.csv, which points at the images where they are; tell what was found."""
    rows, found = [], []
    for split in ("train", "test"):
        file = root / f"{split}set.json"
        if not file.is_file():
            raise UserError(f"vqa_rad: no {file.name} under {root}; expected the published layout (images/, trainset.json, testset.json)")
        asked = json.loads(file.read_text(encoding="utf-8"))
        for i, row in enumerate(asked):
            rows.append(
                [
                    (root / "images" / row["image_name"]).resolve(),
                    " ".join(row["question"].split()),
                    " ".join(str(row["answer"]).lower().split()),  # published with stray blanks and capitals
                    split,
                    f"{split}-{i}",
                    row["image_name"],
                    row["answer_type"].strip(),
                    row["question_type"].strip(),
                    row["image_organ"].strip(),
                ]
            )
        closed = sum(row["answer_type"].strip() == "CLOSED" for row in asked)
        images = len({row["image_name"] for row in asked})
        found.append(f"{split}: {len(asked):,} questions ({closed:,} closed, {len(asked) - closed:,} open) on {images:,} images")
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file_out:
        csv.writer(file_out).writerows([COLUMNS, *rows])
    missing = len({row[0] for row in rows if not row[0].is_file()})
    shared = len({row[0] for row in rows if row[3] == "train"} & {row[0] for row in rows if row[3] == "test"})
    found.append(f"{missing} images are missing; {shared} images occur in train and in test, as published")
    return f"VQA-RAD in {root}\n  " + "\n  ".join(found)
