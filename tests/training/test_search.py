"""The index of a retrieval run, and search in it from the command line and from Python."""

import csv
import json
import math

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from test_retrieval_runs import PAIRS, pairs  # noqa: F401 (a fixture)

import fusion
from fusion.api import Run
from fusion.cli.evaluate import evaluate
from fusion.cli.index import index
from fusion.cli.search import search
from fusion.errors import UserError
from fusion.search import Index, nearest_rows


@pytest.fixture
def run(pairs, fit_here):  # noqa: F811
    return fit_here("--recipe", pairs(), *PAIRS, "--trainer.max_epochs=1").folder


def rows_of(folder):
    with open(folder / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_search_finds_what_the_embeddings_of_predict_say(run, tmp_path, capsys):
    rows = rows_of(tmp_path)
    assert index(["--run", str(run), "--manifest", str(tmp_path / "manifest.csv")]) == 0
    images, texts = (list(dict.fromkeys(row[name] for row in rows)) for name in ("image", "text"))
    assert f"{len(images)} different items of image, {len(texts)} different items of text" in capsys.readouterr().out
    assert search(["--run", str(run), "--text", texts[5], "--k", "4", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    predictor = fusion.load(str(run))
    cosines = predictor.predict(images=images, texts=[texts[5]] * len(images)).values[:, 0]
    best = np.argsort(-cosines)[:4]
    assert [match["cells"]["image"] for match in found] == [images[i] for i in best]
    assert [match["score"] for match in found] == pytest.approx(cosines[best], abs=1e-5)
    first = next(i for i, row in enumerate(rows) if row["image"] == images[best[0]])
    assert found[0]["row"] == first + 2  # the header is line 1
    assert search(["--run", str(run), "--image", images[0]]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 11


def test_search_from_python_takes_tables_in_memory_and_rows_with_one_side(run, tmp_path):
    rows = rows_of(tmp_path)
    table = {"image": [rows[0]["image"], None, rows[9]["image"]], "text": [None, rows[3]["text"], None]}
    made = Run(run).index(table, tmp_path / "index")
    assert len(made) == 3
    found = made.search(texts=[rows[0]["text"], rows[1]["text"]], k=10)
    assert [len(of_query) for of_query in found] == [2, 2]
    assert found[0][0].score >= found[0][1].score
    again = Index.load(tmp_path / "index", run).search(texts=[rows[0]["text"]])
    assert [m.cells for m in again[0]] == [m.cells for m in found[0]]
    assert [m.score for m in again[0]] == pytest.approx([m.score for m in found[0]], abs=1e-6)
    picture = np.asarray(Image.open(rows[0]["image"]))
    assert [m.cells for m in made.search(images=[picture])[0]] == [{"text": rows[3]["text"]}]
    with pytest.raises(UserError, match="a query is of one side, but both image and text are given"):
        made.search(images=[picture], texts=["a"])
    only_images = Run(run).index({"image": [rows[0]["image"]]})
    with pytest.raises(UserError, match="the index has no text to be found"):
        only_images.search(images=[picture])


def test_an_index_of_another_model_or_none_is_rejected(run, tmp_path):
    with pytest.raises(UserError, match=r"there is no index .*; make it by: fusion index --run"):
        search(["--run", str(run), "--text", "a"])
    made = Run(run).index(pa.table({"image": [rows_of(tmp_path)[0]["image"]]}), tmp_path / "index")
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps(about | {"model": "0" * 64}))
    with pytest.raises(UserError, match="was made by another model or version; make it again"):
        Index.load(tmp_path / "index", run)
    made.save(tmp_path / "index")
    assert len(Index.load(tmp_path / "index", run)) == 1
    (tmp_path / "index" / "embeddings.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"can't read the index .*; make it again"):
        Index.load(tmp_path / "index", run)


def test_only_runs_of_retrieval_are_searched(tiny, fit_here, tmp_path):
    other = fit_here("--recipe", tiny(), "--trainer.max_epochs=1", "--trainer.limit_train_batches=1")
    with pytest.raises(UserError, match="only runs of the task Retrieval can be searched; this one is of Classification"):
        index(["--run", str(other.folder), "--manifest", str(tmp_path / "manifest.csv")])


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_the_nearest_rows_are_those_of_a_sort(monkeypatch, chunk):
    monkeypatch.setattr("fusion.search.CHUNK_VALUES", chunk)
    rng = np.random.default_rng(0)
    queries, embeddings = (rng.normal(size=(n, 5)).astype(np.float32) for n in (6, 40))
    rows, scores = nearest_rows(queries, embeddings, 7)
    products = queries @ embeddings.T
    assert rows.tolist() == np.argsort(-products, axis=1)[:, :7].tolist()
    assert np.allclose(scores, np.take_along_axis(products, rows, axis=1))
    assert nearest_rows(queries, embeddings, 100)[0].shape == (6, 40)
    assert math.isfinite(scores.sum())


MATCHER = ["--model.head.matcher=Concat", "--model.head.matcher_args={dim: 16}"]


def test_the_matcher_orders_the_first_candidates_anew(pairs, fit_here, tmp_path, capsys):  # noqa: F811
    run = fit_here("--recipe", pairs(), *PAIRS, *MATCHER, "--trainer.max_epochs=1").folder
    rows = rows_of(tmp_path)
    made = Run(run).index(tmp_path / "manifest.csv", run / "index")
    plain, ranked = (made.search(texts=[rows[0]["text"]], k=6, rerank=rerank)[0] for rerank in (0, 4))
    assert {m.cells["image"] for m in ranked[:4]} == {m.cells["image"] for m in plain[:4]}
    assert [m._replace(match=None) for m in ranked[4:]] == plain[4:]
    probabilities = [m.match for m in ranked[:4]]
    assert probabilities == sorted(probabilities, reverse=True)
    predictor = fusion.load(str(run))
    given = {"image": [m.cells["image"] for m in ranked[:4]], "text": [rows[0]["text"]] * 4}
    assert predictor.match(given).sigmoid().tolist() == pytest.approx(probabilities, abs=1e-5)
    assert search(["--run", str(run), "--image", rows[0]["image"], "--rerank", "3", "--k", "2"]) == 0
    assert "match" in capsys.readouterr().out
    assert evaluate(["--run", str(run), "--rerank", "5"]) == 0
    scores = json.loads((run / "evaluation-test.json").read_text())
    ranked_scores = scores["first 5 re-ranked"]
    assert ranked_scores["recall_5"] == pytest.approx(scores["all"]["recall_5"])  # the same five
    tested = [row for row in rows if row["split"] == "test"]
    images = list(dict.fromkeys(row["image"] for row in tested))
    places = []
    for row in tested:
        given = {"image": images, "text": [row["text"]] * len(images)}
        cosines, matches = predictor.predict(images=images, texts=given["text"]).values[:, 0], predictor.match(given).numpy()
        first = set(np.argsort(-cosines)[:5].tolist())
        order = sorted(range(len(images)), key=lambda i: (i not in first, -(matches if i in first else cosines)[i]))
        places.append(1 + order.index(images.index(row["image"])))
    assert ranked_scores["text_to_image_mean_rank"] == pytest.approx(np.mean(places))
    assert ranked_scores["text_to_image_recall_1"] == pytest.approx(np.mean([place == 1 for place in places]))


def test_a_run_without_matcher_is_not_re_ranked(run, tmp_path):
    with pytest.raises(UserError, match=r"this run has no matcher to re-rank with; train one by"):
        evaluate(["--run", str(run), "--rerank", "5"])
    with pytest.raises(UserError, match="this run has no matcher"):
        Run(run).index({"image": [rows_of(tmp_path)[0]["image"]]}).search(texts=["a"], rerank=2)


def test_a_folder_that_holds_something_else_is_not_replaced_by_an_index(run, tmp_path):
    table = {"image": [rows_of(tmp_path)[0]["image"]]}
    made = Run(run).index(table)
    with pytest.raises(UserError, match="holds something else than an index, which would be lost"):
        made.save(run)
    with pytest.raises(UserError, match="holds something else than an index"):
        index(["--run", str(run), "--manifest", str(tmp_path / "manifest.csv"), "--out", str(tmp_path)])
    assert (run / "recipe.yaml").is_file()
    (tmp_path / "empty").mkdir()
    made.save(tmp_path / "empty")
    made.save(tmp_path / "empty")
    assert len(Index.load(tmp_path / "empty", run)) == 1
    assert not list(tmp_path.glob(".empty*"))


def test_a_pair_whose_image_is_gone_is_not_matched(pairs, fit_here, tmp_path):  # noqa: F811
    run = fit_here("--recipe", pairs(), *PAIRS, *MATCHER, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1").folder
    image = tmp_path / "one.png"
    Image.open(rows_of(tmp_path)[0]["image"]).save(image)
    made = Run(run).index({"image": [str(image)]})
    image.unlink()
    with pytest.raises(UserError, match="a pair can't be matched: missing"):
        made.search(texts=["a"], rerank=1)
