"""Distillation: the model also learns the outputs and the features of a trained one, or of an ensemble."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusion.data.module import FusionData
from fusion.data.samples import Batch
from fusion.errors import UserError
from fusion.heads import FusionOutput
from fusion.losses import feature_loss
from fusion.model import FusionModel
from fusion.predictor import Predictor, model_of
from fusion.tasks import MultiTask, Task
from fusion.training.distributed.collectives import summed
from fusion.training.means import OnDevice, sum_dtype
from fusion.training.modality_dropout import presence
from fusion.training.teacher_checks import check_teacher, trained_on
from fusion.training.teacher_outputs import OUTPUTS, digest_of_model, teacher_outputs

TEMPERATURE = 2.0
FUSED = "fused"


@dataclass
class Teacher:
    """Trains the model, the student, to predict what a trained one does, the teacher.

        loss = (1 - weight) l(output, y) + weight l_T(output, teacher's output) + sum_f features_f |W_f h_f - z_f|^2 / (2 D_f)

    l is the task's loss and l_T its loss by soft targets (Hinton et al., 2015, "Distilling the Knowledge in a Neural Network"): for classes
    and labels a divergence of probabilities softened by the temperature T, for numbers half the squared difference. Features (Romero et
    al., 2015, "FitNets: Hints for Thin Deep Nets") are the student's pooled features h, mapped linearly to those of the teacher, z,
    standardised over the training samples; a sample for which either lacks the input is left out. The maps W are trained with the model,
    are in checkpoints, and are no part of the run's model.

    The teacher is asked once, before training: its outputs for all training samples are computed from the manifest's cells by its own
    tokenizer and image size, cached under data.cache by content, and read by the sample's number. So it costs one pass, not one an epoch,
    takes no memory of the device, and is the same for any precision, ranks, accumulation and resuming. It sees each sample as it is in the
    manifest: with all its inputs, whatever model.modality_dropout removes for the student; without augmentation (the "fixed teacher" of
    Beyer et al., 2022, "Knowledge distillation: A good teacher is patient and consistent", who found one that sees the same augmented
    image better); and not mixed (with model.mixing the losses by the targets of both samples are averaged, as those by labels are).

    Args:
        runs: the teacher: a run folder (its best checkpoint), a model folder or a checkpoint file; a list of them is an ensemble, whose
            probabilities (or numbers) are averaged. Each of the same task as the student, and of all its classes, by name.
        temperature: T, above 0; for classes and labels, 2 at the default.
        weight: share of the teacher in the loss of the outputs, from 0 (which needs `features`) to 1 (labels are not used).
        features: weight of the loss of features by input, and under `fused` of those that the head's last layer reads, above 0:
            {text: 0.5, fused: 1}; of a single teacher. None: no features.
    """

    runs: str | list[str] | None = None
    temperature: float | None = None
    weight: float = 0.5
    features: dict[str, float] | None = None

    @property
    def paths(self) -> list[str]:
        return [self.runs] if isinstance(self.runs, str) else list(self.runs or ())

    def check(self, task: Task) -> None:
        """Raises UserError for values out of range, and for a task that can't be distilled."""
        if not task.distillable:
            one = "; distil each of its tasks by itself" if isinstance(task, MultiTask) else ""
            raise UserError(f"model.teacher: model.task={type(task).__name__} has no loss by a teacher{one}; leave out model.teacher")
        if not self.paths or not all(self.paths):
            raise UserError("model.teacher: runs is empty; expected --model.teacher.runs=RUN, the folder of a finished run, or several")
        if len(set(self.paths)) < len(self.paths):
            raise UserError(f"model.teacher: runs has a run more than once: {', '.join(self.paths)}")
        if self.temperature is not None and not task.softened:
            raise UserError(f"model.teacher: temperature is for classes and labels, not for {type(task).__name__}; leave it out")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UserError(f"model.teacher: temperature is {self.temperature}; expected a number above 0")
        if not 0 <= self.weight <= 1:
            raise UserError(f"model.teacher: weight is {self.weight}; expected a share, from 0 to 1")
        for name, weight in (self.features or {}).items():
            if not 0 < weight < math.inf:
                raise UserError(f"model.teacher: features.{name} is {weight}; expected a number above 0")
        if not self.weight and not self.features:
            raise UserError("model.teacher: weight is 0 and there are no features: nothing is learned from it; leave out model.teacher")
        if self.features and len(self.paths) > 1:
            raise UserError(f"model.teacher: features are those of one teacher, but runs has {len(self.paths)}; leave out one of the two")

    def __str__(self) -> str:
        heat = f", temperature {self.temperature:g}" if self.temperature is not None else ""
        hints = "".join(f", features of {name} {weight:g}" for name, weight in (self.features or {}).items())
        return f"{' and '.join(self.paths)}: weight {self.weight:g}{heat}{hints}"


class Distillation(nn.Module):
    """The losses by a teacher, and the linear maps of the student's features to the teacher's.

    sums: of the loss's terms over the whole run, weighted, on this rank; those of a resumed run's checkpoint are on rank 0.
    """

    def __init__(self, settings: Teacher, task: Task) -> None:
        super().__init__()
        settings.check(task)
        self.settings, self.weights = settings, dict(settings.features or {})
        self.temperature = TEMPERATURE if settings.temperature is None else settings.temperature
        self.softened = task.softened
        self.maps = nn.ModuleDict()
        self.digests: list[str] = []
        self.sums: dict[str, Tensor | float] = dict.fromkeys(("labels", OUTPUTS, *self.weights), 0)
        self.figures: dict[str, Tensor] = {}  # of the last batch

    # Before training

    def begin(self, model: FusionModel, task: Task, data: FusionData) -> None:
        """Ask the teacher for every training sample, and give its answers to the samples. Done once.

        Raises UserError for a teacher that is missing, of another task or other classes, or reads inputs that the student doesn't.
        """
        if self.digests:
            return
        widths = self.student_widths(model)
        split = data.splits["train"]
        soft: list[Tensor] = []
        features: dict[str, Tensor] = {}
        for run in self.settings.paths:
            path = self.find(run, data)
            with torch.random.fork_rng(devices=[]):  # so that the student starts from the same weights and draws as without a teacher
                predictor = Predictor.from_file(path)
            check_teacher(run, predictor, task, data)
            self.digests.append(digest_of_model(path))
            features = teacher_outputs(predictor, self.digests[-1], split, list(self.weights), data.cache)
            columns = [predictor.processor.task.names.index(name) for name in task.names]
            soft.append(task.soft_target(features.pop(OUTPUTS)[:, columns], self.temperature))
        given = {OUTPUTS: torch.stack(soft).mean(dim=0)} | {name: standardised(rows) for name, rows in features.items()}
        split.samples.teacher = {name: rows.numpy() for name, rows in given.items()}
        self.maps.update({name: nn.Linear(width, given[name].shape[1]) for name, width in widths.items()})

    def student_widths(self, model: FusionModel) -> dict[str, int]:
        """The widths of the student's features that are compared. Raises UserError where there are none, or they are frozen."""
        try:
            widths = model.report_features(list(self.weights))
        except UserError as error:
            raise UserError(f"model.teacher.features: {error}") from error
        for name in model.reported:
            if not any(p.requires_grad for p in model.encoders[name].parameters()):
                raise UserError(f"model.teacher.features: the encoder of '{name}' is frozen, so its features don't change; leave it out")
        return widths

    def find(self, run: str, data: FusionData) -> Path:
        """The path of a run's model. Raises UserError where there is none; notes what is to be known of it."""
        try:
            path, note = model_of(run, "best")
        except UserError as error:
            raise UserError(f"model.teacher.runs: {error}") from error
        if note:
            data.issues.note(f"model.teacher: {note}")
        seen = trained_on(Path(run).expanduser(), data.record)
        if seen:
            data.issues.note(
                f"{seen:,} samples of val and test were training samples of the teacher {run}: scores on them may be too high; give both "
                "runs the same splits"
            )
        return path

    # Training

    def total(self, loss: Tensor, task: Task, output: FusionOutput, batch: Batch, retained: Mapping[str, Tensor] | None) -> Tensor:
        """The training loss (mean over the batch), from the mean `loss` by the labels. retained: the inputs that the samples retain, None
        for all that they have."""
        assert batch.teacher is not None
        share = self.settings.weight
        each = partial(task.distillation_loss, temperature=self.temperature)
        soft = task.of_mixture(each, output.output, batch.teacher[OUTPUTS], batch.mixture).mean()
        terms = {"labels": (1 - share) * loss, OUTPUTS: share * soft}
        self.figures = {"teacher_loss": soft.detach()}
        present = retained or presence(batch.inputs)
        for name, weight in self.weights.items():
            assert output.features is not None
            mapped, target = self.maps[name](output.features[name]), batch.teacher[name]
            losses = self.feature_losses(mapped, target)
            if batch.mixture is not None:
                partner, own = batch.mixture
                losses = own * losses + (1 - own) * self.feature_losses(mapped, target.index_select(0, partner))
            mean = (losses if name == FUSED else torch.where(present[name], losses, 0.0)).mean()
            terms[name] = weight * mean
            self.figures[f"teacher_{name}"] = mean.detach()
        for name, term in terms.items():
            value = term.detach().to(sum_dtype(term.device)).abs()
            self.sums[name] = self.sums[name] + torch.where(value.isfinite(), value, 0.0) * len(batch.target)
        return torch.stack([term.float() for term in terms.values()]).sum()

    def feature_losses(self, mapped: Tensor, target: Tensor) -> Tensor:
        """(B,), 0 for samples without the teacher's features (NaN)."""
        known = ~target.isnan().any(dim=1)
        return torch.where(known, feature_loss(mapped, target.nan_to_num(0.0)), 0.0)

    @property
    def figure_names(self) -> tuple[str, ...]:
        return ("teacher_loss", *(f"teacher_{name}" for name in self.weights))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Of the optimiser: the maps, at its own rate, without weight decay."""
        return [{"params": list(self.maps.parameters()), "hidden": False, "rate": 1.0, "weight_decay": 0.0}] if self.maps else []

    # Report and checkpoint state

    def totals(self, engine: OnDevice) -> dict[str, float]:
        """The sums over all ranks. A collective: all ranks call it."""
        own = [torch.as_tensor(value, dtype=sum_dtype(engine.device), device=engine.device) for value in self.sums.values()]
        return dict(zip(self.sums, summed(torch.stack(own), engine.trainer.world_size).tolist(), strict=True))

    def state(self, engine: OnDevice) -> dict[str, Any]:
        """Of a checkpoint. A collective."""
        return {"digests": list(self.digests), "sums": self.totals(engine)}

    def load(self, state: Mapping[str, Any], rank: int) -> None:
        """Continue from the state of a checkpoint. Raises UserError for another teacher."""
        if self.digests and state["digests"] != self.digests:
            raise UserError("model.teacher: the teacher is not the one that the run began with; restore it, or start a new run")
        self.sums = dict(state["sums"]) if rank == 0 else dict.fromkeys(state["sums"], 0)

    def report(self, engine: OnDevice) -> dict[str, Any]:
        """The report of a run. A collective."""
        temperature = {"temperature": self.temperature} if self.softened else {}
        return {"runs": self.settings.paths, "weight": self.settings.weight, **temperature, "shares": shares(self.totals(engine))}


def shares(totals: Mapping[str, float]) -> dict[str, float]:
    """The share of each term in the loss, over a run. Rounded, so that it doesn't depend on the order of summation.

    >>> shares({"labels": 30.0, "outputs": 10.0})
    {'labels': 0.75, 'outputs': 0.25}
    """
    total = sum(totals.values()) or 1.0
    return {name: round(value / total, 6) for name, value in totals.items()}


def report_line(found: Mapping[str, Any]) -> str:
    """
    >>> report_line({"runs": ["runs/a"], "shares": {"labels": 0.75, "outputs": 0.2, "text": 0.05}})
    'teacher     runs/a: outputs 20.0%, features of text 5.0% of the loss'
    """
    shown = {name if name == OUTPUTS else f"features of {name}": share for name, share in found["shares"].items() if name != "labels"}
    terms = [f"{name} {share:.1%}" for name, share in shown.items()]
    return f"teacher     {' and '.join(found['runs'])}: {', '.join(terms)} of the loss"


def standardised(features: Tensor) -> Tensor:
    """Features (n, D) with mean 0 and deviation 1 over the samples that have them (not NaN); 0 where they are all equal.

    >>> standardised(torch.tensor([[1.0, 5.0], [3.0, 5.0], [torch.nan, torch.nan]])).tolist()
    [[-1.0, 0.0], [1.0, 0.0], [nan, nan]]
    """
    known = features[~features.isnan().any(dim=1)].double()
    if not len(known):
        return features
    deviation = known.std(dim=0, correction=0)
    return ((features.double() - known.mean(dim=0)) / torch.where(deviation > 1e-6 * known.abs().amax(dim=0), deviation, math.inf)).float()
