"""The LightningModule of every run: trains any task on any data, with mixed precision, several ranks, accumulation and resuming."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanMetric

from fusion.data.module import FusionData
from fusion.data.processor import Processor
from fusion.data.samples import Batch
from fusion.encoders import Encoder
from fusion.encoders.adapters import add_adapters
from fusion.errors import UserError, construction, nearest
from fusion.heads import CrossAttention, FusionHead, FusionOutput, PerTask, Unimodal
from fusion.inputs import Mixture
from fusion.lightning_private import batches_that_stepped
from fusion.model import FusionModel, check_part, factory_parts, head_spec, part_of, predicts_alone, with_unimodal
from fusion.pruning.widths import narrow
from fusion.runs.bundle import FORMAT, PRUNED
from fusion.tasks import Classification, MultiTask, Task
from fusion.training.balance import Balance, Predictions
from fusion.training.contrast import Contrast
from fusion.training.counted_updates import CountedUpdates
from fusion.training.distillation import Distillation, Teacher
from fusion.training.distributed.collectives import summed
from fusion.training.distributed.ddp import DDP
from fusion.training.distributed.fsdp import FSDP, shard
from fusion.training.means import Means
from fusion.training.mixing import FIGURES, Mixer, Mixing
from fusion.training.modality_dropout import drop_modalities, presence
from fusion.training.optim.freezing import Freeze, Freezing, rewrap_ddp
from fusion.training.optim.groups import Rate, check_rates
from fusion.training.optim.muon import Muon
from fusion.training.optim.precision import reject_trained_float16
from fusion.training.optim.schedules import Constant, Schedule
from fusion.training.task_gradients import TaskGradients, last_layers
from fusion.training.zeros import KeptZeros

ADAMW = partial(AdamW, lr=1e-3, weight_decay=0.01)


class Engine(CountedUpdates):
    """A FusionModel with its task, optimiser and schedule.

    Every mean loss is computed from the losses of single samples, in one place (`loss`), so that accumulated batches and ranks give exactly
    the update of one global batch.

    Args:
        image: makes the image encoder.
        text: makes the text encoder.
        encoders: make the encoders of further inputs, by their names in data.inputs, in addition to or instead of image and text.
        task: the task to train and how it is scored; Classification if none.
        head: makes the fusion head; it is called with the encoders' widths and the number of outputs once these are known.
        modalities: inputs to use, in the head's order; all that have an encoder if none. With a single one the head is Unimodal.
        optimizer: makes the optimiser; biases, norms, gates, embeddings and positions get no weight decay.
        schedule: learning rate over the updates; constant if none.
        rates: by part (image, text, head), its learning rate relative to the optimiser's.
        freeze: by part, or by a pattern of parameter names, what is not trained, and until which update: {image: {until_update: 500}}.
        adapters: by modality, a peft configuration: the encoder is frozen, and small low-rank matrices in it are trained.
        checkpoint_activations: parts whose activations are recomputed in the backward pass instead of being stored.
        compile: compile the whole model by torch.compile.
        balance: balances how fast the modalities learn: OGMGE, MMPareto, GradientBlending or UnimodalLosses; or trains
            the confidences of late heads: QMF, PDF.
        modality_dropout: probability of removing each modality of a training sample, keeping at least one.
        pruned: numbers of units that pruning left, by the name of the layer that makes them (fusion shrink writes them); the model is
            built with these. None: all.
        keep_zeros: whether weights of linear layers and convolutions that are zero when training starts stay zero, as in a run that starts
            from a sparse model.
        mixing: mixup and CutMix of training samples, all inputs and the target together; none at the default.
        teacher: a trained run, or an ensemble of several, whose outputs and features are learned too; none at the default.
        allow_unused: continue with a warning where parameters get no gradient at the first update.
    """

    def __init__(
        self,
        image: Callable[[], Encoder] | None = None,
        text: Callable[[], Encoder] | None = None,
        encoders: dict[str, Callable[[], Encoder]] | None = None,
        task: Task | None = None,
        head: Callable[[dict[str, int], int], FusionHead] = CrossAttention,
        modalities: Sequence[str] | None = None,
        optimizer: OptimizerCallable = ADAMW,
        schedule: Schedule | None = None,
        rates: dict[str, Rate] | None = None,
        freeze: dict[str, Freeze] | None = None,
        adapters: dict[str, dict[str, Any]] | None = None,
        checkpoint_activations: Sequence[str] = (),
        compile: bool = False,
        balance: Balance | None = None,
        modality_dropout: float = 0.0,
        mixing: Mixing | None = None,
        teacher: Teacher | None = None,
        pruned: dict[str, int] | None = None,
        keep_zeros: bool = False,
        allow_unused: bool = False,
    ) -> None:
        super().__init__()
        factories: dict[str, Callable[[], Encoder] | None] = {"image": image, "text": text}
        for name in encoders or {}:
            if factories.get(name) is not None:
                raise UserError(f"model.{name} and model.encoders.{name} both name an encoder of '{name}'; leave out one of them")
            if name in ("head", "self", "batch_size"):
                raise UserError(f"model.encoders: no input can be called '{name}', which is a reserved name; choose another one")
        factories |= encoders or {}
        if modalities is None:
            modalities = [name for name, make in factories.items() if make is not None] if encoders else ["image", "text"]
        for name in modalities:
            if name not in factories:
                raise UserError(f"model.modalities: unknown modality '{name}'. {nearest(name, factories)}")
            if factories[name] is None:
                raise UserError(f"model.modalities has '{name}', but model.{name} names no encoder")
        if not modalities or len(set(modalities)) < len(modalities):
            raise UserError(f"model.modalities is {list(modalities)}; expected some of {', '.join(factories)}, each once")
        self.task = task or Classification()
        self.modalities = list(modalities)
        self.factories: dict[str, Callable[[], Encoder]] = {name: factories[name] for name in modalities}  # type: ignore[misc]
        head_factory: Any = head if len(modalities) > 1 else Unimodal
        self.make_optimizer, self.schedule = optimizer, schedule or Constant()
        self.rates: Mapping[str, Rate] = rates or {}
        check_rates(self.rates, self.modalities)
        self.freezing = Freezing(freeze or {}, self.modalities)
        self.adapters = adapters or {}
        for part in checkpoint_activations:
            check_part("model.checkpoint_activations", part, self.modalities)
        self.checkpointed, self.compiled = list(checkpoint_activations), compile
        if not 0 <= modality_dropout < 1:
            raise UserError(f"model.modality_dropout is {modality_dropout}; expected a probability, from 0 to below 1")
        self.modality_dropout, self.allow_unused = modality_dropout, allow_unused
        self.mixer = None if mixing is None else Mixer(mixing, self.task)
        self.distillation = None if teacher is None else Distillation(teacher, self.task)
        self.pruned = pruned or {}
        self.zeros = None
        if keep_zeros:
            if self.adapters:
                raise UserError("model.keep_zeros and model.adapters: adapters begin at zero, which would stay; leave out one of them")
            self.zeros = KeptZeros()
        self.means = Means()
        self.contrast = Contrast()
        gradnorm = isinstance(self.task, MultiTask) and self.task.weighting == "gradnorm"
        self.task_gradients = TaskGradients() if gradnorm else None
        self.balance = balance
        if balance is not None:
            if len(self.modalities) < 2:
                raise UserError("model.balance: there is only one modality, so there is nothing to balance; leave it out")
            head_factory = with_unimodal(head_factory)
        self.head_factory: Callable[..., FusionHead] = head_factory
        self.horizon_before: int | None = None  # the horizon in a resumed run's checkpoint
        self.model: FusionModel | None = None

    # Construction, once the data is known

    def build(self, data: FusionData) -> FusionModel:
        """Make the encoders, load the data for them, then make the head with the number of outputs that the data needs. Done once."""
        if self.model is None:
            with construction():
                encoders = {name: make() for name, make in self.factories.items()}
            data.load(encoders, self.task)
            self.specs: dict[str, dict[str, Any]] = {
                name: {"class": type_path(encoder), "init": encoder.spec()} for name, encoder in encoders.items()
            }
            self.processor: Processor = data.processor
            head = self.head_factory if not isinstance(self.task, MultiTask) else per_task(self.head_factory, self.task)
            model = FusionModel.build(encoders, head, self.task.out_dim)
            self.task.check_head(model.head)
            if self.balance is not None and not predicts_alone(model.head):
                raise UserError(
                    f"model.balance needs a prediction of each modality alone, which this {type(model.head).__name__} doesn't make: "
                    "pass unimodal=True in the function that makes the head, or leave model.balance out"
                )
            if self.mixer is not None:
                self.mixer.check_encoders(model)
            self.head_spec = head_spec(model)
            self.model = model
            narrow(model, self.pruned)
            add_adapters(self.model.encoders, self.adapters)
            self.model.head.detached = self.balance is not None and self.balance.detached
            self.model.checkpoint_activations(self.checkpointed)
            self.freezing.check(self.model)
            self.freezing.apply(self.model, 0)
            trained = [*last_layers(self.model), *(name for name in self.freezing.later(self.model) if part_of(name) != "head")]
            if self.task_gradients is not None and not trained:
                raise UserError("task: weighting=gradnorm compares gradients of the encoders, which are all frozen; use another weighting")
            reject_trained_float16(self.model, self.freezing.later(self.model))
            if self.compiled:
                # A graph for each combination of training or evaluation, padding or none, all images or some, and lengths.
                torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
                self.model.compile()
            scored = [name for name in data.splits if name != "train"]
            self.metrics = nn.ModuleDict({name: self.task.metrics() for name in scored})
            self.mean_loss = nn.ModuleDict({name: MeanMetric() for name in scored})
        return self.model

    def setup(self, stage: str) -> None:
        data: FusionData = self.trainer.datamodule  # type: ignore[attr-defined]
        self.build(data)
        if stage == "fit":
            self.ask_teacher(data)

    def ask_teacher(self, data: FusionData) -> None:
        """Compute what the teacher, if there is one, gives for the training samples. Done once."""
        if self.distillation is not None:
            assert self.model is not None
            self.distillation.begin(self.model, self.task, data)

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDP) and not isinstance(self.model, FSDPModule):
            assert self.model is not None
            if self.zeros is not None:
                raise UserError("model.keep_zeros needs whole weights, but FSDP shards them; use engine/ddp")
            if self.task_gradients is not None:
                raise UserError(
                    "task: weighting=gradnorm needs whole gradients, but FSDP shards them; use another weighting, or engine/ddp"
                )
            if factory_parts(self.make_optimizer, Optimizer)[0] is Muon:
                raise UserError("Muon needs whole matrices, but FSDP shards them over the devices; use --model.optimizer=torch.optim.AdamW")
            dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            if self.distillation is not None and self.distillation.maps:
                raise UserError("model.teacher.features: their maps are not sharded by FSDP; leave them out, or use engine/ddp")
            shard(self.model, strategy.device_mesh["data_parallel"], dtype)

    def further_groups(self) -> list[dict[str, Any]]:
        return [] if self.distillation is None else self.distillation.parameter_groups()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self.model is not None
        if self.freezing.apply(self.model, self.updates):
            rewrap_ddp(self.trainer)

    def on_train_start(self) -> None:
        if self.zeros is not None:
            assert self.model is not None
            self.zeros.begin(self.model)
        if self.balance is not None:
            self.balance.begin(self)

    # Training

    def forward(self, inputs: dict[str, Any]) -> Tensor:  # (B, out_dim)
        assert self.model is not None
        return self.model(inputs).output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.mixer is not None:
            batch = self.mixer.mix(batch)
        if self.task.contrasts:
            output, loss = self.contrast.step(self, batch, batch_idx)
        else:
            output, loss = self.output_and_loss(batch)
        plain = partial(self.task.batch_figures, output.detach())
        figures = plain(batch.target) if self.mixer is None else self.mixer.figures(plain, batch)
        if self.distillation is not None:
            figures |= self.distillation.figures
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        self.means.note({"loss": loss, **figures}, len(batch.target), begins_update=first)
        return loss

    def output_and_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The output (B, ...) for a training batch, and the loss to minimise."""
        output, retained = self.forward_with_dropout(batch.inputs)
        if self.task_gradients is not None:
            losses = self.task.update_losses(output.output, batch.target, batch.update_target, batch.mixture)  # type: ignore[operator]
            self.task_gradients.observe(self, losses)
            loss = self.task.weighted(losses, output.output).mean()  # type: ignore[operator]
        else:
            loss = self.loss(output.output, batch.target, batch.update_target, batch.mixture)
        if self.distillation is not None:
            loss = self.distillation.total(loss, self.task, output, batch, retained)
        if self.balance is not None:
            present = retained or presence(batch.inputs)
            each = self.unimodal_losses(output.by_modality, batch, present)
            alone = {name: losses.mean() for name, losses in each.items()}
            confidence = partial(self.task.of_mixture, self.task.confidence, target=batch.target, mixture=batch.mixture)
            scores = {name: confidence(one.detach()) for name, one in output.by_modality.items()}
            self.balance.observe(self, alone, {name: score[present[name]] for name, score in scores.items()})
            loss = self.balance.total(loss, alone)
            loss = loss + self.balance.regularisation(
                Predictions(batch.sample, output.by_modality, each, scores, present, output.confidence)
            )
        if output.auxiliary is not None:
            loss = loss + output.auxiliary.mean()
        return output.output, loss

    def forward_with_dropout(self, inputs: dict[str, Any]) -> tuple[FusionOutput, dict[str, Tensor] | None]:
        """The model's output for a training batch; and by modality (B,) bool, which samples retain it, None without modality dropout."""
        assert self.model is not None
        retained = drop_modalities(inputs, self.modality_dropout) if self.modality_dropout else None
        return self.model(inputs, retained), retained

    def loss(self, output: Tensor, target: Tensor, update_target: Tensor | None = None, mixture: Mixture | None = None) -> Tensor:
        """Mean of the samples' losses, of which the mean over ranks and accumulated batches is that of the whole update."""
        return self.task.update_loss(output, target, update_target, mixture).mean()

    def unimodal_losses(self, by_modality: dict[str, Tensor], batch: Batch, present: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each modality's own loss (B,), 0 for samples without it, so that the mean over ranks and accumulated batches is the loss of the
        whole update.
        """
        targets = batch.target, batch.update_target, batch.mixture
        each = {name: self.task.update_loss(output, *targets) for name, output in by_modality.items()}
        return {name: torch.where(present[name], loss, 0.0) for name, loss in each.items()}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.task_gradients is not None:
            self.log_dict({f"weights/{name}": value for name, value in self.task_gradients.update(self).items()})
        if self.balance is not None:
            self.log_dict({f"balance/{name}": value for name, value in self.balance.modulate(self).items()})

    def on_train_epoch_end(self) -> None:
        means = {f"train/{name}_epoch": mean for name, mean in self.means.of_epoch(self).items()}
        self.log_dict(means, logger=False)
        # Logged directly: Lightning would log them only after saving the epoch's checkpoint, which records what was logged before it.
        for logger in self.loggers:
            logger.log_metrics(means | {"epoch": self.current_epoch}, step=batches_that_stepped(self.trainer) - 1)
        self.means.clear()
        self.task.end_epoch({name.removeprefix("train/").removesuffix("_epoch"): mean for name, mean in means.items()})
        if self.balance is not None:
            self.balance.end_epoch(self)
        data: FusionData = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.first_pass_ends(self.trainer.current_epoch):
            data.set_losses(self.sample_losses("train")["fused"].double().cpu().numpy())

    # Evaluation

    def metric_names(self) -> list[str]:
        """Names of the metrics logged in training and validation, without those of the balancing method and the strategy."""
        further: tuple[str, ...] = FIGURES if self.mixer is not None else ()
        further += self.distillation.figure_names if self.distillation is not None else ()
        training = [f"train/{name}_{over}" for name in ("loss", *self.task.figure_names, *further) for over in ("step", "epoch")]
        return ["train/lr", *training, *(f"val/{name}" for name in (*self.task.metric_names(), "loss"))]

    @torch.no_grad()
    def sample_losses(self, split: str, most: int | None = None) -> dict[str, Tensor]:
        """(n,) the loss of each sample of a split (the first `most` of them), under "fused" and, where the head predicts by modality, under
        each modality; in evaluation mode, without augmentation, the same on all ranks. NaN for samples without a loss.
        """
        assert self.model is not None
        data: FusionData = self.trainer.datamodule  # type: ignore[attr-defined]
        count = len(data.splits[split].samples)
        count = count if most is None else min(count, most)
        training = self.training
        self.eval()
        # Each rank fills in the samples of its own batches: row 0 has the losses, row 1 is 1 where there is a loss.
        partial: dict[str, Tensor] = {}
        for batch in data.evaluation_loader(split, most):
            moved = self.trainer.strategy.batch_to_device(batch, self.device)
            with self.trainer.precision_plugin.forward_context():
                output = self.model(moved.inputs)
            present = presence(moved.inputs)
            for name, one in {"fused": output.output, **output.by_modality}.items():
                losses = self.task.plain_loss(one.float(), moved.target)
                scored = (moved.sample >= 0) & losses.isfinite() & present.get(name, torch.ones_like(moved.sample, dtype=torch.bool))
                rows = partial.setdefault(name, torch.zeros(2, count, device=self.device))
                rows[0, moved.sample[scored]] = losses[scored]
                rows[1, moved.sample[scored]] = 1
        self.train(training)
        complete = {name: summed(rows, self.trainer.world_size) for name, rows in partial.items()}
        return {name: torch.where(has_loss > 0, loss, torch.nan) for name, (loss, has_loss) in complete.items()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.score("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.score("test", batch)

    def score(self, split: str, batch: Batch) -> None:
        counted = batch.sample >= 0
        output, target = self(batch.inputs)[counted], batch.target[counted]
        if not len(target):
            return
        self.task.update(self.metrics[split], self.task.values(output), target)  # type: ignore[arg-type]
        losses = self.task.plain_loss(output.float(), target)
        known = ~losses.isnan()
        if bool(known.any()):
            self.mean_loss[split].update(losses[known])  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        self.log_scores("val")

    def on_test_epoch_end(self) -> None:
        self.log_scores("test")

    def log_scores(self, split: str) -> None:
        if split == "val":
            self.task.tune(self.metrics[split])  # type: ignore[arg-type]
        mean_loss: Any = self.mean_loss[split]
        scores = ({} if self.task.scores_loss else {"loss": mean_loss.compute()}) | self.task.scores(self.metrics[split])  # type: ignore[arg-type]
        # Not synchronised again: the metrics are already reduced over the ranks.
        self.log_dict({f"{split}/{name}": value for name, value in scores.items()}, rank_zero_only=False, sync_dist=False)
        self.metrics[split].reset()  # type: ignore[operator]
        mean_loss.reset()

    # Checkpoint state besides Lightning's own: all that prediction needs, as plain data

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fusion"] = {
            "format": FORMAT,
            "encoders": self.specs,
            "head": self.head_spec,
            "adapters": self.adapters,
            PRUNED: self.pruned,
            "zeros": {} if self.zeros is None else self.zeros.state(),
            "processor": self.processor.state(),
            "samples": self.trainer.datamodule.record.digest(),  # type: ignore[attr-defined]
            "horizon": self.horizon,
            "accumulated": self.trainer.accumulate_grad_batches,
            "balance": self.balance.state_dict() if self.balance is not None else {},
            "compression": self.compression_state(),
            "mixing": self.mixer.totals(self) if self.mixer is not None else {},
            "teacher": self.distillation.state(self) if self.distillation is not None else {},
            "epoch_sums": self.means.epoch_sums(self),
            "updates": self.updates,
            "skipped": self.skipped,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        reject_other_format(checkpoint)
        self.updates = self.scheduled = checkpoint["fusion"]["updates"]
        self.skipped = checkpoint["fusion"]["skipped"]
        self.task.set_tuned(checkpoint["fusion"]["processor"]["task"]["learnt"])
        self.horizon_before = checkpoint["fusion"]["horizon"]
        if checkpoint["loops"] and checkpoint["fusion"]["accumulated"] != self.trainer.accumulate_grad_batches:
            self.adjust_batch_progress(checkpoint)
        sums = checkpoint["fusion"]["epoch_sums"]
        self.means.sums = sums if self.trainer.global_rank == 0 else dict.fromkeys(sums, 0)
        if self.zeros is not None:
            self.zeros.load(checkpoint["fusion"]["zeros"])
        if self.balance is not None:
            self.balance.load_state_dict(checkpoint["fusion"]["balance"])
        if self.mixer is not None:
            self.mixer.load(checkpoint["fusion"]["mixing"], self.trainer.global_rank)
        if self.distillation is not None:
            self.distillation.load(checkpoint["fusion"]["teacher"], self.trainer.global_rank)
        if isinstance(self.trainer.strategy, DDP):
            self.trainer.strategy.load_compression_state(checkpoint["fusion"]["compression"])

    def adjust_batch_progress(self, checkpoint: dict[str, Any]) -> None:
        """Convert Lightning's count of the epoch's batches where an update now has another number of accumulated batches."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        updates = progress["processed"] // checkpoint["fusion"]["accumulated"]
        more = updates * self.trainer.accumulate_grad_batches - progress["processed"]
        for name in progress:  # not set to one value: the last batch may be processed but not yet completed
            progress[name] += more

    def compression_state(self) -> dict[str, Any]:
        strategy = self.trainer.strategy
        return strategy.compression_state() if isinstance(strategy, DDP) else {}


def reject_other_format(checkpoint: Mapping[str, Any]) -> None:
    """Raises UserError for a checkpoint to resume from that was written by another version."""
    actual = checkpoint.get("fusion", {}).get("format")
    if actual != FORMAT:
        raise UserError(f"the checkpoint has format {actual}, this version of fusion reads {FORMAT}; --init_from takes its weights")


def per_task(factory: Callable[..., FusionHead], task: MultiTask) -> Callable[..., FusionHead]:
    """Makes a head for each task: its own, or of the class and arguments of `factory`."""
    try:
        cls, options = factory_parts(factory, FusionHead)
    except TypeError as error:
        raise UserError(
            "with several tasks, model.head is a class, of which a head is made for each task; a function can't be saved"
        ) from error
    heads = [
        {"head": part.head, "args": part.head_args or {}, "out_dim": part.task.out_dim}
        if part.head is not None
        else {"head": f"{cls.__module__}.{cls.__qualname__}", "args": options, "out_dim": part.task.out_dim}
        for part in task.parts
    ]
    return partial(PerTask, heads=heads, log_variances=task.weighting == "uncertainty")


def type_path(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
