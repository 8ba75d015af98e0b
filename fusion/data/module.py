"""The data of one run: a manifest read, split, checked and tokenized; then loaders of batches."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from fusion.cell_text import cell_text
from fusion.data.curriculum import LOSS, TEXT_LENGTH, Admission, Curriculum, difficulty
from fusion.data.format import Format
from fusion.data.images import Resize, cores
from fusion.data.kinds import ImageInput, Kind, TextInput
from fusion.data.kinds.base import Checking
from fusion.data.ledger import Ledger
from fusion.data.manifests import read_manifests
from fusion.data.prepare import Preparer, default_cache, prepared
from fusion.data.processor import Processor
from fusion.data.record import Record
from fusion.data.sampler import EvaluationBatches, GlobalBatches, planned_updates
from fusion.data.samples import Batch, Samples, as_is
from fusion.data.splits import assign_splits, draw_alike, groups_across_splits
from fusion.data.table import Columns, Table
from fusion.encoders import Encoder
from fusion.errors import UserError, nearest
from fusion.lightning_private import training_batches
from fusion.tasks import Task

SPLITS = ("train", "val", "test")


@dataclass
class Split:
    """One split: its table, its samples, and how many of them have a class that train lacks."""

    table: Table
    samples: Samples
    unseen: int


class FusionData(LightningDataModule):
    """Samples from a manifest, or made by a preparer; raises UserError for everything that is wrong with them.

    Args:
        manifest: CSV, TSV, JSON Lines (also as .gz) or Parquet with columns image, text, label and, if you like, split, id, group.
        val_manifest: a file of its own for validation. Rows of `manifest` keep the split that they name, which can't then be val.
        test_manifest: a file of its own for testing, likewise; may be the same file.
        columns: other names for the columns of an image, a text, the label, the split, the id and the group.
        inputs: inputs by name, each of a kind (ImageInput, TextInput, TableInput) with its own columns, to be encoded by the encoder of
            the same name (model.encoders); without it there are an image and a text.
        format: how the manifest's file is written: encoding, separator, quotes, spellings of a missing cell.
        preparer: makes the manifest instead: Shapes from nothing, Script from a published layout under `root`.
        root: the folder of the published layout.
        val: fraction carved out of train where no val is given, groups kept together, classes kept alike; 0 for none.
        test: the same for test.
        split_seed: of that carving, and of `train_samples`.
        train_samples: most training samples used, drawn at random with the classes alike, without regard to groups; val and test stay as
            they are. None: all.
        where: only the rows whose column has this value, or one of several: {answer_type: CLOSED}, {label: ["yes", "no"]}; all others are
            left out of every split.
        batch_size: samples in one optimiser update, over all devices and accumulated batches.
        device_batch_size: most samples of an update that a device takes at a time; the accumulation follows. None: its whole share.
        eval_batch_size: samples evaluated at a time, over all devices.
        max_length: most tokens of a text; longer ones are cut, counted and reported.
        resize: "squash" images to the encoder's size, "crop" their middle, or "pad" them.
        augment: transforms of training images, uint8 (3, H, W), such as torchvision.transforms.v2's.
        max_megapixels: larger images are refused unopened.
        memory_gib: decoded images are kept up to this much, once for all processes of a machine.
        num_workers: processes that decode; by default none for images in memory, else one a core up to eight.
        cache: where prepared data is kept; by default $FUSION_CACHE or ~/.cache/fusion.
        curriculum: admits training samples by difficulty, the easy ones first; without it all are admitted from the start.
        shuffle: "samples" one by one, or "images": all samples of an image side by side, so that it is encoded once for them.
        on_bad_sample: "drop" into the run's data_issues.csv, or "error" at the first.
        on_unseen_label: a label that train lacks is an "error", or "count_as_wrong" in the score.
        on_shared_group: a group in train and in another split is an "error", or "report"ed.
        seed: of the order of the batches (the run's seed).
    """

    def __init__(
        self,
        manifest: str | None = None,
        val_manifest: str | None = None,
        test_manifest: str | None = None,
        columns: Columns = Columns(),  # noqa: B008 (frozen)
        inputs: dict[str, Kind] | None = None,
        format: Format = Format(),  # noqa: B008 (frozen)
        preparer: Preparer | None = None,
        root: str | None = None,
        val: float = 0.1,
        test: float = 0.1,
        split_seed: int = 0,
        train_samples: int | None = None,
        where: dict[str, str | bool | int | float | list[str | bool | int | float]] | None = None,
        batch_size: int = 64,
        device_batch_size: int | None = None,
        eval_batch_size: int = 256,
        max_length: int = 64,
        resize: Resize = "squash",
        augment: list[nn.Module] | None = None,
        max_megapixels: float = 100.0,
        memory_gib: float = 1.0,
        num_workers: int | None = None,
        cache: str | None = None,
        curriculum: Curriculum | None = None,
        shuffle: Literal["samples", "images"] = "samples",
        on_bad_sample: Literal["drop", "error"] = "drop",
        on_unseen_label: Literal["error", "count_as_wrong"] = "error",
        on_shared_group: Literal["error", "report"] = "error",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (manifest is None) == (preparer is None):
            raise UserError("say where the data is: --data.manifest=FILE, or a recipe whose data.preparer makes it (one of the two)")
        if batch_size < 1 or eval_batch_size < 1:
            raise UserError(f"data.batch_size is {batch_size} and data.eval_batch_size {eval_batch_size}; expected at least 1")
        for option, file in (("manifest", manifest), ("val_manifest", val_manifest), ("test_manifest", test_manifest)):
            if file == "":
                raise UserError(f"data.{option} is empty; expected a file, or null for none")
        if max_length < 3:
            raise UserError(f"data.max_length is {max_length}; expected at least 3: a token between those that mark start and end")
        self.manifest, self.val_manifest, self.test_manifest = manifest, val_manifest, test_manifest
        self.columns, self.format, self.preparer, self.root = columns, format, preparer, root
        self.inputs = inputs or {}
        self.val, self.test, self.split_seed = val, test, split_seed
        self.train_samples, self.where = train_samples, where or {}
        self.batch_size, self.eval_batch_size, self.max_length = batch_size, eval_batch_size, max_length
        if device_batch_size is not None and device_batch_size < 1:
            raise UserError(f"data.device_batch_size is {device_batch_size}; expected at least 1, or null for a device's whole share")
        self.device_batch_size = device_batch_size
        self.resize, self.augment, self.max_megapixels, self.memory_gib = resize, augment, max_megapixels, memory_gib
        self.shuffle, self.curriculum = shuffle, curriculum
        if curriculum is not None:
            curriculum.check()
        self.admission: Admission | None = None
        self.losses: np.ndarray | None = None  # by training sample, of a curriculum's first pass
        self.num_workers, self.cache = num_workers, Path(cache) if cache else default_cache()
        self.on_unseen_label, self.on_shared_group, self.seed = on_unseen_label, on_shared_group, seed
        self.ledger = Ledger(on_bad_sample)
        self.card: str | None = None
        self.folder: Path | None = None
        self.splits: dict[str, Split] = {}
        self.processor: Processor
        self.record: Record
        self.processes_per_node = 1  # as the trainer is to start them
        self.leftovers: list[Path] = []  # files of the run's cache that are to go when it ends
        self.shared_groups = 0
        self.resume_at: tuple[int, int] | None = None

    # From files to samples.

    def load(self, encoders: Mapping[str, Encoder], task: Task) -> None:
        """Read, split, check and tokenize everything, for these encoders (by modality; a text encoder from scratch gets its vocabulary) and
        for a task, which learns from the training split."""
        if self.splits:
            return
        inputs = self.kinds(tuple(encoders), encoders)
        whole = self.split_table(inputs, task)
        table = self.check(whole.take([i for i, split in enumerate(whole.splits) if split]), encoders)
        self.record = Record.of(whole)
        cells = {name: [label for label, s in zip(table.labels, table.splits, strict=True) if s == name] for name in SPLITS}
        task.learn(cells, column=self.columns.label, on_unseen=self.on_unseen_label)
        self.refuse_leaks(table)
        parts = {name: table.take([i for i, split in enumerate(table.splits) if split == name]) for name in SPLITS}
        for name, kind in inputs.items():
            kind.learn(parts["train"].inputs[name], encoders[name])
        self.processor = Processor(inputs, task)
        for split, part in parts.items():
            if len(part):
                stores = {name: kind.store(part.inputs[name], training=split == "train") for name, kind in inputs.items()}
                self.splits[split] = Split(part, Samples(task.encode(part.labels), stores), task.unseen(part.labels))

    def kinds(self, names: Sequence[str], encoders: Mapping[str, Encoder] | None = None) -> dict[str, Kind]:
        """The inputs of these names, with the settings that they leave to the data. encoders: which are to read them.

        Raises UserError for a name that has no input, and where an encoder takes another kind.
        """
        usual: dict[str, Kind] = {"image": ImageInput(self.columns.image), "text": TextInput(self.columns.text)}
        found = {}
        for name in names:
            kind = self.inputs.get(name) or usual.get(name)
            if kind is None:
                raise UserError(
                    f"model has an encoder '{name}', but data.inputs has none of that name. {nearest(name, [*self.inputs, *usual])}"
                )
            own = name in self.inputs
            kind.option = f"data.inputs.{name}.init_args.{kind.column_option}" if own else f"data.columns.{name}"
            if encoders is not None and encoders[name].takes is not kind.takes:
                encoder = encoders[name]
                raise UserError(
                    f"model's encoder '{name}' ({type(encoder).__name__}) takes {encoder.takes.__name__}, but its input is a "
                    f"{type(kind).__name__}, which gives {kind.takes.__name__}"
                )
            kind.complete(self)
            found[name] = kind
        for name in self.inputs:
            if name not in names and encoders is not None:
                self.ledger.note(f"data.inputs has '{name}', which no encoder reads (model.encoders, model.modalities): it is left out")
        return found

    def split_table(self, inputs: Mapping[str, Kind], task: Task) -> Table:
        """All readable rows, each with its split: given, or carved out; None for training samples beyond `train_samples`."""
        table = self.table(inputs, task)
        self.refuse_shared_groups(table)  # of given splits, before others are carved out beside them
        strata = task.strata(table.labels)
        splits = assign_splits(strata, table.groups, table.splits, val=self.val, test=self.test, seed=self.split_seed)
        table.splits = list[str | None](splits)
        if self.train_samples is not None:
            train = [i for i, split in enumerate(table.splits) if split == "train"]
            drawn = draw_alike([strata[i] for i in train], self.train_samples, self.split_seed)
            for i in set(train) - {train[i] for i in drawn}:
                table.splits[i] = None
        return table

    def table(self, inputs: Mapping[str, Kind], task: Task) -> Table:
        """All readable rows, each with the split that its file or its cell gives it."""
        root = Path(self.root).expanduser() if self.root else None
        if self.preparer is not None:
            self.folder, self.card = prepared(self.preparer, root, self.cache)
        main = str(self.folder / "manifest.csv") if self.folder else str(self.manifest)
        own = {"val": self.val_manifest, "test": self.test_manifest}
        return self.chosen_rows(read_manifests(main, own, self.columns, inputs, task, format=self.format, ledger=self.ledger))

    def chosen_rows(self, table: Table) -> Table:
        """The rows that `where` asks for. Raises UserError for a column that the manifest lacks, and where no row is left."""
        before = {split for split in table.splits if split}
        for name, asked in self.where.items():
            known = table.by_name(self.columns)
            if name not in known:
                raise UserError(f"data.where: the manifest has no column '{name}'. {nearest(name, known)}")
            values = wanted_cells(name, asked)
            there = {cell for cell in known[name] if cell}
            if not there:
                raise UserError(f"data.where: no row has anything in column '{name}'")
            for value in values:
                if value not in there:
                    raise UserError(f"data.where: no row has '{value}' in column '{name}'. {nearest(value, there)}")
            table = table.take([i for i, cell in enumerate(known[name]) if cell in values])
        lost = [split for split in sorted(before - set(table.splits)) if {"val": self.val, "test": self.test}.get(split)]
        if lost:
            raise UserError(
                f"data.where leaves no row of the split {' and '.join(lost)} that the manifest gives; to go without: "
                + " ".join(f"--data.{split}=0" for split in lost)
            )
        return table

    def check(self, table: Table, encoders: Mapping[str, Encoder]) -> Table:
        """The table without the samples of which an input can't be used; these are listed."""
        checking = Checking(self.memory_gib, self.cache, self.processes_per_node > 1, self.leftovers)
        bad: dict[int, str] = {}
        for name, kind in table.kinds.items():
            bad = kind.check(table.inputs[name], encoders[name], checking) | bad
        for i in sorted(bad):
            self.ledger.add(table.files[i], table.rows[i], table.ids[i], bad[i])
        if len(bad) == len(table):
            raise UserError(f"none of the samples has inputs that can be used; the first: {self.ledger.issues[0].reason}")
        return table.take([i for i in range(len(table)) if i not in bad]) if bad else table

    def refuse_shared_groups(self, table: Table) -> dict[str, set[str]]:
        """The groups in more than one split, and in which. Raises UserError where train shares one, unless that is only to be reported."""
        shared = groups_across_splits(table.splits, table.groups)
        leaks = {group: splits for group, splits in shared.items() if "train" in splits}
        if leaks and self.on_shared_group == "error":
            group, splits = next(iter(leaks.items()))
            where = "the files" if self.val_manifest or self.test_manifest else f"column '{self.columns.split}'"
            raise UserError(
                f"{len(leaks)} groups are in train and in another split (the first: '{group}' in {', '.join(sorted(splits))}); "
                f"what train has seen can't test it. Fix {where}, or accept it: --data.on_shared_group=report; "
                f"or, if column '{self.columns.group}' is not meant as groups: --data.columns.group=null"
            )
        return shared

    def refuse_leaks(self, table: Table) -> None:
        self.shared_groups = len(self.refuse_shared_groups(table))
        whole: dict[str, list[Hashable]] = {name: [] for name in SPLITS}
        identities = [map(kind.identity, table.inputs[name]) for name, kind in table.kinds.items()]
        for inputs, split in zip(zip(*identities, strict=True), table.splits, strict=True):
            whole[str(split)].append(inputs)
        distinct = {name: set(found) for name, found in whole.items()}
        self.shared_inputs = {
            (name, other): sum(inputs in distinct[other] for inputs in whole[name])
            for name, other in (("val", "train"), ("test", "train"), ("test", "val"))
        }

    # From samples to batches.

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        batches = GlobalBatches(
            len(self.splits["train"].samples),
            self.batch_size,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
            accumulate=trainer.accumulate_grad_batches if trainer else 1,
            together=self.splits["train"].samples.blocks() if self.shuffle == "images" else None,
        )
        batches.admission = self.admission = self.admit(batches)
        if self.resume_at is not None:
            batches.begin_at(*self.resume_at)
            self.resume_at = None
        return make_loader(self.splits["train"].samples, batches, self.num_workers, pinned=self.on_cuda)

    def admit(self, batches: GlobalBatches) -> Admission | None:
        """Which samples are in when, by the curriculum."""
        if self.curriculum is None or self.trainer is None:
            return None
        split = self.splits["train"]
        epoch, horizon = planned_updates(self.trainer, batches)
        hard = self.losses if self.curriculum.by == LOSS else difficulty(self.curriculum, split.table, split.samples)
        return Admission(self.curriculum, hard, updates=epoch, horizon=horizon, batch_size=batches.batch_size)

    def first_pass_ends(self, epoch: int) -> bool:
        """Whether, after this epoch, a curriculum waits for the losses of the training samples."""
        c = self.curriculum
        return c is not None and c.by == LOSS and epoch + 1 == c.first_pass

    @property
    def reads_columns(self) -> str:
        """The column beside image, text and label by which training goes, "" if none."""
        c = self.curriculum
        return c.by if c is not None and c.by not in (LOSS, TEXT_LENGTH) else ""

    def set_losses(self, losses: np.ndarray) -> None:
        """The loss of each training sample, by which the rest of the training lets them in."""
        self.losses = losses
        if self.admission is not None:
            self.admission.set_difficulty(losses)

    def batch_count(self, split: str, world: int, accumulate: int) -> int:
        """The batches of an epoch, or of an evaluation, on each of so many devices."""
        count = len(self.splits[split].samples)
        if split == "train":
            return len(GlobalBatches(count, self.batch_size, seed=self.seed, world=world, accumulate=accumulate))
        return len(EvaluationBatches(count, max(1, self.eval_batch_size // world), world=world))

    def val_dataloader(self) -> Sequence[DataLoader[Batch]]:
        return [self.evaluation_loader("val")] if "val" in self.splits else []

    def test_dataloader(self) -> Sequence[DataLoader[Batch]]:
        return [self.evaluation_loader("test")] if "test" in self.splits else []

    def evaluation_loader(self, split: str, most: int | None = None) -> DataLoader[Batch]:
        """Every sample of the split once, over all ranks; or the first of them, at most so many."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        samples = self.splits[split].samples
        count = len(samples) if most is None else min(len(samples), most)
        batches = EvaluationBatches(count, max(1, self.eval_batch_size // world), rank=rank, world=world)
        return make_loader(samples.as_they_are(), batches, self.num_workers, pinned=self.on_cuda)

    @property
    def on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def teardown(self, stage: str) -> None:
        for path in self.leftovers:
            path.unlink(missing_ok=True)  # who has mapped it keeps it

    # Where in the epoch the run is, for the checkpoint.

    def state_dict(self) -> dict[str, Any]:
        if self.trainer is None:
            return {}
        epoch, batch = self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        finished = batch >= self.trainer.num_training_batches
        # In updates, which are the same however they are accumulated.
        place = {"epoch": epoch + 1, "update": 0} if finished else {"epoch": epoch, "update": batch // self.trainer.accumulate_grad_batches}
        return place | {"losses": None if self.losses is None else torch.from_numpy(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        trainer = self.trainer
        place = (state["epoch"], state["update"] * (trainer.accumulate_grad_batches if trainer else 1))
        batches = training_batches(trainer) if trainer else None
        if batches is None:
            self.resume_at = place
        else:  # a strategy that restores after its setup (FSDP), for which the loader is there already
            batches.begin_at(*place)
        if state["losses"] is not None:
            self.set_losses(state["losses"].numpy())


def wanted_cells(column: str, asked: Any) -> list[str]:
    """The cells that `where` asks for in a column, as the table has them. Raises UserError for YAML's booleans, whose spelling is lost."""
    values = asked if isinstance(asked, list) else [asked]
    if not values:
        raise UserError(f"data.where.{column} is an empty list, which no row fits; name cells, or leave it out")
    if any(isinstance(value, bool) for value in values):
        raise UserError(f'data.where.{column}: yes, no, true and false are booleans in YAML; as texts they stand in quotes: ["yes", "no"]')
    return [str(cell_text(value)) for value in values]


def make_loader(samples: Samples, batches: Any, num_workers: int | None, *, pinned: bool) -> DataLoader[Batch]:
    """A loader of whole batches, in memory from which a GPU copies while it computes if `pinned`. Without a number of workers: none for
    inputs in memory, else one for each core that the process may use, up to eight.
    """
    at_hand = all(store.in_memory and not store.random for store in samples.stores.values())
    workers = num_workers if num_workers is not None else 0 if at_hand else min(8, cores())
    return DataLoader(
        samples, batch_sampler=batches, collate_fn=as_is, num_workers=workers, persistent_workers=workers > 0, pin_memory=pinned
    )
