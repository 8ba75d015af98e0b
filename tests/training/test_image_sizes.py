"""Images that are not square, and grey ones: from the command line to the predictions of a run."""

import pytest
import torch

from fusion.predictor import Predictor


@pytest.mark.parametrize("image", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("options", ["{}", '{"in_chans": 1}'], ids=["rgb", "grey"])
def test_a_run_on_wide_images_predicts_what_it_scored(tiny, fit_here, shapes_rows, image, options):
    settings = [f"--model.image.init_args.{setting}" for setting in (f"name={image}", "image_size=[32, 96]", f"options={options}")]
    run = fit_here("--recipe", tiny(), *settings, "--trainer.max_epochs=1")
    predictor = Predictor.load(run.folder, device="cpu")
    assert predictor.processor.inputs["image"].spec.size == (32, 96)
    assert predictor.model.encoders["image"].image_size == (32, 96)
    folder, rows = shapes_rows
    tested = [row for row in rows if row["split"] == "test"]
    predictions = predictor.predict([folder / row["image"] for row in tested], [row["text"] for row in tested])
    hits = sum(label == row["label"] for label, row in zip(predictions.labels, tested, strict=True)) / len(tested)
    assert hits == pytest.approx(run.results()["test"]["accuracy"], abs=1e-6)
    with torch.no_grad():
        found = predictor.model.encoders["image"](torch.zeros(1, 3, 32, 96))
    assert found.tokens.shape[1] == {"test_resnet": 1 * 3, "test_vit": 1 + 2 * 6}[image]
