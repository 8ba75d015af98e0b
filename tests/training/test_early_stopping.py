"""Early stopping as the recipe arranges it, beside the callbacks that every run has."""

from fusion.session import fit

STILL = ["--model.optimizer.init_args.lr=0", "--trainer.max_epochs=6", "--recipe", "engine/early_stopping"]


def test_a_run_ends_when_the_validation_accuracy_no_longer_rises(tiny, fit_here):
    run = fit_here("--recipe", tiny(), *STILL, "--trainer.callbacks.patience=2")
    assert len(run.column("val/accuracy")) == 3  # the first is the best; two more don't exceed it


def test_within_its_patience_a_run_goes_on_to_the_end(tiny, fit_here):
    assert len(fit_here("--recipe", tiny(), *STILL, "--trainer.callbacks.patience=6").column("val/accuracy")) == 6


def test_a_resumed_run_counts_on(tiny, fit_here, stop_after):
    stop_after(15)  # in the second epoch
    stopped = fit_here("--recipe", tiny(), *STILL, "--trainer.callbacks.patience=2")
    assert 0 < len(stopped.column("val/accuracy")) < 3
    assert fit(["--resume", str(stopped.folder)]) == 0
    assert len(stopped.column("val/accuracy")) == 3
