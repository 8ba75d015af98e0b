"""A second command on the same run, after something has changed: it means the same, says what changed, or is rejected."""

import csv
import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image
from slow_cases import slow_except
from tiny_world import ROUNDING, assert_same_end, furthest_weights

import fusion.session as fit_module
from fusion.cli.evaluate import evaluate
from fusion.cli.main import run as run_command
from fusion.data.record import Record
from fusion.errors import UserError
from fusion.training.callbacks.signals import SaveInTime


@pytest.fixture
def table(write_manifest):
    """Reads and writes the manifest of the tiny world, without its given splits, ids and groups."""

    class Manifest:
        path = write_manifest(lambda i, row: {name: row[name] for name in ("image", "text", "label", "kind")})

        def rows(self):
            with open(self.path, newline="") as file:
                return list(csv.DictReader(file))

        def write(self, rows):
            with open(self.path, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)

        def change(self, row, **cells):
            rows = self.rows()
            rows[row] |= cells
            self.write(rows)

    return Manifest()


@pytest.fixture
def run(tiny, table, fit_here):
    """A short run on the table."""
    return fit_here("--recipe", tiny(manifest=table.path), "--trainer.max_epochs=1", "--data.test=0.2").folder


@pytest.fixture
def evaluated(run, capsys):
    """Scores the run's test split again; gives the scores and what was printed."""

    def call():
        capsys.readouterr()
        assert evaluate(["--run", str(run)]) == 0
        return json.loads((run / "evaluation-test.json").read_text())["all"], capsys.readouterr().out

    return call


def rows_of(run, split):
    columns = Record.read(run).columns
    return [row - 2 for row, s in zip(columns["row"], columns["split"], strict=True) if s == split]  # line 2 is row 0


def test_added_rows_leave_the_test_split_as_it_was(run, table, evaluated):
    before, _ = evaluated()
    rows = table.rows()
    new = [row | {"text": f"{row['text']} really"} for row in rows[:40]]
    table.write(new[:20] + rows + new[20:])
    after, told = evaluated()
    assert after == before
    assert "40 rows are new (manifest.csv, row 2)" in told


def test_the_order_of_the_rows_does_not_matter(run, table, evaluated):
    before, _ = evaluated()
    table.write(list(reversed(table.rows())))
    after, told = evaluated()
    assert after == before
    assert "the rows are in another order" in told


@pytest.mark.parametrize("column", ["text", "label"])
def test_a_changed_cell_moves_no_sample_to_another_split(run, table, evaluated, column):
    before, _ = evaluated()
    row = rows_of(run, "test")[0]
    table.change(row, **{column: "unheard of"})
    after, told = evaluated()
    assert after["samples"] == before["samples"]
    assert f"1 row is of another {column} (manifest.csv, row {row + 2})" in told


def test_removed_rows_are_reported(run, table, evaluated):
    gone = rows_of(run, "test")[0]
    before, _ = evaluated()
    table.write([row for i, row in enumerate(table.rows()) if i != gone])
    after, told = evaluated()
    assert after["samples"] == before["samples"] - 1
    assert "1 row is gone" in told


def test_a_split_that_is_gone_is_told_with_what_has_changed(run, table):
    gone = set(rows_of(run, "test"))
    table.write([row for i, row in enumerate(table.rows()) if i not in gone])
    with pytest.raises(
        UserError, match=rf"none of the {len(gone)} rows of the run's split 'test' is in its table any more: {len(gone)} rows are"
    ):
        evaluate(["--run", str(run)])


def test_of_equal_rows_each_keeps_its_own_split(tiny, table, fit_here, capsys):
    """One is trained on, its copy is tested on; without the first, the second is tested on all the same, and the other way round."""
    rows = table.rows()
    copies = [row | {"split": split} for row, split in zip([rows[0]] * 4, ("test", "train", "test", "train"), strict=True)]
    others = [row | {"split": split} for row, split in zip(rows[1:], ["train", "val", "test"] * len(rows), strict=False)]
    table.write([*copies, *others])
    run = fit_here("--recipe", tiny(manifest=table.path), "--trainer.max_epochs=1", "--data.on_unseen_label=count_as_wrong").folder
    for left in ([0, 2], [1, 3], [0, 1]):
        table.write([*(copies[i] for i in left), *others])
        capsys.readouterr()
        assert evaluate(["--run", str(run)]) == 0
        scored = json.loads((run / "evaluation-test.json").read_text())["all"]["samples"]
        assert scored == sum(row["split"] == "test" for row in [*(copies[i] for i in left), *others])
        told = capsys.readouterr().out
        assert "2 rows are gone" in told
        assert "another split" not in told


def test_a_path_with_dots_names_the_same_rows(tiny, table, fit_here, capsys):
    folder = table.path.parent / "inner"
    folder.mkdir()
    run = fit_here("--recipe", tiny(manifest=folder / ".." / table.path.name), "--trainer.max_epochs=1", "--data.test=0.2").folder
    capsys.readouterr()
    assert evaluate(["--run", str(run)]) == 0
    assert "changed" not in capsys.readouterr().out
    assert not any(str(cell).startswith("..") for cell in Record.read(run).columns["file"])


@pytest.fixture
def own_images(table, tmp_path):
    """The table's images in a folder beside it, by their names there; gives the folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = table.rows()
    for row in rows:
        copy = folder / Path(row["image"]).name
        copy.write_bytes(Path(row["image"]).read_bytes())
        row["image"] = f"pictures/{copy.name}"
    table.write(rows)
    return folder


def rename(folder, table):
    folder.rename(folder.with_name("renamed"))
    table.write([row | {"image": row["image"].replace("pictures/", "./renamed/")} for row in table.rows()])


def test_renamed_images_are_known_by_their_content(own_images, tiny, table, fit_here, capsys):
    run = fit_here("--recipe", tiny(manifest=table.path), "--trainer.max_epochs=1", "--data.test=0.2").folder
    evaluate(["--run", str(run)])
    before = json.loads((run / "evaluation-test.json").read_text())
    table.write([row | {"image": f"./{row['image']}"} for row in table.rows()])
    capsys.readouterr()
    evaluate(["--run", str(run)])
    assert "changed" not in capsys.readouterr().out
    table.write([row | {"image": row["image"].removeprefix("./")} for row in table.rows()])
    rename(own_images, table)
    changed = rows_of(run, "test")[0]
    evaluate(["--run", str(run)])
    told = capsys.readouterr().out
    rows = len(table.rows())
    assert f"the table has changed since the run was trained: {rows:,} rows are of the same image under another path (manifest.csv" in told
    assert json.loads((run / "evaluation-test.json").read_text()) == before
    assert "of another image" not in told
    table.change(changed, label="unheard of")
    evaluate(["--run", str(run)])
    assert f"1 row is of another label (manifest.csv, row {changed + 2})" in capsys.readouterr().out
    assert json.loads((run / "evaluation-test.json").read_text())["all"]["samples"] == before["all"]["samples"]


def test_a_changed_image_file_is_reported(run, table, evaluated):
    shown = {table.rows()[row]["image"] for row in rows_of(run, "test")}
    path = Path(sorted(shown)[0])
    before = path.read_bytes()
    try:
        Image.new("RGB", (64, 64), "white").save(path)
        _, told = evaluated()
    finally:
        path.write_bytes(before)  # the images are shared by all tests
    assert f"1 image files have changed since the run was trained (the first: {path})" in told


def test_a_row_that_now_names_another_split_keeps_its_own_and_is_reported(run, table, evaluated):
    before, _ = evaluated()
    moved = rows_of(run, "train")[0]
    table.write([row | {"split": "test" if i == moved else ""} for i, row in enumerate(table.rows())])
    after, told = evaluated()
    assert after == before
    assert f"1 row is in another split (manifest.csv, row {moved + 2})" in told


def test_a_change_in_another_column_is_reported_and_harmless(run, table, evaluated):
    before, _ = evaluated()
    table.change(5, kind="other")
    after, told = evaluated()
    assert after == before
    assert "1 row is changed in columns other than image, text and label" in told


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_bad_during_training_ends_it_in_one_line_with_its_path(tiny, table, own_images, monkeypatch, capsys, workers):
    """Even from a worker process, whose errors torch wraps in its traceback."""

    def then_gone(data):
        for path in own_images.iterdir():
            path.write_bytes(b"")

    monkeypatch.setattr(fit_module, "print_data_notes", then_gone)
    options = ["--recipe", str(tiny(manifest=table.path)), "--data.memory_gib=0", f"--data.num_workers={workers}"]
    with pytest.raises(SystemExit) as ended:
        run_command("fit", options)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.fullmatch(rf"error: {own_images}/\S+: empty file; it was readable when the images were checked\..*\n", told)


def test_a_run_gives_its_best_weights_to_another(run, tiny, table, fit_here, capsys):
    fit_here("--recipe", tiny(manifest=table.path), "--trainer.max_epochs=1", f"--init_from={run}")
    assert f"initialised from {run / 'model'}: " in capsys.readouterr().out


# Resuming.


@pytest.fixture
def stopped(tiny, table, fit_here, stop_after, monkeypatch):
    """A run on the table, stopped after two updates."""
    stop_after(2)
    folder = fit_here("--recipe", tiny(manifest=table.path)).folder
    monkeypatch.setattr(fit_module, "SaveInTime", SaveInTime)
    return folder


def refusal(folder, *options):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as told:
        fit_module.fit(["--resume", str(folder), *options])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert "\n" not in str(told.value)
    return str(told.value)


def test_renamed_classes_are_rejected_by_name(stopped, table):
    table.write([row | {"label": {"yes": "agreed"}.get(row["label"], row["label"])} for row in table.rows()])
    told = refusal(stopped)
    assert re.search(r"classes instead of \d+ \(without yes, new agreed\)", told)
    assert "of another label" in told


def test_a_new_class_is_rejected_by_name(stopped, table):
    table.write([row | ({"label": "unheard of"} if i < 20 else {}) for i, row in enumerate(table.rows())])
    assert "new unheard of" in refusal(stopped)


@pytest.mark.parametrize("change", ["fewer", "more", "text", "order", "image"])
def test_other_rows_are_rejected_with_what_has_changed(stopped, table, tmp_path, change):
    rows = table.rows()
    changed = {
        "fewer": rows[:-3],
        "more": [*rows, rows[0] | {"text": "is there a red square here?"}],
        "text": [rows[0] | {"text": "is there?"}, *rows[1:]],
        "order": [rows[1], rows[0], *rows[2:]],
        "image": [rows[0] | {"image": rows[-1]["image"]}, *rows[1:]],
    }[change]
    table.write(changed)
    expected = {
        "fewer": r"3 rows are gone \(manifest.csv, row",
        "more": rf"1 row is new \(manifest.csv, row {len(rows) + 2}\)",
        "text": r"1 row is of another text \(manifest.csv, row 2\)",
        "order": "in another (order|split)",  # the carving goes by the order
        "image": r"1 row is of another image \(manifest.csv, row 2\)",
    }[change]
    assert re.search(expected, refusal(stopped))


def test_an_image_file_of_other_bytes_is_rejected_and_the_same_bytes_anew_are_not(tiny, table, fit_here, stop_after, monkeypatch, tmp_path):
    copy = tmp_path / "copy.png"
    original = Path(table.rows()[0]["image"]).read_bytes()
    copy.write_bytes(original)
    table.change(0, image=str(copy))
    stop_after(2)
    folder = fit_here("--recipe", tiny(manifest=table.path)).folder
    monkeypatch.setattr(fit_module, "SaveInTime", SaveInTime)
    Image.new("RGB", (64, 64), "white").save(copy)
    assert "1 row is of a changed image file (manifest.csv, row 2)" in refusal(folder)
    copy.write_bytes(original)
    assert fit_here("--resume", folder).status == 0


def test_another_column_may_change_and_that_is_reported(stopped, table, fit_here, capsys):
    table.change(0, kind="other")
    assert fit_here("--resume", stopped, "--data.val=0.1").status == 0
    assert "note: the table has changed since the run began, but nothing that training reads: 1 row is changed" in capsys.readouterr().out


def test_the_column_that_orders_a_curriculum_may_not_change(tiny, table, fit_here, stop_after, monkeypatch):
    table.write([row | {"hard": i % 7} for i, row in enumerate(table.rows())])
    stop_after(2)
    folder = fit_here("--recipe", tiny(manifest=table.path), "--data.curriculum.by=hard").folder
    monkeypatch.setattr(fit_module, "SaveInTime", SaveInTime)
    table.change(0, hard="100")
    assert "(hard orders the curriculum)" in refusal(folder)


def test_renamed_images_and_a_moved_manifest_change_nothing(own_images, tiny, table, fit_here, stop_after, monkeypatch, capsys):
    whole = fit_here("--recipe", tiny(manifest=table.path), runs="whole")
    stop_after(2)
    folder = fit_here("--recipe", tiny(manifest=table.path)).folder
    monkeypatch.setattr(fit_module, "SaveInTime", SaveInTime)
    rename(own_images, table)
    record = (folder / "samples.parquet").read_bytes()
    moved = table.path.with_name("moved.csv")
    table.path.rename(moved)
    resumed = fit_here("--resume", folder, f"--data.manifest={moved}")
    assert "but nothing that training reads: " in capsys.readouterr().out
    assert (folder / "samples.parquet").read_bytes() == record
    assert_same_end(resumed, whole)


def test_without_its_record_a_changed_table_is_rejected_by_the_checkpoint(stopped, table):
    (stopped / "samples.parquet").unlink()
    table.change(0, text="is there?")
    assert "its samples are not those of the run" in refusal(stopped)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["model"]["optimizer"]["init_args"].update(lr=0.5), "model.optimizer.init_args.lr is 0.5 (was 0.05)"),
        (
            lambda r: r["model"]["optimizer"].update(class_path="torch.optim.Adam", init_args={"lr": 0.05}),
            "torch.optim.Adam (was torch.optim.SGD)",
        ),
        (lambda r: r["model"].update(rates={"head": {"factor": 2.0}}), "model.rates.head.factor is 2.0 (was None)"),
        (lambda r: r["data"].update(batch_size=7), "data.batch_size is 7"),
    ],
    ids=["rate", "optimiser", "new", "batch"],
)
def test_a_recipe_that_was_edited_since_is_rejected(stopped, fit_here, change, words):
    recipe = stopped / "recipe.yaml"
    before = recipe.read_text()
    settings = yaml.safe_load(before)
    change(settings)
    recipe.write_text(yaml.safe_dump(settings))
    told = refusal(stopped)
    assert words in told
    assert f"Restore them in {recipe}" in told
    recipe.write_text(before)
    assert fit_here("--resume", stopped).status == 0


HARMLESS = ["--data.num_workers=1", "--trainer.log_every_n_steps=3", "--data.memory_gib=0", "--trainer.enable_model_summary=true"]


@pytest.mark.parametrize("option", slow_except(HARMLESS, HARMLESS[0]))
def test_what_changes_nothing_that_is_past_may_differ(interrupted_and_whole, fit_here, option):
    stopped, whole = interrupted_and_whole(4)
    assert_same_end(fit_here("--resume", stopped.folder, option), whole)


@pytest.mark.parametrize(("before", "after"), slow_except([(1, 4), (4, 1), (2, 4)], (2, 4)))
def test_a_run_may_go_on_with_another_accumulation(tiny, fit_here, stop_after, monkeypatch, before, after):
    """From the middle of an epoch: its place there is counted in updates."""
    recipe = tiny()
    accumulate = "--trainer.accumulate_grad_batches="
    whole = fit_here("--recipe", recipe, runs="whole")
    stop_after(5 * before)
    stopped = fit_here("--recipe", recipe, f"{accumulate}{before}", runs="stopped")
    assert stopped.checkpoint()["fusion"]["updates"] == 5
    monkeypatch.setattr(fit_module, "SaveInTime", SaveInTime)
    resumed = fit_here("--resume", stopped.folder, f"{accumulate}{after}")
    assert resumed.checkpoint()["fusion"]["updates"] == whole.checkpoint()["fusion"]["updates"] == 16
    assert furthest_weights(resumed, whole) < ROUNDING
    assert resumed.column("train/loss_epoch") == pytest.approx(whole.column("train/loss_epoch"), abs=ROUNDING)


def test_a_finished_run_goes_on_for_more_epochs_and_says_that_its_schedule_is_another(tiny, fit_here, capsys):
    recipe = tiny()
    run = fit_here("--recipe", recipe, "--trainer.max_epochs=1")
    capsys.readouterr()
    resumed = fit_here("--resume", run.folder, "--trainer.max_epochs=3")
    assert resumed.results()["updates"] > 0
    assert resumed.checkpoint()["fusion"]["updates"] == 24
    told = capsys.readouterr().out
    assert re.search(r"note: 24 updates instead of 8: the schedule differs .* at update 8 the rate is \S+ \(it would have been", told)


def test_more_epochs_at_a_constant_rate_are_the_same_run(tiny, fit_here, capsys):
    options = ["--recipe", tiny(dropout=0.4), "--model.schedule=Constant"]
    whole = fit_here(*options, "--trainer.max_epochs=3", runs="whole")
    short = fit_here(*options, "--trainer.max_epochs=2", runs="short")
    capsys.readouterr()
    resumed = fit_here("--resume", short.folder, "--trainer.max_epochs=3")
    assert "the schedule differs" not in capsys.readouterr().out
    assert_same_end(resumed, whole)


def test_an_end_before_what_is_done_is_rejected(tiny, fit_here):
    folder = fit_here("--recipe", tiny()).folder
    assert "--trainer.max_epochs=1, but 2 epochs are finished" in refusal(folder, "--trainer.max_epochs=1")
    assert "--trainer.max_steps=3, but 16 updates have been made" in refusal(folder, "--trainer.max_steps=3")


def test_an_epoch_that_is_begun_cannot_be_beyond_the_end(stopped):
    assert "0 epochs are finished and epoch 1 has started" in refusal(stopped, "--trainer.max_epochs=0")


def test_a_run_of_an_older_version_goes_on_with_the_defaults_of_newer_options(stopped, fit_here):
    """Its recipe doesn't name them; to set one would be another run."""
    recipe = stopped / "recipe.yaml"
    settings = yaml.safe_load(recipe.read_text())
    del settings["model"]["modality_dropout"], settings["data"]["where"]
    recipe.write_text(yaml.safe_dump(settings))
    assert "model.modality_dropout is 0.5 (was None)" in refusal(stopped, "--model.modality_dropout=0.5")
    assert fit_here("--resume", stopped, "--data.val=0.1").status == 0
