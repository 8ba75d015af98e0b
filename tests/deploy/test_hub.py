"""Runs go to a hub and come back, by huggingface_hub's own client; nothing is executed, and every mistake is one line."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
import yaml
from fake_hub import environment, serving, use
from PIL import Image

import fusion
from fusion.cli.evaluate import evaluate
from fusion.cli.predict import predict
from fusion.cli.push import push
from fusion.deploy.hub import load_from_hub, push_run
from fusion.errors import UserError

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "data.preparer.scenes": 150,
    "data.preparer.questions_per_scene": 4,
    "data.batch_size": 64,
    "model.head": "Concat",
    "model.head.dim": 16,
    "trainer.max_epochs": 1,
    "trainer.accelerator": "cpu",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return fusion.fit("quickstart", OPTIONS | {"data.cache": str(folder / "cache")}, runs=folder / "runs").folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "shapes" / "first"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving() as served:
        use(served, str(tmp_path / "hub_cache"), monkeypatch)
        yield served


@pytest.fixture
def samples(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(4)]
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    for path, pixels in zip(paths, images, strict=True):
        Image.fromarray(pixels).save(path)
    return {"images": [*paths, None], "texts": ["is there a red circle", "what colour is the cross", None, "is there a", "is it blue"]}


def test_a_run_is_pushed_and_its_model_comes_back_to_the_bit(run, hub, samples, capsys):
    expected = fusion.load(str(run)).predict(**samples).values
    assert push(["--run", str(run), "--to", "ada/shapes", "--private", "--message", "First try"]) == 0
    printed = capsys.readouterr().out
    ((_, _, _), (commit, message, files)) = hub.commits["ada/shapes"]
    assert f"{hub.url}/ada/shapes/commit/{commit}" in printed
    assert 'fusion.load("hf://ada/shapes")' in printed
    assert "licence  unknown (--license sets it)" in printed
    assert message == "First try"
    assert hub.private["ada/shapes"]
    assert set(files) == {".gitattributes", "README.md", "checksums.json", "model.json", "model.safetensors", "recipe.yaml"}
    assert files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert json.loads(files["model.json"]) == json.loads((run / "model" / "model.json").read_text())
    loaded = fusion.load("hf://ada/shapes")
    assert not loaded.model.training
    assert np.array_equal(loaded.predict(**samples).values, expected)


@pytest.mark.slow
def test_the_command_and_a_fresh_interpreter_without_lightning_do_the_same(run, hub, samples, tmp_path):
    def python(*words):
        variables = os.environ | environment(hub, str(tmp_path / "other_cache")) | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=200, env=variables, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "pushed   http://127" in python(str(ROOT / "scripts/push.py"), "--run", str(run), "--to", "ada/shapes")
    program = """
import json, sys, fusion
found = fusion.load("hf://ada/shapes").predict(**json.loads(sys.argv[1]))
print(found.values.tobytes().hex(), [n for n in ("lightning", "jsonargparse", "fusion.training") if n in sys.modules])
"""
    expected = fusion.load(str(run)).predict(**samples).values
    assert python("-c", program, json.dumps(samples)) == f"{expected.tobytes().hex()} []\n"


def test_the_recipe_is_shared_without_local_paths(run, hub, tmp_path):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert str(tmp_path.parent) in json.dumps(recipe)
    recipe["data"]["manifest"] = "~/private/shoes.csv"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    about = json.loads((run / "model/model.json").read_text())
    about["encoders"]["text"]["init"]["config"]["_name_or_path"] = f"{tmp_path}/private/bert"
    (run / "model/model.json").write_text(json.dumps(about))
    push_run(run, "ada/shapes")
    _, message, files = hub.commits["ada/shapes"][-1]
    assert message == "Push the run shapes/first"
    for name in ("README.md", "model.json", "recipe.yaml"):
        assert str(tmp_path) not in files[name].decode()
        assert "private" not in files[name].decode()
    shared = yaml.safe_load(files["recipe.yaml"])
    assert shared["data"]["manifest"] == "shoes.csv"
    assert shared["data"]["cache"] == "cache"
    kept = recipe | {"data": recipe["data"] | {"manifest": "shoes.csv", "cache": "cache"}, "runs": "runs"}
    assert shared == kept


def test_the_card_has_metadata_that_the_client_reads_and_the_runs_own_figures(run, hub):
    fusion.Run(run).push("ada/shapes", licence="mit")
    card = huggingface_hub.ModelCard.load("ada/shapes")
    assert card.data.to_dict() == {
        "license": "mit",
        "library_name": "fusion",
        "pipeline_tag": "visual-question-answering",
        "tags": ["fusion", "multimodal", "image", "text", "Classification", "Concat"],
    }
    results = json.loads((run / "results.json").read_text())
    test = results["test"]
    assert f"On the test split, {results['test_samples']:,} samples" in card.text
    assert results["test_samples"] == fusion.Run(run).evaluate()["all"]["samples"]
    figures = " | ".join(f"{test[name]:.4f}" for name in ("accuracy", "balanced_accuracy", "f1_macro"))
    assert f"| **this model** | {figures} |" in card.text
    for title, name in (("upper bound (image only)", "image"), ("upper bound (text only)", "text"), ("majority class", "majority")):
        assert f"| {title} | {test[f'ceiling_{name}']:.4f} |  |  |" in card.text


def test_a_revision_is_loaded_and_later_pushes_replace_the_model(run, hub, samples):
    first = push_run(run, "ada/shapes").page.rpartition("/")[2]
    hub.tags["ada/shapes"] = {"v1": first}
    before = fusion.load("hf://ada/shapes").predict(**samples).values
    about = json.loads((run / "model/model.json").read_text())
    names = about["processor"]["task"]["learnt"]["names"]
    about["processor"]["task"]["learnt"]["names"] = names[::-1]
    (run / "model/model.json").write_text(json.dumps(about))
    push_run(run, "ada/shapes")
    assert fusion.load("hf://ada/shapes").predict(**samples).classes == names[::-1]
    for revision in ("v1", first):
        found = fusion.load(f"hf://ada/shapes@{revision}").predict(**samples)
        assert found.classes == names
        assert np.array_equal(found.values, before)


def test_predict_takes_a_model_of_a_hub(run, hub, samples, tmp_path):
    push_run(run, "ada/shapes")
    lines = [f"{image or ''},{text or ''}" for image, text in zip(*samples.values(), strict=True)]
    (tmp_path / "new.csv").write_text("\n".join(["image,text", *lines]) + "\n")
    written = []
    for source in (str(run), "hf://ada/shapes"):
        out = tmp_path / f"{len(written)}.csv"
        assert predict(["--run", source, "--manifest", str(tmp_path / "new.csv"), "--out", str(out)]) == 0
        written.append(out.read_text())
    assert written[0] == written[1]
    with pytest.raises(UserError, match="there is no model ada/none"):
        predict(["--run", "hf://ada/none", "--manifest", str(tmp_path / "new.csv"), "--out", str(tmp_path / "2.csv")])
    one_line("evaluate scores run folders, and a hub has the model alone", evaluate, ["--run", "hf://ada/shapes"])


# Mistakes


def one_line(message, call, *arguments, **options):
    with pytest.raises(UserError, match=message) as raised:
        call(*arguments, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["shapes", "ada/", "ada/b/c", "/shapes", "ada/a b", "hf://ada/shapes", ""])
def test_a_name_that_is_none_is_rejected_before_anything_is_sent(name, run, hub):
    one_line("is no name of a model on a hub; expected USER/NAME", push_run, run, name)
    assert hub.calls == []


@pytest.mark.parametrize("name", ["hf://shapes", "hf://", "hf://a/b/c", "hf://a/b@"])
def test_a_hub_address_that_is_none_is_rejected(name, hub):
    one_line("is no model of a hub; expected hf://USER/NAME or hf://USER/NAME@REVISION", fusion.load, name)
    assert hub.calls == []


def test_a_run_without_a_model_is_rejected_before_anything_is_sent(run, hub, tmp_path):
    shutil.rmtree(run / "model")
    one_line(r"has no model/model.json: it was stopped .*fusion fit --resume", push_run, run, "ada/shapes")
    one_line("has no recipe.yaml; expected the run folder printed by fit", push_run, tmp_path, "ada/shapes")
    one_line("there is no run .*nowhere", push_run, tmp_path / "nowhere", "ada/shapes")
    assert hub.calls == []


def test_a_corrupt_model_is_not_pushed(run, hub):
    (run / "model/model.safetensors").write_bytes(b"torn")
    one_line(r"can't read .*model.safetensors", push_run, run, "ada/shapes")
    (run / "results.json").write_text("{")
    one_line("its recipe or results can't be read", push_run, run, "ada/shapes")
    assert hub.calls == []


@pytest.mark.parametrize(
    ("token", "message"),
    [(None, r"can't push ada/shapes: not logged in to http.*hf auth login.*HF_TOKEN"), ("hf_wrong", "http.* rejects the token: log in")],
)
def test_a_push_needs_a_login(token, message, run, hub, monkeypatch):
    use(hub, huggingface_hub.constants.HF_HUB_CACHE, monkeypatch, token=token)
    one_line(message, push_run, run, "ada/shapes")
    assert hub.commits == {}


def test_a_push_to_somebody_else_is_rejected(run, hub):
    one_line("does not allow this account to write to bob/shapes; push to a name of your own", push_run, run, "bob/shapes")


def test_a_private_push_to_a_public_model_is_rejected(run, hub):
    push_run(run, "ada/shapes")
    count = len(hub.commits["ada/shapes"])
    one_line("ada/shapes exists and is public; make it private", push_run, run, "ada/shapes", private=True)
    assert len(hub.commits["ada/shapes"]) == count


def test_a_model_or_revision_that_is_not_there_is_named(run, hub, monkeypatch):
    push_run(run, "ada/shapes", private=True)
    one_line("there is no model ada/none on http.*, or it is private", fusion.load, "hf://ada/none")
    one_line("ada/shapes on http.* has no revision 'v2'; expected a branch", fusion.load, "hf://ada/shapes@v2")
    use(hub, huggingface_hub.constants.HF_HUB_CACHE + "2", monkeypatch, token=None)
    one_line("there is no model ada/shapes on http.*, or it is private: if so, log in", fusion.load, "hf://ada/shapes")


def test_without_a_network_the_cache_is_used_or_the_hub_named(run, tmp_path, monkeypatch, samples):
    with serving() as hub:
        use(hub, str(tmp_path / "hub_cache"), monkeypatch)
        push_run(run, "ada/shapes")
        expected = fusion.load("hf://ada/shapes").predict(**samples).values
    assert np.array_equal(fusion.load("hf://ada/shapes").predict(**samples).values, expected)
    one_line(r"can't reach ada/other on http.*, nor is it in the cache", fusion.load, "hf://ada/other")
    one_line(r"can't reach ada/shapes on http", push_run, run, "ada/shapes")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert np.array_equal(fusion.load("hf://ada/shapes").predict(**samples).values, expected)
    one_line(r"can't reach ada/other on http.* \(HF_HUB_OFFLINE is set\), nor is it in the cache", fusion.load, "hf://ada/other")


def altered(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_file_that_was_altered_by_one_bit_is_rejected(name, run, hub):
    push_run(run, "ada/shapes")
    content = hub.commits["ada/shapes"][-1][2][name]
    position = len(content) - 100 if name.endswith("safetensors") else content.index(b"fusion.heads") + 3
    hub.alter("ada/shapes", name, altered(content, position))
    one_line(f"{name} was altered since it was pushed, by its checksum", fusion.load, "hf://ada/shapes")


def test_a_repository_that_fusion_has_not_pushed_is_rejected(run, hub):
    push_run(run, "ada/shapes")
    files = hub.commits["ada/shapes"][-1][2]
    del files["checksums.json"], files["model.json"]
    one_line(r"hf://ada/shapes has no model.json and no checksums.json: it was not pushed by fusion", fusion.load, "hf://ada/shapes")
    files |= {"checksums.json": b"{", "model.json": b"{}"}


# Code

EVIL = """
from fusion.heads import Concat
import pathlib
pathlib.Path(__file__).with_name("executed").touch()
class Mine(Concat):
    pass
"""


def push_about(run, hub, change):
    """Pushes the run with another model.json, and its checksum, as somebody might who wants to execute code."""
    push_run(run, "ada/shapes")
    files = hub.commits["ada/shapes"][-1][2]
    about = json.loads(files["model.json"])
    change(about)
    files["model.json"] = json.dumps(about).encode()
    sums = json.loads(files["checksums.json"]) | {"model.json": hashlib.sha256(files["model.json"]).hexdigest()}
    files["checksums.json"] = json.dumps(sums).encode()


def test_a_class_outside_fusion_is_imported_only_if_trusted(run, hub, tmp_path, monkeypatch):
    (tmp_path / "evil_heads").mkdir()
    (tmp_path / "evil_heads" / "mine.py").write_text(EVIL)
    monkeypatch.syspath_prepend(tmp_path)
    executed = tmp_path / "evil_heads" / "executed"
    push_about(run, hub, lambda about: about["head"].update({"class": "evil_heads.mine.Mine"}))
    refused = r"evil_heads.mine.Mine is not part of fusion: .* import evil_heads.mine before, or load with trusted=\['evil_heads'\]"
    one_line(refused, fusion.load, "hf://ada/shapes")
    one_line(refused, fusion.load, "hf://ada/shapes", trusted=["evil", "evil_heads.other"])
    assert not executed.exists()
    assert type(fusion.load("hf://ada/shapes", trusted=["evil_heads"]).model.head).__name__ == "Mine"
    assert executed.exists()
    assert type(fusion.load("hf://ada/shapes").model.head).__name__ == "Mine"  # its module is imported by now


@pytest.mark.parametrize("part", ["encoder", "task", "input"])
def test_no_part_of_a_model_imports_a_module_of_its_choice(part, run, hub, tmp_path, monkeypatch):
    name = f"evil_{part}"
    (tmp_path / f"{name}.py").write_text(EVIL)
    monkeypatch.syspath_prepend(tmp_path)

    def change(about):
        spec = {"encoder": about["encoders"]["text"], "task": about["processor"]["task"], "input": about["processor"]["inputs"]["text"]}[
            part
        ]
        spec["class"] = f"{name}.Mine"

    push_about(run, hub, change)
    one_line(f"{name}.Mine is not part of fusion", fusion.load, "hf://ada/shapes")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        (
            lambda about: about["encoders"]["text"]["init"]["config"].update(_attn_implementation="evil/kernel"),
            "config._attn_implementation",
        ),
        (lambda about: about["encoders"]["text"]["init"]["config"].update(auto_map={"AutoModel": "evil.X"}), "config.auto_map"),
        (lambda about: about["encoders"]["text"]["init"].update(attention="evil/kernel"), "encoders.text.attention"),
        (lambda about: about["encoders"]["text"]["init"].update(name_or_path="evil/model"), "encoders.text.name_or_path"),
        (lambda about: about["encoders"]["image"]["init"].update(pretrained=True), "encoders.image.pretrained"),
        (lambda about: about["encoders"]["image"]["init"].update(name="hf-hub:evil/model"), "encoders.image.name"),
        (lambda about: about["encoders"]["image"]["init"]["options"].update(checkpoint_path="/x.pt"), "options.checkpoint_path"),
        (lambda about: about.update(adapters={"text": {"megatron_config": {}, "megatron_core": "os"}}), "adapters.text.megatron_core"),
    ],
)
def test_settings_that_could_fetch_or_execute_code_are_rejected(change, setting, run, hub):
    push_about(run, hub, change)
    one_line(f"its model.json sets .*{re.escape(setting)}, which could execute code or fetch other files", load_from_hub, "hf://ada/shapes")


def test_a_model_json_without_encoders_is_rejected(run, hub):
    push_about(run, hub, lambda about: about.pop("encoders"))
    one_line("its model.json has no encoders: it was not written by fusion", fusion.load, "hf://ada/shapes")
