"""Starting from another run's weights: rows of tokens and classes are taken for the same tokens and classes, or listed."""

import pytest
import torch
from tiny_world import BERT

from fusion.data.kinds import TextInput
from fusion.data.processor import Processor
from fusion.encoders import TransformersText
from fusion.heads import available
from fusion.heads.registry import HEADS
from fusion.model import FusionModel
from fusion.processing.tokenizer import Tokenizer
from fusion.runs.bundle import FORMAT
from fusion.tasks import Classification
from fusion.training.weights import load_weights

HERE = ["a red circle", "a blue square", "is it green or jumpy"]
THERE = ["is it blue", "a green circle", "a square of red"]  # as many tokens, most of them the same, in another order


def tokenizer_of(texts):
    return Tokenizer.train(texts, vocab_size=100, max_length=8)


def processor_of(tokenizer, task):
    text = TextInput()
    if tokenizer is not None:
        text.tokenizer = tokenizer
    return Processor({} if tokenizer is None else {"text": text}, task)


def knowing(classes):
    """The task of telling these classes."""
    task = Classification()
    task.set_learnt({"names": list(classes)})
    return task


# Two text encoders stand for any two modalities.
def model_of(classes, head="Concat", tokenizer=None, seed=0):
    torch.manual_seed(seed)
    encoders = {"text": TransformersText(config=BERT), "other": TransformersText(config=BERT)}
    if tokenizer is not None:
        encoders["text"].fit_vocabulary(tokenizer.vocab_size)
    return FusionModel.build(encoders, HEADS[head], len(classes))


@pytest.fixture
def saved(tmp_path):
    """Writes a run's checkpoint of a model, as far as starting from it reads it."""

    def save(model, processor):
        torch.save(
            {
                "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
                "fusion": {"format": FORMAT, "processor": processor.state()},
            },
            tmp_path / "best.ckpt",
        )
        return tmp_path / "best.ckpt"

    return save


def test_embeddings_are_carried_over_by_token(saved):
    here, there = tokenizer_of(HERE), tokenizer_of(THERE)
    before, now = model_of("ab", tokenizer=there), model_of("ab", tokenizer=here, seed=1)
    fresh = now.encoders["text"].embedding.weight.detach().clone()
    told = load_weights(now, saved(before, processor_of(there, knowing(["a", "b"]))), processor_of(here, knowing(["a", "b"])))
    old, ids, new_ids = before.encoders["text"].embedding.weight, there.backend.get_vocab(), here.backend.get_vocab()
    both = ids.keys() & new_ids.keys()
    moved = [token for token in both if ids[token] != new_ids[token]]
    assert len(moved) > 5
    assert new_ids.keys() - both
    for token, row in new_ids.items():
        expected = old[ids[token]] if token in both else fresh[row]
        assert torch.equal(now.encoders["text"].embedding.weight[row], expected), token
    assert f"rows of {len(both)} of {len(new_ids)} tokens are loaded by name" in told
    # What is no token's is taken as it is.
    positions = "encoders.text.body.embeddings.position_embeddings.weight"
    assert torch.equal(now.state_dict()[positions], before.state_dict()[positions])


@pytest.mark.parametrize("head", available())
def test_rows_of_classes_are_carried_over_by_name_in_every_head(saved, head):
    was, now_classes = ["blue", "green", "red"], ["apple", "green", "blue"]
    before, now = model_of(was, head), model_of(now_classes, head, seed=1)
    fresh = {name: value.clone() for name, value in now.state_dict().items()}
    told = load_weights(now, saved(before, processor_of(None, knowing(was))), processor_of(None, knowing(now_classes)))
    assert "rows of 2 of 3 classes are loaded by name; 1 newly initialised: apple" in told
    old, new = before.state_dict(), now.state_dict()
    layers = {module.weight: module for module in now.head.output_layers()}
    checked = 0
    for name, parameter in now.named_parameters():
        if parameter in layers:
            assert torch.equal(new[name][1], old[name][1])
            assert torch.equal(new[name][2], old[name][0])
            assert torch.equal(new[name][0], fresh[name][0])
            checked += 1
        elif not any(parameter is layer.bias for layer in layers.values()) and name != "head.mix.0.weight":
            assert torch.equal(new[name], old[name]), name
    assert checked
    if head == "Stacking":  # its network reads all decisions side by side
        assert torch.equal(new["head.mix.0.weight"], fresh["head.mix.0.weight"])
        assert "1 not separable by class: head.mix.0.weight" in told


def test_classes_in_the_same_order_and_the_same_tokens_say_nothing_of_rows(saved):
    processor = processor_of(tokenizer_of(HERE), knowing(["a", "b"]))
    before, now = (
        model_of("ab", tokenizer=processor.inputs["text"].tokenizer),
        model_of("ab", tokenizer=processor.inputs["text"].tokenizer, seed=1),
    )
    told = load_weights(now, saved(before, processor), processor)
    assert told.count("\n") == 0
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), now.state_dict().values(), strict=True))


def test_a_file_of_weights_alone_says_that_it_names_no_tokens_or_classes(tmp_path):
    before, now = model_of("ab"), model_of("ab", seed=1)
    torch.save(before.state_dict(), tmp_path / "weights.pt")
    assert "has no names of tokens or classes" in load_weights(now, tmp_path / "weights.pt", processor_of(None, knowing(["a", "b"])))


def test_a_checkpoint_of_an_older_version_gives_its_weights_by_their_names(tmp_path):
    before, now = model_of("ab"), model_of("ab", seed=1)
    held = {"state_dict": {f"model.{name}": value for name, value in before.state_dict().items()}}
    torch.save(
        held | {"fusion": {"format": 5, "processor": {"image": None, "tokenizer": None, "classes": ["a", "b"]}}}, tmp_path / "old.ckpt"
    )
    told = load_weights(now, tmp_path / "old.ckpt", processor_of(None, knowing(["a", "b"])))
    assert "has no names of tokens or classes" in told
    assert all(torch.equal(a, b) for a, b in zip(now.state_dict().values(), before.state_dict().values(), strict=True))
