"""The data module of a run: reads, splits, checks and tokenizes a manifest; provides the data loaders."""

import math
from collections import Counter
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
from fusion.data.distinct_batches import distinct_batches
from fusion.data.format import Format
from fusion.data.issues import DataIssues
from fusion.data.kinds import ImageInput, Kind, TextInput
from fusion.data.kinds.base import Checking
from fusion.data.manifests import read_manifests
from fusion.data.prepare import Preparer, default_cache, prepared
from fusion.data.processor import Processor
from fusion.data.record import Record
from fusion.data.sampler import EvaluationBatches, GlobalBatches, planned_updates
from fusion.data.samples import Batch, Samples, Updates, as_is
from fusion.data.splits import assign_splits, draw_stratified, groups_across_splits
from fusion.data.table import Columns, Table
from fusion.encoders import Encoder
from fusion.errors import UserError, nearest
from fusion.lightning_private import training_batches
from fusion.processing.images import Resize, cores
from fusion.tasks import Task

SPLITS = ("train", "val", "test")


@dataclass
class Split:
    """One split: its table, its samples, and how many of them have a class that does not occur in train."""

    table: Table
    samples: Samples
    unseen: int


class FusionData(LightningDataModule):
    """Samples from a manifest, or made by a preparer. Raises UserError for mistakes in the options and the data.

    Args:
        manifest: CSV, TSV, JSON Lines (also as .gz) or Parquet with columns image, text, label and optionally split, id, group.
        val_manifest: a separate file for validation. Rows of `manifest` keep the split that they name, which must not be val then.
        test_manifest: a separate file for testing, likewise; may be the same file.
        columns: names of the columns of images, texts, labels, splits, ids and groups.
        inputs: inputs by name, each of a kind (ImageInput, TextInput, TableInput) with its own columns, for the encoder of the same name
            (model.encoders). None: an image and a text.
        format: file format of the manifest: encoding, separator, quotes, spellings of a missing cell.
        preparer: makes the manifest instead: Shapes generates it, Script converts a published layout under `root`.
        root: folder of the published layout.
        val: fraction of train that is split off for validation where no val is given, stratified by class, groups kept whole; 0 for none.
            With on_unseen_label=count_as_wrong, classes too rare to be divided are one stratum, else they stay in train.
        test: the same for test.
        split_seed: seed of that split and of `train_samples`.
        train_samples: maximum number of training samples, drawn at random and stratified by class, regardless of groups; val and test are
            unchanged. None: all.
        where: use only rows whose column has this value, or one of several: {answer_type: CLOSED}, {label: ["yes", "no"]}; in every split.
        batch_size: samples per optimiser update, over all devices and accumulated batches.
        device_batch_size: maximum number of samples per device and forward pass; the accumulation follows from it. None: a device's whole
            share of the batch.
        eval_batch_size: samples per evaluation step, over all devices.
        max_length: maximum number of tokens of a text; longer texts are truncated, counted and reported.
        resize: "squash" images to the encoder's size, "crop" their centre, or "pad" them. None: as the encoder was pretrained where it says
            so (CLIP, SigLIP), else "squash".
        augment: transforms of training images, uint8 (3, H, W), such as torchvision.transforms.v2's.
        max_megapixels: larger images are rejected without decoding.
        memory_gib: decoded images are held in memory up to this size, shared by all processes of a machine.
        num_workers: processes that decode images; None: none for images in memory, else one per core up to eight.
        cache: folder for prepared data. None: $FUSION_CACHE or ~/.cache/fusion.
        curriculum: admits training samples by difficulty, the easy ones first. None: all from the start.
        shuffle: "samples" individually, or "images": all samples of an image together, so that it is encoded once for them.
        on_bad_sample: "drop" unusable samples and list them in the run's data_issues.csv, or "error" at the first.
        on_unseen_label: a label that does not occur in train is an "error", or "count_as_wrong" in the score.
        on_shared_group: a group in train and in another split is an "error", or only "report"ed.
        seed: seed of the order of the batches (the run's seed).
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
        resize: Resize | None = None,
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
            raise UserError("data: expected either --data.manifest=FILE, or a recipe whose data.preparer makes the manifest")
        if batch_size < 1 or eval_batch_size < 1:
            raise UserError(f"data.batch_size is {batch_size} and data.eval_batch_size {eval_batch_size}; expected at least 1")
        for option, file in (("manifest", manifest), ("val_manifest", val_manifest), ("test_manifest", test_manifest)):
            if file == "":
                raise UserError(f"data.{option} is empty; expected a file, or null for none")
        if max_length < 3:
            raise UserError(f"data.max_length is {max_length}; expected at least 3: one token besides those that mark start and end")
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
        self.losses: np.ndarray | None = None  # of each training sample, measured after a curriculum's first pass
        self.num_workers, self.cache = num_workers, Path(cache) if cache else default_cache()
        self.on_unseen_label, self.on_shared_group, self.seed = on_unseen_label, on_shared_group, seed
        self.issues = DataIssues(on_bad_sample)
        self.card: str | None = None
        self.folder: Path | None = None
        self.splits: dict[str, Split] = {}
        self.processor: Processor
        self.record: Record
        self.processes_per_node = 1  # set to what the trainer will start
        self.leftovers: list[Path] = []  # files of the run's cache that are removed when it ends
        self.shared_groups = 0
        self.resume_at: tuple[int, int] | None = None
        self.contrasts = self.draws_apart = False  # of the task

    # Loading

    def load(self, encoders: Mapping[str, Encoder], task: Task) -> None:
        """Read, split, check and tokenize everything for these encoders (by modality) and this task. Text encoders from scratch get their
        vocabulary, the task is fitted to the training split."""
        if self.splits:
            return
        inputs = self.kinds(tuple(encoders), encoders)
        whole = self.split_table(inputs, task)
        table = self.check(whole.take([i for i, split in enumerate(whole.splits) if split]), encoders)
        self.record = Record.of(whole)
        labels = {name: [label for label, s in zip(table.labels, table.splits, strict=True) if s == name] for name in SPLITS}
        task.learn(labels, column=",".join(self.columns.targets), on_unseen=self.on_unseen_label)
        self.check_leaks(table)
        self.contrasts, self.draws_apart = task.contrasts, task.draws_apart
        parts = {name: table.take([i for i, split in enumerate(table.splits) if split == name]) for name in SPLITS}
        for name, kind in inputs.items():
            kind.learn(parts["train"].inputs[name], encoders[name])
        self.processor = Processor(inputs, task)
        for split, part in parts.items():
            if len(part):
                stores = {name: kind.store(part.inputs[name], training=split == "train") for name, kind in inputs.items()}
                self.splits[split] = Split(part, Samples(task.encode(part.labels), stores), task.unseen(part.labels))
        if task.contrasts and self.curriculum is not None and self.curriculum.by == LOSS:
            raise UserError(
                f"data.curriculum.by is loss, but in {type(task).__name__} a sample has none by itself; use text_length or a column"
            )
        if task.draws_apart:
            self.check_batches(type(task).__name__)

    def check_batches(self, task: str) -> None:
        """Raises UserError where batches without shared items are not to be drawn, or can't be."""
        if self.shuffle == "images":
            raise UserError(
                f"data.shuffle is images, which draws samples that share an image together, but {task} needs batches without shared "
                "ones: set --data.shuffle=samples"
            )
        target = self.splits["train"].samples.target
        distinct_batches(np.arange(len(target)), target, min(self.batch_size, len(target)), np.random.default_rng(self.seed))

    def kinds(self, names: Sequence[str], encoders: Mapping[str, Encoder] | None = None) -> dict[str, Kind]:
        """The inputs of these names, completed by the settings of the data. encoders: the encoders that will read them.

        Raises UserError for a name that has no input, and where an encoder expects another kind.
        """
        defaults: dict[str, Kind] = {"image": ImageInput(self.columns.image), "text": TextInput(self.columns.text)}
        kinds = {}
        for name in names:
            kind = self.inputs.get(name) or defaults.get(name)
            if kind is None:
                raise UserError(
                    f"model has an encoder '{name}', but data.inputs has none of that name. {nearest(name, [*self.inputs, *defaults])}"
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
            kinds[name] = kind
        for name in self.inputs:
            if name not in names and encoders is not None:
                self.issues.note(f"data.inputs has '{name}', which no encoder reads (model.encoders, model.modalities): it is ignored")
        return kinds

    def split_table(self, inputs: Mapping[str, Kind], task: Task) -> Table:
        """All readable samples, each with its split, given or assigned; None for training samples beyond `train_samples`."""
        table = self.table(inputs, task)
        self.check_shared_groups(table)  # checks given splits, before others are assigned
        strata = task.strata(table.labels)
        if self.on_unseen_label == "count_as_wrong":  # classes too rare for val then need not all be in train
            strata = pooled(strata, fewest=math.ceil(1 / min([share for share in (self.val, self.test) if share] or [1])))
        groups = list(table.groups) if any(table.groups) else task.units(table.labels)
        splits = assign_splits(strata, groups, list(table.splits), val=self.val, test=self.test, seed=self.split_seed)
        table.splits = list[str | None](splits)
        if self.train_samples is not None:
            train = [i for i, split in enumerate(table.splits) if split == "train"]
            drawn = draw_stratified([strata[i] for i in train], self.train_samples, self.split_seed)
            for i in set(train) - {train[i] for i in drawn}:
                table.splits[i] = None
        return table

    def table(self, inputs: Mapping[str, Kind], task: Task) -> Table:
        """All readable samples, each with the split that its file or its cell gives it."""
        root = Path(self.root).expanduser() if self.root else None
        if self.preparer is not None:
            self.folder, self.card = prepared(self.preparer, root, self.cache)
        main = str(self.folder / "manifest.csv") if self.folder else str(self.manifest)
        own = {"val": self.val_manifest, "test": self.test_manifest}
        return self.apply_where(read_manifests(main, own, self.columns, inputs, task, format=self.format, issues=self.issues))

    def apply_where(self, table: Table) -> Table:
        """The samples selected by `where`. Raises UserError for an unknown column or value, and for a given split that is left empty."""
        before = {split for split in table.splits if split}
        for name, requested in self.where.items():
            known = table.by_name(self.columns)
            if name not in known:
                raise UserError(f"data.where: the manifest has no column '{name}'. {nearest(name, known)}")
            values = wanted_cells(name, requested)
            present = {cell for cell in known[name] if cell}
            if not present:
                raise UserError(f"data.where: column '{name}' is empty in every row")
            for value in values:
                if value not in present:
                    raise UserError(f"data.where: no row has '{value}' in column '{name}'. {nearest(value, present)}")
            table = table.take([i for i, cell in enumerate(known[name]) if cell in values])
        lost = [split for split in sorted(before - set(table.splits)) if {"val": self.val, "test": self.test}.get(split)]
        if lost:
            raise UserError(
                f"data.where selects no row of the given split {' and '.join(lost)}; to run without it: "
                + " ".join(f"--data.{split}=0" for split in lost)
            )
        return table

    def check(self, table: Table, encoders: Mapping[str, Encoder]) -> Table:
        """The table without samples that have an unusable input; these go to the issues."""
        checking = Checking(self.memory_gib, self.cache, self.processes_per_node > 1, self.leftovers)
        bad: dict[int, str] = {}
        for name, kind in table.kinds.items():
            bad = kind.check(table.inputs[name], encoders[name], checking) | bad
        for i in sorted(bad):
            self.issues.add(table.files[i], table.rows[i], table.ids[i], bad[i])
        if len(bad) == len(table):
            raise UserError(f"none of the samples has inputs that can be used; the first: {self.issues.dropped[0].reason}")
        return table.take([i for i in range(len(table)) if i not in bad]) if bad else table

    def check_shared_groups(self, table: Table) -> dict[str, set[str]]:
        """The groups in more than one split, with their splits. Raises UserError where train shares one, unless `on_shared_group` is
        "report"."""
        shared = groups_across_splits(table.splits, table.groups)
        leaks = {group: splits for group, splits in shared.items() if "train" in splits}
        if leaks and self.on_shared_group == "error":
            group, splits = next(iter(leaks.items()))
            where = "the files" if self.val_manifest or self.test_manifest else f"column '{self.columns.split}'"
            raise UserError(
                f"{len(leaks)} groups are in train and in another split (the first: '{group}' in {', '.join(sorted(splits))}); "
                f"scores on samples of training groups are biased. Fix {where}, or accept it: --data.on_shared_group=report; "
                f"or, if column '{self.columns.group}' is not meant as groups: --data.columns.group=null"
            )
        return shared

    def check_leaks(self, table: Table) -> None:
        """Count groups and identical inputs that several splits share. Raises UserError as `check_shared_groups`."""
        self.shared_groups = len(self.check_shared_groups(table))
        of_split: dict[str, list[Hashable]] = {name: [] for name in SPLITS}
        identities = [map(kind.identity, table.inputs[name]) for name, kind in table.kinds.items()]
        for inputs, split in zip(zip(*identities, strict=True), table.splits, strict=True):
            of_split[str(split)].append(inputs)
        distinct = {name: set(identities) for name, identities in of_split.items()}
        self.shared_inputs = {
            (name, other): sum(inputs in distinct[other] for inputs in of_split[name])
            for name, other in (("val", "train"), ("test", "train"), ("test", "val"))
        }

    # Data loaders

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer, samples = self.trainer, self.splits["train"].samples
        batches = GlobalBatches(
            len(samples),
            self.batch_size,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
            accumulate=trainer.accumulate_grad_batches if trainer else 1,
            together=samples.blocks() if self.shuffle == "images" else None,
            apart=samples.target if self.draws_apart else None,
        )
        batches.admission = self.admission = self.admit(batches)
        if self.resume_at is not None:
            batches.begin_at(*self.resume_at)
            self.resume_at = None
        return make_loader(samples, batches, self.num_workers, pinned=self.on_cuda, look_ahead=batches.accumulate if self.contrasts else 1)

    def admit(self, batches: GlobalBatches) -> Admission | None:
        """The schedule by which the curriculum admits samples; None without a curriculum."""
        if self.curriculum is None or self.trainer is None:
            return None
        split = self.splits["train"]
        epoch, horizon = planned_updates(self.trainer, batches)
        values = self.losses if self.curriculum.by == LOSS else difficulty(self.curriculum, split.table, split.samples)
        return Admission(self.curriculum, values, updates=epoch, horizon=horizon, batch_size=batches.batch_size)

    def first_pass_ends(self, epoch: int) -> bool:
        """Whether a curriculum by loss needs the losses of the training samples after this epoch."""
        c = self.curriculum
        return c is not None and c.by == LOSS and epoch + 1 == c.first_pass

    @property
    def curriculum_column(self) -> str:
        """The manifest column that the curriculum reads, "" if none."""
        c = self.curriculum
        return c.by if c is not None and c.by not in (LOSS, TEXT_LENGTH) else ""

    def set_losses(self, losses: np.ndarray) -> None:
        """Set the loss of each training sample, by which the curriculum admits samples from now on."""
        self.losses = losses
        if self.admission is not None:
            self.admission.set_difficulty(losses)

    def batch_count(self, split: str, world: int, accumulate: int) -> int:
        """Number of batches per device in an epoch (train) or an evaluation, for this number of devices."""
        count = len(self.splits[split].samples)
        if split == "train":
            return len(GlobalBatches(count, self.batch_size, seed=self.seed, world=world, accumulate=accumulate))
        return len(EvaluationBatches(count, max(1, self.eval_batch_size // world), world=world))

    def val_dataloader(self) -> Sequence[DataLoader[Batch]]:
        return [self.evaluation_loader("val")] if "val" in self.splits else []

    def test_dataloader(self) -> Sequence[DataLoader[Batch]]:
        return [self.evaluation_loader("test")] if "test" in self.splits else []

    def evaluation_loader(self, split: str, most: int | None = None) -> DataLoader[Batch]:
        """Every sample of the split once, over all ranks; or only the first `most` of them."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        samples = self.splits[split].samples
        count = len(samples) if most is None else min(len(samples), most)
        batches = EvaluationBatches(count, max(1, self.eval_batch_size // world), rank=rank, world=world)
        return make_loader(samples.unaugmented(), batches, self.num_workers, pinned=self.on_cuda)

    @property
    def on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def teardown(self, stage: str) -> None:
        for path in self.leftovers:
            path.unlink(missing_ok=True)  # memory maps of the file stay valid

    # Checkpoint state: the position in the epoch

    def state_dict(self) -> dict[str, Any]:
        if self.trainer is None:
            return {}
        epoch, batch = self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        finished = batch >= self.trainer.num_training_batches
        # In updates, which do not depend on the accumulation.
        position = (
            {"epoch": epoch + 1, "update": 0} if finished else {"epoch": epoch, "update": batch // self.trainer.accumulate_grad_batches}
        )
        return position | {"losses": None if self.losses is None else torch.from_numpy(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        trainer = self.trainer
        position = (state["epoch"], state["update"] * (trainer.accumulate_grad_batches if trainer else 1))
        batches = training_batches(trainer) if trainer else None
        if batches is None:
            self.resume_at = position
        else:  # a strategy that restores after its setup (FSDP), when the loader already exists
            batches.begin_at(*position)
        if state["losses"] is not None:
            self.set_losses(state["losses"].numpy())


def pooled(strata: Sequence[str], fewest: int) -> list[str]:
    """The strata, with all those of fewer than this many samples as one.

    >>> pooled(["yes", "yes", "aorta", "left"], fewest=2)
    ['yes', 'yes', 'rare', 'rare']
    """
    counts = Counter(strata)
    rare = next(name for name in ("rare", *(f"rare_{i}" for i in range(len(counts) + 1))) if name not in counts)
    return [one if counts[one] >= fewest else rare for one in strata]


def wanted_cells(column: str, requested: Any) -> list[str]:
    """The cells that `where` requests in a column, as the table spells them. Raises UserError for booleans (YAML loses their spelling)."""
    values = requested if isinstance(requested, list) else [requested]
    if not values:
        raise UserError(f"data.where.{column} is an empty list, which matches no row; give values, or leave it out")
    if any(isinstance(value, bool) for value in values):
        raise UserError(f'data.where.{column}: yes, no, true and false are booleans in YAML; to match text, quote them: ["yes", "no"]')
    return [str(cell_text(value)) for value in values]


def make_loader(samples: Samples, batches: Any, num_workers: int | None, *, pinned: bool, look_ahead: int = 1) -> DataLoader[Batch]:
    """A loader of whole batches. pinned: in page-locked memory, for asynchronous copies to a GPU. num_workers: None means no workers for
    inputs in memory, else one for each core that the process may use, up to eight. look_ahead: number of batches that the first of them
    is given together with.
    """
    in_memory = all(store.in_memory and not store.random for store in samples.stores.values())
    workers = num_workers if num_workers is not None else 0 if in_memory else min(8, cores())
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pinned}
    if look_ahead == 1:
        return DataLoader(samples, batch_sampler=batches, collate_fn=as_is, **options)
    updates = Updates(samples, batch_sampler=batches, collate_fn=as_is, **options)
    updates.accumulate = look_ahead
    return updates
