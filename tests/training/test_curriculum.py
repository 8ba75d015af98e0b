"""The curriculum in training: by text length, by a column, by the losses of a first pass; resumed, and on two ranks."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from slow_cases import slow_except
from tiny_world import ROUNDING, assert_same_end, furthest_weights
from torch.nn.functional import cross_entropy

from fusion.errors import UserError


def by(what, **options):
    return ["--data.curriculum.by=" + what, *(f"--data.curriculum.{key}={value}" for key, value in options.items())]


class Seen(Callback):
    """The rows of each training batch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rows.append(batch.sample.tolist())


def test_short_texts_come_first(parts):
    seen = Seen()
    model, data, trainer = parts(*by("text_length", start=0.3, full_at=1.0), "--trainer.max_epochs=2", callbacks=[seen])
    trainer.fit(model, datamodule=data)
    lengths = np.diff(data.splits["train"].samples.stores["text"].tokens.offsets)
    bound = np.sort(lengths)[int(np.ceil(0.3 * len(lengths))) - 1]
    assert lengths[seen.rows[0]].max() <= bound < lengths.max()
    assert lengths[[row for rows in seen.rows[-4:] for row in rows]].max() > bound


def test_a_column_of_the_manifest_says_what_is_difficult(parts, write_manifest):
    seen = Seen()
    manifest = write_manifest(lambda i, row: row | {"age": str(1000 - i)})
    model, data, trainer = parts(
        *by("age", start=0.2), "--trainer.max_steps=1", "--trainer.max_epochs=5", manifest=manifest, callbacks=[seen]
    )
    trainer.fit(model, datamodule=data)
    ages = np.array([float(age) for age in data.splits["train"].table.extra["age"]])
    assert max(ages[seen.rows[0]]) <= np.sort(ages)[int(np.ceil(0.2 * len(ages))) - 1]


def test_the_losses_of_a_first_pass_say_it(parts):
    seen = Seen()
    model, data, trainer = parts(*by("loss", start=0.3, full_at=1.0), "--trainer.max_epochs=3", callbacks=[seen])
    losses = []

    class AfterFirst(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                module.eval()
                samples = data.splits["train"].samples
                batch = samples.__getitems__(type(next(iter(data.train_dataloader().batch_sampler)))(list(range(len(samples))), 0))
                with torch.no_grad():
                    losses.append(cross_entropy(module.model(batch.inputs).output, batch.target, reduction="none").numpy())
                module.train()

    trainer.callbacks.append(AfterFirst())
    trainer.fit(model, datamodule=data)
    assert data.losses == pytest.approx(losses[0], abs=1e-5)
    assert len({row for rows in seen.rows[:8] for row in rows}) == 128  # the first pass is over all
    share = np.sqrt(0.3**2 + (1 - 0.3**2) * 8 / 24)
    assert data.losses[seen.rows[8]].max() <= np.sort(data.losses)[int(np.ceil(share * len(data.losses))) - 1]


@pytest.mark.parametrize("what", slow_except(["text_length", "loss"], "text_length"))
@pytest.mark.parametrize("stop", slow_except([5, 11], 5))
def test_a_resumed_run_lets_in_what_the_whole_one_does(interrupted_and_whole, fit_here, what, stop):
    stopped, whole = interrupted_and_whole(stop, *by(what), "--trainer.max_epochs=3")
    assert_same_end(fit_here("--resume", stopped.folder), whole)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["text_length", "loss"])
def test_two_ranks_follow_the_curriculum_of_one(tiny, fit_here, fit_on_two, what):
    options = [tiny(), *by(what), "--trainer.max_epochs=3"]
    one = fit_here("--recipe", *options, runs="one")
    two, told = fit_on_two(*options, runs="two")
    assert f"curriculum by {what}" in told
    assert furthest_weights(one, two) < ROUNDING


def test_what_is_no_measure_of_difficulty_is_refused(parts, write_manifest):
    manifest = write_manifest(lambda i, row: row | {"age": "old" if i == 7 else str(i)})
    for what, message in (("text_lenght", "no column 'text_lenght'. Did you mean text_length"), ("age", "has 'old', expected a number")):
        model, data, trainer = parts(*by(what), manifest=manifest)
        with pytest.raises(UserError, match=message):
            trainer.fit(model, datamodule=data)
