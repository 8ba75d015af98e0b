"""Heads saved alone: every head comes back to the bit, from a folder or a hub, and no code is executed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import serving, use
from small_heads import batch_of, dims_of, every, make
from torch import nn

from fusion.errors import UserError
from fusion.heads import CrossAttention, DualEncoder, FusionHead, Gated, InteractionExperts, LevelWeighted, PerTask

DIMS = {"text": 8, "image": 6}


def features():
    torch.manual_seed(1)
    return {"text": torch.randn(4, 5, 8), "image": torch.randn(4, 3, 6)}


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    assert all(x.dtype == b[name].dtype and torch.equal(x, b[name]) for name, x in a.items())


@every
def test_every_head_comes_back_to_the_bit(name, tmp_path):
    head = make(name)
    head.save_pretrained(tmp_path / "head")
    state = torch.get_rng_state()
    found = FusionHead.from_pretrained(tmp_path / "head")
    assert torch.equal(torch.get_rng_state(), state)
    assert type(found) is type(head)
    assert not found.training
    same(found, head)
    batch = batch_of(dims_of(name))
    with torch.no_grad():
        expected, output = head(batch), found(batch)
    assert torch.equal(output.output, expected.output)
    assert output.by_modality.keys() == expected.by_modality.keys()
    assert found.init_args == json.loads(json.dumps(head.init_args))


@pytest.mark.parametrize(
    "head",
    [
        LevelWeighted({"text": [8, 8, 8], "image": [4, 6]}, 3, dim=8, depths=2),
        InteractionExperts({"text": [8, 8, 8], "image": [4, 6]}, 3, expert="LevelWeighted", expert_args={"depths": 2}, dim=8),
        PerTask(DIMS, 6, heads=[{"head": "Concat", "args": {"dim": 8}, "out_dim": 2}, {"head": "Gated", "args": {}, "out_dim": 4}]),
        DualEncoder(DIMS, 10, matcher="Concat", matcher_args={"dim": 8}),
    ],
    ids=lambda head: type(head).__name__,
)
def test_heads_of_levels_of_tasks_and_of_pairs_come_back_too(head, tmp_path):
    head.save_pretrained(tmp_path)
    found = type(head).from_pretrained(tmp_path)
    same(found, head)
    assert (found.dims, found.level_dims, found.stage) == (head.dims, head.level_dims, head.stage)


def test_a_head_keeps_its_dtypes_and_other_files_of_its_folder(tmp_path):
    head = CrossAttention(DIMS, 3, dim=8, num_heads=2, depth=1, unimodal=True).bfloat16()
    head.classifier.float()
    (tmp_path / "README.md").write_text("mine")
    head.save_pretrained(tmp_path)
    same(CrossAttention.from_pretrained(str(tmp_path)), head)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "format": 1,
        "class": "fusion.heads.CrossAttention",
        "dims": DIMS,
        "out_dim": 3,
        "init_args": {"dim": 8, "num_heads": 2, "depth": 1, "unimodal": True},
    }


def test_a_head_goes_to_a_hub_and_comes_back_to_the_bit(tmp_path, monkeypatch):
    head = CrossAttention(DIMS, 3, dim=8, num_heads=2, depth=1)
    with serving() as hub:
        use(hub, str(tmp_path), monkeypatch)
        page = head.push_to_hub("ada/head", private=True)
        first = hub.commits["ada/head"][-1][0]
        assert page == f"{hub.url}/ada/head/commit/{first}"
        assert hub.private["ada/head"]
        before = head.classifier.bias.detach().clone()
        with torch.no_grad():
            head.classifier.bias += 1
        head.push_to_hub("ada/head", message="Train for longer")
        assert [message for _, message, _ in hub.commits["ada/head"][1:]] == ["Push a fusion head", "Train for longer"]
        found = CrossAttention.from_pretrained("ada/head")
        same(found, head)
        with torch.no_grad():
            assert torch.equal(found(features()).output, head.eval()(features()).output)
        earlier = FusionHead.from_pretrained(f"hf://ada/head@{first}")
        assert torch.equal(earlier.classifier.bias, before)
        with pytest.raises(UserError, match=r"ada/head on http.* has no revision 'v9'; expected a branch, a tag or a commit"):
            FusionHead.from_pretrained("ada/head@v9")
        with pytest.raises(UserError, match="there is no model ada/none on http"):
            FusionHead.from_pretrained("ada/none")
    same(FusionHead.from_pretrained("ada/head"), head)  # from the cache, now that the hub is gone


def test_a_head_of_another_class_is_rejected(tmp_path):
    Gated(DIMS, 3, dim=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a Gated, not a CrossAttention; load it by Gated\.from_pretrained"):
        CrossAttention.from_pretrained(tmp_path)


def spoil(**changes):
    def write(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return write


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "can't read .*config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is no head saved by fusion"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "can't read .*model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "can't read .*model.safetensors"),
        (spoil(format=2), "has format 2, this version of fusion reads 1"),
        (spoil(out_dim=None), "is no head saved by fusion: its config.json lacks"),
        (spoil(**{"class": "fusion.heads.Gatd"}), "unknown head 'fusion.heads.Gatd'"),
        (spoil(**{"class": "os.system"}), "unknown head 'os.system'"),
        (spoil(**{"class": "Gated", "init_args": {"dmi": 8}}), "Gated can't be built from its config.json .*'dmi'"),
        (spoil(init_args={"dim": "8"}), "Gated can't be built from its config.json"),
        (spoil(init_args={"dim": 0}), "dim is 0; expected at least 1"),
        (spoil(out_dim=4), r"has \(3,\) for .*bias, a Gated of its config.json \(4,\)|has \(3, 8\) for classifier.weight"),
        (spoil(init_args={"dim": 8, "unimodal": True}), "has nothing for unimodal.text.weight"),
    ],
)
def test_a_spoilt_head_is_rejected_in_one_line(change, message, tmp_path):
    Gated(DIMS, 3, dim=8).save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        FusionHead.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "a/b@", "hf://a", "../heads"])
def test_what_is_neither_folder_nor_hub_name_is_rejected(source):
    with pytest.raises(UserError, match=r"there is no folder .*, nor is that a model on a hub \(USER/NAME or USER/NAME@REVISION\)"):
        FusionHead.from_pretrained(source)


def test_heads_that_could_not_be_rebuilt_are_not_saved(tmp_path):
    class Local(Gated):
        pass

    changed = Gated(DIMS, 3, dim=8)
    changed.classifier = nn.Linear(8, 5)
    with pytest.raises(UserError, match=r"its class .*Local can't be imported; define it at the top of a module"):
        Local(DIMS, 3, dim=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has classifier.weight of shape \(3, 8\), this head \(5, 8\)"):
        changed.save_pretrained(tmp_path)
    odd = Gated(DIMS, 3, dim=8)
    odd.init_args["dim"] = nn.Linear(1, 1)
    with pytest.raises(UserError, match="the arguments of Gated must be plain data"):
        odd.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't save the head to .*file"):
        Gated(DIMS, 3, dim=8).save_pretrained(tmp_path / "file")


MODULE = """
import pathlib
from fusion.heads import Gated
pathlib.Path(__file__).with_name("executed").touch()
class Mine(Gated):
    pass
"""


@pytest.mark.parametrize("within", [False, True], ids=["head", "expert"])
def test_a_class_outside_fusion_is_found_only_if_imported_or_trusted(within, tmp_path, monkeypatch):
    package, saved = f"package_of_{within}", tmp_path / "saved"
    (tmp_path / package).mkdir()
    (tmp_path / package / "heads.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    head = InteractionExperts(DIMS, 3, dim=8, expert="Gated") if within else Gated(DIMS, 3, dim=8)
    head.save_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    if within:
        config["init_args"]["expert"] = f"{package}.heads.Mine"
    else:
        config["class"] = f"{package}.heads.Mine"
    (saved / "config.json").write_text(json.dumps(config))
    executed = tmp_path / package / "executed"
    for trusted in ([], [package[:-1]], [f"{package}.head"]):
        with pytest.raises(UserError, match=rf"import {package}.heads before, or load with trusted=\['{package}'\]"):
            FusionHead.from_pretrained(saved, trusted=trusted)
    assert not executed.exists()
    found = FusionHead.from_pretrained(saved, trusted=[package])
    assert executed.exists()
    assert type(found.experts["synergy"] if within else found).__name__ == "Mine"
    same(FusionHead.from_pretrained(saved), found)  # its module is imported by now


def test_importing_the_heads_loads_no_library_of_files_or_hubs():
    program = "import sys, fusion.heads; print([n for n in ('safetensors', 'huggingface_hub', 'fusion.heads.saved') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"
