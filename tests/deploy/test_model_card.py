"""What a model card states is what the run, the encoders' sources and the caller say, and "unknown" elsewhere."""

from pathlib import Path

import huggingface_hub
import pytest
import timm
import yaml

from fusion.deploy.bases import Base, cached_licence, pretrained_bases
from fusion.deploy.local_paths import base_name, is_local, without_paths
from fusion.deploy.model_card import Facts, markdown, model_card
from fusion.tasks import Classification, MultiLabel, Regression

KINDS = {"image": "ImageInput", "text": "TextInput", "facts": "TableInput"}


def about(task, *inputs, head="fusion.heads.gated.Gated"):
    columns = {"facts": {"columns": ["price", "brand|name"]}}
    return {
        "encoders": {name: {"class": "fusion.encoders.X", "init": {"name": "resnet10t"}} for name in inputs},
        "head": {"class": head, "init": {}},
        "processor": {
            "inputs": {name: {"class": f"fusion.data.kinds.{KINDS[name]}", "init": columns.get(name, {"column": name})} for name in inputs},
            "task": task.state(),
        },
    }


def classes(*names):
    task = Classification()
    task.set_learnt({"names": list(names), "class_weights": None})
    return task


def price():
    task = Regression()
    task.learn({"train": ["1", "2", "5"]}, column="price", on_unseen="error")
    return task


def card_of(task=None, inputs=("image", "text"), bases=None, results=None, recipe=None, **more):
    described = about(task or classes("yes", "no"), *inputs, **more)
    facts = Facts("ada/shoes", described, recipe or {}, results or {}, bases or dict.fromkeys(inputs), 1234)
    return model_card(facts)


def metadata_of(card):
    return huggingface_hub.ModelCard(card).data.to_dict()


def test_scores_are_given_with_their_samples_and_the_bounds_of_the_same_samples():
    test = {"accuracy": 0.75, "balanced_accuracy": 0.5, "f1_macro": 0.25, "log_loss": 1.5, "ceiling_image": 0.6, "ceiling_majority": 0.4}
    card = card_of(results={"test": test, "test_samples": 3600, "updates": 1200})
    assert "On the test split, 3,600 samples:" in card
    table = card[card.index("| test |") :].splitlines()[:5]
    assert table == [
        "| test | accuracy | balanced | F1 macro |",
        "|---|---|---|---|",
        "| **this model** | 0.7500 | 0.5000 | 0.2500 |",
        "| upper bound (image only) | 0.6000 |  |  |",
        "| majority class | 0.4000 |  |  |",
    ]
    assert "All other scores: log_loss 1.5000." in card
    assert "| updates made | 1,200 |" in card


def test_bounds_of_errors_are_lower_bounds():
    card = card_of(price(), results={"test": {"mae": 2.0, "rmse": 3.0, "r2": 0.5, "floor_text": 1.0, "floor_median": 4.0}})
    assert "| lower bound (text only) | 1.0000 |  |  |" in card
    assert "| median for all | 4.0000 |  |  |" in card
    assert "an unrecorded number of samples" in card  # of a run of an earlier version


def test_a_run_without_test_samples_says_so():
    card = card_of(results={"test": {}, "val": {"accuracy": 1.0}})
    assert "The run had no test samples: nothing was scored." in card
    assert "1.0000" not in card


@pytest.mark.parametrize(
    ("task", "inputs", "pipeline"),
    [
        (classes("a", "b"), ("image", "text"), "visual-question-answering"),
        (classes("a", "b"), ("image",), "image-classification"),
        (classes("a", "b"), ("text",), "text-classification"),
        (classes("a", "b"), ("facts",), "tabular-classification"),
        (price(), ("facts",), "tabular-regression"),
        (price(), ("image", "text"), None),
        (classes("a", "b"), ("image", "text", "facts"), None),
    ],
)
def test_the_pipeline_is_named_where_the_hub_has_a_name_for_it(task, inputs, pipeline):
    found = metadata_of(card_of(task, inputs))
    assert found.get("pipeline_tag") == pipeline
    assert found["library_name"] == "fusion"
    assert ("multimodal" in found["tags"]) == (len(inputs) > 1)


def test_the_licence_is_that_given_or_that_all_pretrained_encoders_have():
    def licence(*licences, given=None):
        bases = {f"x{i}": one and Base(f"org/{i}", one) for i, one in enumerate(licences)}
        return Facts("a/b", {}, {}, {}, bases, 0, given).own_licence

    assert licence("mit", "mit") == licence("mit", None) == "mit"
    assert licence("mit", "apache-2.0") == licence("mit", "unknown") == licence(None) == "unknown"
    assert licence("mit", "apache-2.0", given="other") == "other"


def test_a_local_folder_of_unknown_licence_leaves_that_of_the_model_unknown():
    recipe = {"model": {"text": {"init_args": {"name_or_path": "/home/ada/bert"}}}}
    assert Facts("a/b", {}, recipe, {}, {"image": Base("org/i", "mit"), "text": None}, 0).own_licence == "unknown"


def test_encoders_of_a_hub_are_bases_with_the_licence_of_their_source():
    recipe = {
        "model": {
            "image": {"class_path": "fusion.encoders.TimmImage", "init_args": {"name": "resnet18", "pretrained": True}},
            "text": {"class_path": "fusion.encoders.TransformersText", "init_args": {"name_or_path": "org/bert"}},
            "encoders": {
                "scan": {"class_path": "fusion.encoders.TimmImage", "init_args": {"name": "hf-hub:org/scans@v1"}},
                "report": {"class_path": "fusion.encoders.PairText", "init_args": {"name_or_path": "org/clip", "pretrained": False}},
                "local": {"class_path": "fusion.encoders.TransformersText", "init_args": {"name_or_path": "/home/ada/bert"}},
                "facts": {"class_path": "fusion.encoders.TableColumns", "init_args": {"dim": 8}},
                "own": {"class_path": "mine.Encoder", "init_args": {"name": "resnet18"}},
            },
        }
    }
    names = ["image", "text", "scan", "report", "local", "facts", "own"]
    found = pretrained_bases(recipe, names, {"org/bert": "mit"}.get)
    config = timm.get_pretrained_cfg("resnet18")
    assert found == {
        "image": Base(config.hf_hub_id, config.license),
        "text": Base("org/bert", "mit"),
        "scan": Base("org/scans", "unknown"),
        **dict.fromkeys(["report", "local", "facts", "own"]),
    }


def test_bases_and_inputs_stand_in_the_card_and_its_metadata():
    recipe = {"model": {"text": {"init_args": {"name_or_path": "/home/ada/bert", "pretrained": True}}}}
    bases = {"image": Base("timm/x", "mit"), "text": None, "facts": None}
    card = card_of(inputs=("image", "text", "facts"), bases=bases, recipe=recipe)
    assert metadata_of(card)["base_model"] == ["timm/x"]
    assert "| image | image | image | X `resnet10t` | [timm/x](https://huggingface.co/timm/x) | mit |" in card
    assert "| text | text | text | X `resnet10t` | a local folder, `bert` |  |" in card
    assert "| facts | table | price, brand\\|name | X `resnet10t` | scratch |  |" in card
    assert 'model.predict(images=["photo.jpg"], texts=["a text"], facts=[...])' in card
    assert "/home" not in card


def test_data_sets_and_a_licence_of_their_own_are_in_the_metadata():
    facts = Facts("a/b", about(classes("a"), "text"), {}, {}, {"text": None}, 1, "cc-by-4.0", ["org/set"])
    found = metadata_of(model_card(facts))
    assert (found["license"], found["datasets"]) == ("cc-by-4.0", ["org/set"])
    assert "base_model" not in found


def test_the_licence_of_a_cached_model_card_is_read(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--bert" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--bert" / "refs").mkdir()
    (tmp_path / "models--org--bert" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert cached_licence("org/bert") is None
    for content, licence in (("---\nlicense: mit\n---\n# x", "mit"), ("---\ntags: [x]\n---\n", None), ("# x", None)):
        (snapshot / "README.md").write_text(content)
        assert cached_licence("org/bert") == licence


def test_a_model_with_classes_of_other_packages_says_that_loading_imports_them():
    card = card_of(head="my_package.heads.Mine")
    assert "fusion.load(\"hf://ada/shoes\", trusted=['my_package'])" in card
    assert "loading imports my_package, which its classes are part of" in card
    assert "loading executes no code" in card_of()


def test_many_classes_are_counted_and_odd_names_break_no_metadata():
    card = card_of(classes(*map(str, range(500)), "a: b"))
    assert "28, 29 and 471 more" in card
    labels = MultiLabel()
    assert metadata_of(card_of(labels, ("text",)))["tags"][1:] == ["text", "MultiLabel", "Gated"]
    assert markdown([["a", "b"], ["x\ny", "1|2"]]) == "| a | b |\n|---|---|\n| x y | 1\\|2 |"


@pytest.mark.parametrize(
    ("text", "reduced"),
    [
        ("/home/ada/shoes.csv", "shoes.csv"),
        ("~/shoes.csv", "shoes.csv"),
        ("../data/easy_vqa.py", "easy_vqa.py"),
        ("C:\\Users\\ada\\bert\\", "bert"),
        ("\\\\server\\share", "share"),
        ("file:///data/x.csv", "x.csv"),
    ],
)
def test_local_paths_are_reduced_to_their_names(text, reduced):
    assert base_name(text) == reduced
    assert without_paths({"a": [text, 1, None]}) == {"a": [reduced, 1, None]}


@pytest.mark.parametrize("text", ["org/bert", "/", "\\", "~", "N/A", "https://x.org/a.csv", "runs", "fusion.heads.Gated", "a;b", ""])
def test_other_texts_are_left_as_they_are(text):
    assert not is_local(text)
    assert base_name(text) == text


def test_a_relative_path_is_known_by_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/bert").mkdir(parents=True)
    assert base_name("org/bert") == "bert"
    recipe = {"data": {"preparer": {"class_path": "fusion.data.Script", "init_args": {"path": "../data/easy_vqa.py"}}}}
    assert "| data | `easy_vqa.py` |" in card_of(recipe=recipe)
    assert yaml.safe_load(yaml.safe_dump(without_paths(recipe)))["data"]["preparer"]["init_args"] == {"path": "easy_vqa.py"}
