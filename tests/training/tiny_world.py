"""What the tests of training share beside fixtures."""

import csv
import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from fusion.benchmarks.kills import difference_of
from fusion.cli.main import run as run_command
from fusion.cli.predict import predict
from fusion.console import printing

REPOSITORY = Path(__file__).parents[2]
ROUNDING = 2e-5  # float32, summed in another order, over two epochs
# Options of short runs, and of runs that are validated seldom or never.
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
EARLY = "--trainer.callbacks+=EarlyStopping"
SELDOM = "--trainer.check_val_every_n_epoch=5"
NO_VALIDATION = ["--trainer.limit_val_batches=0"]

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


def train(task, data, updates=2, callbacks=(), **options):
    """Trains for a few updates, with nothing but the plan printed, and nothing saved; gives the trainer."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"), False)
    trainer = Trainer(accelerator="cpu", max_steps=updates, num_sanity_val_steps=0, callbacks=list(callbacks), **off, **options)
    with printing():
        trainer.fit(task, datamodule=data)
    return trainer


class Run:
    """The folder of a finished run."""

    def __init__(self, status, folder):
        self.status, self.folder = status, folder

    def checkpoint(self, name="last"):
        return torch.load(self.folder / "checkpoints" / f"{name}.ckpt", map_location="cpu", weights_only=True)

    def results(self):
        return json.loads((self.folder / "results.json").read_text())

    def column(self, name):
        """Its values in metrics.csv, where it has one."""
        if not (self.folder / "metrics.csv").is_file():
            return []
        with open(self.folder / "metrics.csv", newline="") as file:
            return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def rows_and_predictions(run, manifest):
    """A manifest's rows, and those that the command predict writes of them."""
    out = manifest.with_name("predictions.csv")
    assert predict(["--run", str(run.folder), "--manifest", str(manifest), "--out", str(out)]) == 0
    with open(manifest, newline="") as given, open(out, newline="") as written:
        return list(csv.DictReader(given)), list(csv.DictReader(written))


def newest(runs):
    return max(runs.glob("*/*"), key=lambda folder: folder.stat().st_mtime)


def assert_same_end(resumed, whole):
    a, b = resumed.checkpoint(), whole.checkpoint()
    assert a["fusion"]["updates"] == b["fusion"]["updates"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert difference_of(a[part], b[part]) is None
    assert a["global_step"] == b["global_step"]
    assert (resumed.folder / "results.json").read_text() == (whole.folder / "results.json").read_text()


def furthest(a, b):
    assert len(a) == len(b) > 0
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def furthest_weights(one, two):
    a, b = one.checkpoint()["state_dict"], two.checkpoint()["state_dict"]
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# Two ranks without the start of a command.

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["fusion.session", "fusion.encoders", "fusion.training", "torch._dynamo", "transformers.models.bert"])


def one_of_two(rank, port, words, prints):
    """The command, told of the other rank as torchrun tells it. Does not return."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    group |= {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({name: str(value) for name, value in group.items()})
    rank_zero_only.rank = rank  # which was read from the environment when the module was loaded
    torch.set_num_threads(1)
    with open(prints, "w", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        run_command("fit", words)
