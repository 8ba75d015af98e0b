"""Tokenizers with less than their whole vocabulary read the texts they were trimmed to as before, and any other text in shorter pieces."""

import string

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import BertConfig

from fusion.encoders import Texts, TransformersText
from fusion.errors import UserError
from fusion.processing.tokenizer import Tokenizer
from fusion.processing.vocabulary import trimmed

WORDS = ["red", "blue", "circle", "cir", "##cle", "##ue", "square", "[SEP]", "is", "it", "?"]
TOKENS = ["[PAD]", "[unused]", "[UNK]", "[CLS]", *WORDS, *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase)]
IDS = {token: i for i, token in enumerate(TOKENS)}
BERT = processors.BertProcessing(("[SEP]", IDS["[SEP]"]), ("[CLS]", IDS["[CLS]"]))
TEMPLATE = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", IDS["[CLS]"]), ("[SEP]", IDS["[SEP]"])])
SEVERAL = processors.Sequence([processors.ByteLevel(), TEMPLATE])


def word_pieces(processor=BERT):
    backend = tokenizers.Tokenizer(models.WordPiece(IDS, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processor
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return Tokenizer(backend, pad_id=0, max_length=16)


@pytest.mark.parametrize("processor", [BERT, TEMPLATE, SEVERAL], ids=["bert", "template", "sequence"])
def test_texts_are_divided_as_before_and_ids_are_those_of_the_same_tokens(processor):
    whole, texts = word_pieces(processor), ["red circles?", "is it blue"]
    less, rows = trimmed(whole, texts)
    assert less.vocab_size == len(rows) < whole.vocab_size
    assert {"square", "[unused]"} & less.backend.get_vocab().keys() == set()
    assert less.backend.token_to_id("[MASK]") is not None
    for text in [*texts, "blue red?"]:
        before, after = whole.backend.encode(text), less.backend.encode(text)
        assert after.tokens == before.tokens
        assert [rows[i] for i in after.ids] == before.ids
    assert less.pad_id == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet=string.ascii_lowercase + " ?é", max_size=12), max_size=4), st.text(max_size=20))
def test_no_text_has_unknown_tokens_that_it_had_not_before(texts, other):
    whole = word_pieces()
    less, rows = trimmed(whole, texts)
    assert less.backend.encode(other).tokens.count("[UNK]") == whole.backend.encode(other).tokens.count("[UNK]")
    assert [rows[i] for text in texts for i in less.backend.encode(text).ids] == [i for t in texts for i in whole.backend.encode(t).ids]


def test_a_trimmed_tokenizer_is_rebuilt_from_its_state_and_trimmed_again_without_any_change():
    less, rows = trimmed(word_pieces(), ["red"])
    again, same = trimmed(Tokenizer.from_state(less.state()), ["red"])
    assert again.state() == less.state()
    assert same == list(range(len(rows)))


def test_other_tokenizers_are_rejected():
    with pytest.raises(UserError, match="the tokenizer of x is of type BPE, whose vocabulary can't be trimmed; expected WordPiece"):
        trimmed(Tokenizer.train(["a red square"], vocab_size=50, max_length=8), ["red"], "the tokenizer of x")


def test_an_encoder_keeps_the_embeddings_of_the_tokens_that_are_left():
    config = BertConfig(vocab_size=len(TOKENS) + 1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    encoder = TransformersText(config=config.to_dict()).eval()
    whole = word_pieces()
    less, rows = trimmed(whole, ["red circles?"])
    before = read(encoder, whole, "red circles?")
    encoder.keep_tokens(rows)
    assert torch.equal(read(encoder, less, "red circles?"), before)
    assert encoder.vocab_size == encoder.spec()["config"]["vocab_size"] == len(rows)
    rebuilt = TransformersText(**encoder.spec())
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(read(rebuilt.eval(), less, "red circles?"), before)


@torch.no_grad()
def read(encoder, tokenizer, text):
    ids = torch.tensor([tokenizer.backend.encode(text).ids])
    return encoder(Texts(ids, torch.ones_like(ids).bool())).pooled


def test_a_padding_token_that_would_get_another_id_is_rejected():
    encoder = TransformersText(
        config={"model_type": "bert", "vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2, "pad_token_id": 3}
    )
    with pytest.raises(UserError, match="its padding token has the id 3, which must stay the same"):
        encoder.keep_tokens([0, 1, 3, 5])


def test_a_model_from_scratch_has_nothing_to_trim():
    with pytest.raises(UserError, match="trim_vocabulary is for pretrained models"):
        TransformersText(config={"model_type": "bert"}, trim_vocabulary=True)
