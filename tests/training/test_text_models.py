"""Pretrained text models as they are found, stored in half precision or with a tokenizer that doesn't fit: from folder to predictions."""

from functools import partial

import numpy as np
import pytest
import tokenizers
import torch
from tiny_world import BERT, train
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fusion.data import FusionData
from fusion.encoders import TimmImage, TransformersText
from fusion.errors import UserError
from fusion.heads import Gated
from fusion.predictor import Predictor
from fusion.training import Engine
from fusion.training.callbacks.plan import Plan

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, "is", "there", "a", "red", "blue", "?"]


@pytest.fixture
def text_folder(tmp_path):
    """A folder with a BERT and a tokenizer of these words; `greatest` is the id of the last."""

    def make(dtype=torch.float32, embeddings=30, words=WORDS, greatest=None):
        folder = tmp_path / "text"
        torch.manual_seed(0)
        BertModel(BertConfig(**{key: value for key, value in BERT.items() if key != "model_type"} | {"vocab_size": embeddings})).to(
            dtype
        ).save_pretrained(folder)
        ids = {word: i for i, word in enumerate(words)}
        ids[words[-1]] = len(words) - 1 if greatest is None else greatest
        backend = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        pad = {"pad_token": "[PAD]"} if "[PAD]" in words else {}
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **pad).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def made(write_manifest, tmp_path):
    """(task, data) of the tiny world with this text encoder."""

    def make(folder, change=lambda i, row: row, *, max_length=64, adapters=None, freeze=None, **options):
        torch.manual_seed(0)
        manifest = str(write_manifest(change))
        data = FusionData(manifest, cache=str(tmp_path / "cache"), batch_size=16, num_workers=0, max_length=max_length)
        image = partial(TimmImage, "test_vit", pretrained=False, image_size=32)
        text = partial(TransformersText, folder, **options) if folder else partial(TransformersText, **options)
        return Engine(image=image, text=text, head=partial(Gated, dim=8), adapters=adapters, freeze=freeze), data

    return make


def assert_same_predictions_from_a_checkpoint(trainer, task, data, tmp_path):
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    table = data.splits["test"].table
    predictor = Predictor.load(tmp_path / "run.ckpt", device="cpu")
    expected = Predictor(task.model, task.processor).predict(table.inputs["image"], table.inputs["text"])
    assert np.array_equal(predictor.predict(table.inputs["image"], table.inputs["text"]).probabilities, expected.probabilities)
    return predictor


def weights(model):
    return {p.dtype for p in model.encoders["text"].parameters()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_model_stored_in_half_precision_trains_in_float32_and_its_plan_has_nothing_to_say_of_it(
    text_folder, made, tmp_path, capsys, stored, precision
):
    task, data = made(text_folder(stored))
    trainer = train(task, data, callbacks=[Plan()], precision=precision)
    assert weights(task.model) == {torch.float32}
    assert "float16" not in capsys.readouterr().out.partition("precision")[0]
    assert weights(assert_same_predictions_from_a_checkpoint(trainer, task, data, tmp_path).model) == {torch.float32}


def test_half_precision_that_is_asked_for_is_trained_and_loaded_in_it_and_the_plan_says_so(text_folder, made, tmp_path, capsys):
    task, data = made(text_folder(), dtype="bfloat16")
    trainer = train(task, data, callbacks=[Plan()])
    assert weights(task.model) == {torch.bfloat16}
    assert "bfloat16 weights, trained without float32 copies: small updates are lost" in capsys.readouterr().out
    assert weights(assert_same_predictions_from_a_checkpoint(trainer, task, data, tmp_path).model) == {torch.bfloat16}


def test_frozen_half_precision_weights_are_in_the_plan_too(text_folder, made, capsys):
    task, data = made(text_folder(), dtype="float16", frozen=True)
    train(task, data, callbacks=[Plan()])
    told = capsys.readouterr().out
    assert "frozen, float16 weights\n" in told
    assert "small updates" not in told


def test_float16_weights_that_would_learn_are_rejected_before_training(text_folder, made):
    task, data = made(text_folder(), dtype="float16")
    with pytest.raises(UserError, match=r"is float16, in which it can't be trained; expected --model\.text\.dtype=float32 or bfloat16"):
        task.build(data)


def test_adapters_of_a_half_precision_encoder_learn_in_float32(text_folder, made, tmp_path):
    task, data = made(text_folder(), dtype="float16", adapters={"text": {"r": 2, "target_modules": ["query"]}})
    trainer = train(task, data)
    text = task.model.encoders["text"]
    assert {p.dtype for p in text.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in text.parameters() if not p.requires_grad} == {torch.float16}
    moved = [p for name, p in text.named_parameters() if "lora_B" in name]
    assert moved
    assert all(p.abs().sum() > 0 for p in moved)
    assert_same_predictions_from_a_checkpoint(trainer, task, data, tmp_path)


@pytest.mark.parametrize(("words", "greatest", "ids"), [(40, None, 40), (10, 34, 35)], ids=["too many", "ids left out"])
def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings_is_rejected_at_load_or_gets_more(
    text_folder, made, tmp_path, words, greatest, ids
):
    words = [*WORDS[:9], *(f"w{i}" for i in range(words - 10)), "?"]
    folder = text_folder(words=words, greatest=greatest)
    task, data = made(folder)
    with pytest.raises(UserError, match=f"has ids up to {ids - 1}, the model 30 embeddings"):
        task.build(data)
    task, data = made(folder, resize_embeddings=True)
    trainer = train(task, data)
    assert task.model.encoders["text"].vocab_size == ids
    assert_same_predictions_from_a_checkpoint(trainer, task, data, tmp_path)


def test_a_padding_id_outside_the_embeddings_is_rejected(text_folder, made):
    task, data = made(text_folder(embeddings=9, words=["[UNK]", "is", "[CLS]", "[SEP]", "there", "a", "red", "blue", "?", "[PAD]"]))
    with pytest.raises(UserError, match="has ids up to 9, the model 9 embeddings"):
        task.build(data)


def test_a_tokenizer_without_a_padding_token_trains_as_padding_is_masked(text_folder, made, tmp_path):
    task, data = made(text_folder(words=["is", "[UNK]", "[CLS]", "[SEP]", "there", "a", "red", "?"]))
    trainer = train(task, data)
    assert_same_predictions_from_a_checkpoint(trainer, task, data, tmp_path)


def test_texts_are_cut_at_the_positions_that_the_model_has(text_folder, made):
    task, data = made(text_folder(), lambda i, row: row | {"text": "is there " * 40}, max_length=64)
    train(task, data)
    assert data.processor.inputs["text"].tokenizer.max_length == BERT["max_position_embeddings"] < 64
    assert data.splits["train"].samples.stores["text"].tokens.cut == len(data.splits["train"].table)


def test_the_plan_tells_the_share_of_unknown_tokens_of_each_split(text_folder, made, capsys):
    task, data = made(text_folder(), lambda i, row: row | {"text": "is there a ж" if row["split"] == "val" else "is there a red"})
    train(task, data, callbacks=[Plan()])
    told = capsys.readouterr().out
    assert told.count("are unknown to the tokenizer") == 1
    assert "25.0% of the tokens are unknown to the tokenizer" in told.partition("  val ")[2].partition("  test ")[0]


def test_a_run_of_many_characters_keeps_to_its_vocabulary_and_tells_what_it_does_not_know(made, capsys):
    character = np.random.default_rng(0).integers(0x4E00, 0x4E00 + 3000, (200, 20))
    task, data = made(None, lambda i, row: row | {"text": "".join(map(chr, character[i % 200]))}, config=BERT)
    train(task, data, callbacks=[Plan()])
    assert data.processor.inputs["text"].tokenizer.vocab_size <= BERT["vocab_size"]
    assert "of the tokens are unknown to the tokenizer" in capsys.readouterr().out
