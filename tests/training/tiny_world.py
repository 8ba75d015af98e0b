"""What the tests of training share beside fixtures."""

import csv
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]
TWO = ["--recipe", "engine/ddp", "--trainer.accelerator=cpu", "--trainer.devices=2"]

BERT = {
    "model_type": "bert",
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class Run:
    """The folder of a finished run."""

    def __init__(self, status, folder):
        self.status, self.folder = status, folder

    def checkpoint(self, name="last"):
        return torch.load(self.folder / "checkpoints" / f"{name}.ckpt", map_location="cpu", weights_only=True)

    def column(self, name):
        """Its values in metrics.csv, where it has one."""
        if not (self.folder / "metrics.csv").is_file():
            return []
        with open(self.folder / "metrics.csv", newline="") as file:
            return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def newest(runs):
    return max(runs.glob("*/*"), key=lambda folder: folder.stat().st_mtime)
