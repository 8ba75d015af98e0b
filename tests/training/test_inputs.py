"""Runs over inputs of other numbers and kinds than an image and a text: trained by recipe, continued, predicted, also without some."""

import csv
import json

import numpy as np
import pandas
import pytest
import torch
import yaml
from slow_cases import slow_except
from tiny_world import BERT, ROUNDING, SHORT, furthest_weights

import fusion
from fusion.benchmarks.kills import benchmark_kills
from fusion.cli.evaluate import evaluate
from fusion.cli.predict import predict
from fusion.errors import UserError
from fusion.session import fit

IMAGE = {"class_path": "fusion.encoders.TimmImage", "init_args": {"name": "test_vit", "pretrained": False, "image_size": 32}}
TEXT = {"class_path": "fusion.encoders.TransformersText", "init_args": {"config": BERT}}
TABLE = {"class_path": "fusion.encoders.TableColumns", "init_args": {"dim": 16, "heads": 2}}


def kind(name, **options):
    return {"class_path": f"fusion.data.kinds.{name}", "init_args": options}


# By name: data.inputs, model.encoders.
SETS = {
    "image, text and table": (
        {
            "photo": kind("ImageInput", column="image"),
            "question": kind("TextInput", column="text"),
            "facts": kind("TableInput", columns=["length", "kind", "day"]),
        },
        {"photo": IMAGE, "question": TEXT, "facts": TABLE},
    ),
    "text and text": (
        {"question": kind("TextInput", column="text"), "about": kind("TextInput", column="about", max_length=6)},
        {"question": TEXT, "about": TEXT},
    ),
    "three pictures and text": (
        {"photos": kind("ImageInput", column="photos"), "question": kind("TextInput", column="text")},
        {"photos": IMAGE, "question": TEXT},
    ),
}
FP16 = ["--recipe=engine/amp", "--trainer.accelerator=cpu"]
TWO_RANKS = ["--recipe=engine/ddp", "--trainer.accelerator=cpu", "--trainer.devices=2"]
every_set = pytest.mark.parametrize("inputs", SETS)
every_set_slowly = pytest.mark.parametrize("inputs", slow_except(SETS, "image, text and table"))


@pytest.fixture
def of_inputs(tiny, write_manifest, shapes_rows, tmp_path):
    """The recipe of the tiny world with named inputs, over a manifest that has columns for all of them, some cells empty."""
    folder, rows = shapes_rows
    pictures = sorted({str(folder / row["image"]) for row in rows})

    def change(i, row):
        several = [row["image"], *(pictures[(7 * i + k) % len(pictures)] for k in range(1, 1 + i % 3))]
        return row | {
            "length": str(len(row["text"]) * 1.5) if i % 6 else "",
            "kind": row["text"].split()[0],
            "day": f"2024-01-{1 + i % 28:02}",
            "about": f"{row['label']} maybe" if i % 4 != 2 else "",
            "photos": json.dumps(several) if i % 4 != 2 else "",
            "image": row["image"] if i % 7 else "",
            "text": row["text"] if i % 8 else "",
        }

    def write(name):
        settings = yaml.safe_load(tiny(manifest=write_manifest(change)).read_text())
        settings["data"]["inputs"], settings["model"]["encoders"] = SETS[name]
        del settings["model"]["image"], settings["model"]["text"]
        path = tmp_path / "inputs.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def cells_of(name, rows):
    """What Python would give for the inputs of a set."""
    if name == "image, text and table":
        frame = pandas.DataFrame(rows)[["length", "kind", "day"]].replace("", None)
        return {"photo": [r["image"] or None for r in rows], "question": [r["text"] for r in rows], "facts": frame}
    if name == "text and text":
        return {"question": [r["text"] for r in rows], "about": [r["about"] for r in rows]}
    return {"photos": [json.loads(r["photos"]) if r["photos"] else None for r in rows], "question": [r["text"] for r in rows]}


@every_set
def test_inputs_train_by_recipe_alone_and_answer_alike_from_files_and_from_python(of_inputs, fit_here, tmp_path, capsys, inputs):
    run = fit_here("--recipe", of_inputs(inputs))
    assert run.status == 0
    plan = capsys.readouterr().out
    names = list(SETS[inputs][0])
    assert all(f"without {name}" in plan for name in names if name != "facts")
    assert evaluate(["--run", str(run.folder)]) == 0
    evaluated = json.loads((run.folder / "evaluation-test.json").read_text())["all"]
    assert evaluated["accuracy"] == pytest.approx(run.results()["test"]["accuracy"])
    assert predict(["--run", str(run.folder), "--manifest", str(tmp_path / "manifest.csv"), "--out", str(tmp_path / "p.csv")]) == 0
    with open(tmp_path / "p.csv", newline="") as file:
        written = list(csv.DictReader(file))
    with open(tmp_path / "manifest.csv", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    predictor = fusion.load(str(run.folder))
    found = predictor.predict(**cells_of(inputs, [rows[row["id"]] for row in written]))
    assert found.answers == [row["prediction"] for row in written]
    for name in names:
        assert [str(there).lower() for there in found.present[name]] == [row[f"present_{name}"] for row in written]
        assert 0 < found.present[name].sum() <= len(written)


@every_set_slowly
@pytest.mark.parametrize("options", slow_except([[], FP16, ["--model.mixing.mixup=1"]], FP16), ids=["fp32", "fp16", "mixed"])
def test_a_run_over_inputs_goes_on_to_the_bit(of_inputs, assert_resumes_to_the_bit, inputs, options):
    assert_resumes_to_the_bit("--recipe", of_inputs(inputs), *options, "--model.modality_dropout=0.3")


KILLED = {"image, text and table": [[], [*FP16, *TWO_RANKS]], "text and text": [[]], "three pictures and text": [[*FP16, *TWO_RANKS]]}


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "options"), [(name, options) for name, several in KILLED.items() for options in several])
def test_a_run_over_inputs_that_is_killed_ends_where_an_undisturbed_one_does(of_inputs, inputs, options, capsys):
    long = ["--trainer.max_epochs=12", "--checkpoint.every_updates=4", "--model.modality_dropout=0.3"]
    assert benchmark_kills(["--recipe", str(of_inputs(inputs)), *options, *long], kills=2, seed=1) == 0
    output = capsys.readouterr().out
    assert "after 2 kills: bitwise equal" in output
    assert " updates\n" in output  # a checkpoint that the run went on from


@pytest.mark.slow
@every_set
def test_two_ranks_train_what_one_does(of_inputs, fit_here, fit_on_two, inputs):
    recipe = of_inputs(inputs)
    one, (two, _) = fit_here("--recipe", recipe, runs="one"), fit_on_two(recipe, runs="two")
    assert furthest_weights(one, two) < ROUNDING


@every_set
def test_an_input_that_a_sample_lacks_changes_nothing_by_what_stands_there(of_inputs, fit_here, inputs):
    """A sample without an input gives what a batch gives in which others have it, and what is padded there has no say."""
    run = fit_here("--recipe", of_inputs(inputs), *SHORT)
    predictor = fusion.load(str(run.folder))
    with open(run.folder.parents[2] / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    given = cells_of(inputs, rows[:20])
    for name, cells in given.items():
        if name == "facts":
            continue
        others = [other for other in given if other != name]
        complete = [i for i in range(20) if all(predictor.processor.inputs[o].raw(given[o], o)[i] is not None for o in others)]
        i = complete[0]
        alone = {o: given[o][i : i + 1] if o != "facts" else given[o].iloc[i : i + 1] for o in others}
        without = {name: [None if k == i else cell for k, cell in enumerate(cells)]} | {o: given[o] for o in others}
        both = [predictor.predict(**alone).values[0], predictor.predict(**without, batch_size=20).values[i]]
        assert np.allclose(*both, atol=1e-5)


def test_bad_cells_of_a_table_are_listed_and_unknown_categories_noted(of_inputs, fit_here, tmp_path, capsys):
    recipe = of_inputs("image, text and table")
    path = tmp_path / "manifest.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    rows[1]["length"] = "long"
    rows[2]["day"] = "yesterday"
    test = next(row for row in rows if row["split"] == "test")
    test["kind"] = "never"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    run = fit_here("--recipe", recipe, *SHORT)
    with open(run.folder / "data_issues.csv", newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file)]
    assert reasons == ["column length has 'long', expected a number", "column day has 'yesterday', expected a date"]
    assert "1 have a category that does not occur in train" in capsys.readouterr().out
    with pytest.raises(UserError, match="sample 0: column length has 'long', expected a number"):
        fusion.load(str(run.folder)).predict(facts={"length": ["long"], "kind": ["is"], "day": [None]})
    with pytest.raises(UserError, match="facts has no column 'day'"):
        fusion.load(str(run.folder)).predict(facts={"length": [1.0], "kind": ["is"]})


def facts_of(settings):
    return settings["data"]["inputs"]["facts"]["init_args"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["data"]["inputs"].pop("photo"), r"encoder 'photo', but data\.inputs has none of that name"),
        (lambda s: s["model"]["encoders"].update(photo=TEXT), r"'photo' \(TransformersText\) takes Texts, but its input is a ImageInput"),
        (
            lambda s: s["data"]["inputs"]["facts"]["init_args"].update(columns=["lenght"]),
            r"no column 'lenght' for the facts. Did you mean length",
        ),
        (lambda s: s["data"]["inputs"]["facts"]["init_args"].update(columns=[]), "at least one"),
        (lambda s: s["model"]["encoders"].update(head=TEXT), "no input can be called 'head'"),
        (lambda s: s["model"].update(image=IMAGE, encoders={"image": IMAGE}), "both name an encoder of 'image'"),
        (lambda s: s["model"].update(head={"class_path": "FiLM"}), "FiLM fuses 2 modalities"),
    ],
)
def test_recipes_whose_inputs_and_encoders_do_not_fit_are_rejected(of_inputs, change, message):
    recipe = of_inputs("image, text and table")
    settings = yaml.safe_load(recipe.read_text())
    change(settings)
    recipe.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=message):
        fit(["--recipe", str(recipe), *SHORT])


def test_the_order_of_a_samples_pictures_is_seen_by_heads_of_tokens(of_inputs, fit_here):
    run = fit_here("--recipe", of_inputs("three pictures and text"), "--model.head=CrossAttention", *SHORT)
    predictor = fusion.load(str(run.folder))
    with open(run.folder.parents[2] / "manifest.csv", newline="") as file:
        pictures = next(json.loads(row["photos"]) for row in csv.DictReader(file) if row["photos"].count(".png") == 3)
    found = predictor.predict(photos=[pictures, pictures[::-1], pictures[:1], [pictures[0], None]], question=["red?"] * 4).values
    assert not np.allclose(found[0], found[1], atol=1e-6)
    assert np.allclose(found[2], found[3], atol=1e-6)
    assert torch.isfinite(torch.from_numpy(found)).all()


def test_an_input_may_be_called_images_and_one_without_an_encoder_is_noted(of_inputs, fit_here, tmp_path, capsys):
    recipe = of_inputs("three pictures and text")
    settings = yaml.safe_load(recipe.read_text())
    inputs, encoders = settings["data"]["inputs"], settings["model"]["encoders"]
    inputs["images"], encoders["images"] = inputs.pop("photos"), encoders.pop("photos")
    inputs["facts"] = kind("TableInput", columns=["length"])
    recipe.write_text(yaml.safe_dump(settings))
    run = fit_here("--recipe", recipe, *SHORT)
    assert "data.inputs has 'facts', which no encoder reads" in capsys.readouterr().out
    with open(tmp_path / "manifest.csv", newline="") as file:
        pictures = [json.loads(row["photos"]) for row in csv.DictReader(file) if row["photos"]][:3]
    assert len(fusion.load(str(run.folder)).predict(images=pictures).answers) == 3


def test_columns_of_a_table_that_a_file_lacks_are_missing_cells(of_inputs, fit_here, tmp_path, capsys):
    run = fit_here("--recipe", of_inputs("image, text and table"), *SHORT)
    frame = pandas.read_csv(tmp_path / "manifest.csv", dtype=str).rename(columns={"kind": "kinds"})
    frame.to_csv(tmp_path / "other.csv", index=False)
    capsys.readouterr()
    assert predict(["--run", str(run.folder / "model"), "--manifest", str(tmp_path / "other.csv"), "--out", str(tmp_path / "p.csv")]) == 0
    assert "other.csv has no column 'kind': its cells are treated as missing. Did you mean kinds" in capsys.readouterr().out
    with open(tmp_path / "p.csv", newline="") as file:
        assert any(row["present_facts"] == "true" for row in csv.DictReader(file))
    with pytest.raises(UserError, match=r"Another name: --data\.inputs\.facts\.init_args\.columns=\[length,kind,day\]"):
        fit(["--recipe", str(of_inputs("image, text and table")), f"--data.manifest={tmp_path / 'other.csv'}", *SHORT])


def test_weights_of_a_table_with_other_columns_are_not_taken_by_their_place(of_inputs, fit_here, tmp_path, capsys):
    run = fit_here("--recipe", of_inputs("image, text and table"), *SHORT)
    frame = pandas.read_csv(tmp_path / "manifest.csv", dtype=str)
    frame["kind"] = frame["kind"].map(lambda word: f"other {word}")
    frame.to_csv(tmp_path / "other.csv", index=False)
    capsys.readouterr()
    options = [f"--data.manifest={tmp_path / 'other.csv'}", f"--init_from={run.folder}"]
    fit(["--recipe", str(tmp_path / "inputs.yaml"), *options, *SHORT])
    assert "encoders.facts.tokens.categories.weight" in capsys.readouterr().out
