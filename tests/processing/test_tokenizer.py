"""Texts to token ids and back to the same tokenizer."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fusion.data.kinds.text import batch_texts
from fusion.data.pretrained_tokenizer import pretrained_tokenizer
from fusion.errors import UserError
from fusion.processing.tokenizer import SPECIAL, Tokenizer

TEXTS = [f"is there a {colour} {shape}?" for colour in ("red", "blue", "green") for shape in ("circle", "square", "cross")]
PAD, UNK, CLS, SEP = range(4)


def trained(max_length=16, vocab_size=200):
    return Tokenizer.train(TEXTS, vocab_size=vocab_size, max_length=max_length)


def rows(tokenizer, texts):
    store = tokenizer.encode(texts)
    return [store.ids[a:b].tolist() for a, b in zip(store.offsets, store.offsets[1:], strict=False)]


def test_training_twice_gives_the_same_tokenizer():
    # Every pair of letters occurs once, so that each merge is a tie that a hash order could break.
    ties = [f"{a}{b}" for a in "abcdefghijkl" for b in "mnopqrstuvwx"]
    made = {Tokenizer.train(ties, vocab_size=120, max_length=8).backend.to_str() for _ in range(5)}
    assert len(made) == 1


def test_padding_has_the_id_that_encoders_expect():
    tokenizer = trained()
    assert tokenizer.pad_id == 0
    assert [tokenizer.backend.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3]


def test_vocabulary_is_no_larger_than_asked():
    most = trained(vocab_size=1000).vocab_size
    for asked in (40, most - 5):
        assert trained(vocab_size=asked).vocab_size == asked < most


def chinese(texts=400, seed=0):
    """Texts of 20 characters, the common ones far commoner, as in a language: thousands of distinct ones."""
    ranks = np.random.default_rng(seed).zipf(1.2, (texts, 20)) % 5000
    return ["".join(chr(0x4E00 + int(rank)) for rank in row) for row in ranks]


@pytest.mark.parametrize("vocab_size", [5, 500, 1000])
def test_a_vocabulary_of_many_characters_is_no_larger_than_asked_and_holds_the_commonest(vocab_size):
    texts = chinese()
    counts = Counter("".join(texts))
    assert len(counts) > 1000
    tokenizer = Tokenizer.train(texts, vocab_size=vocab_size, max_length=64)
    assert tokenizer.vocab_size <= vocab_size
    known = {token for token in tokenizer.backend.get_vocab() if len(token) == 1}
    assert min(counts[c] for c in known) >= max(counts[c] for c in counts if c not in known)
    unknown = sum(count for c, count in counts.items() if c not in known)
    if vocab_size < len(counts) + len(SPECIAL):  # no merges then: a token a character
        assert tokenizer.encode(texts).unknown == pytest.approx(unknown / sum(counts.values()))


def test_equally_rare_characters_are_left_out_in_the_same_way_by_every_process():
    script = "from fusion.processing.tokenizer import Tokenizer as T; print(T.train(['%s'], vocab_size=50, max_length=8).backend.to_str())"
    text = "".join(chr(0x4E00 + i) for i in range(200))
    told = {subprocess.run([sys.executable, "-c", script % text], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(told) == 1


def test_a_vocabulary_without_room_for_a_character_is_refused():
    with pytest.raises(UserError, match=r"vocab_size is 4; expected more than the 4 of \[PAD\], \[UNK\]"):
        Tokenizer.train(TEXTS, vocab_size=4, max_length=8)


def test_the_share_of_unknown_tokens_leaves_out_those_that_mark_start_and_end():
    tokenizer = trained()
    assert tokenizer.encode(TEXTS).unknown == 0
    assert tokenizer.encode([None]).unknown == 0
    assert tokenizer.encode(["red ж", None, "ж red"]).unknown == pytest.approx(2 / 4)
    assert Tokenizer.from_state(tokenizer.state()).encode(["red ж"]).unknown == pytest.approx(1 / 2)


def test_texts_come_back_from_their_tokens():
    tokenizer = trained()
    (ids,) = rows(tokenizer, ["Is There a RED circle?"])
    assert ids[0] == CLS
    assert ids[-1] == SEP
    words = [tokenizer.backend.id_to_token(i) for i in ids[1:-1]]
    assert "".join(words) == "istherearedcircle?"


def test_letters_that_training_never_saw_are_unknown_not_lost():
    (ids,) = rows(trained(), ["ж"])
    assert ids == [CLS, UNK, SEP]


def test_state_gives_the_same_tokenizer_back():
    tokenizer = trained(max_length=6)
    again = Tokenizer.from_state(tokenizer.state())
    texts = [*TEXTS, None, "", "something else entirely, and long"]
    assert again.state() == tokenizer.state()
    assert again.vocab_size == tokenizer.vocab_size
    assert rows(again, texts) == rows(tokenizer, texts)
    assert again.encode(texts).cut == tokenizer.encode(texts).cut


def test_state_is_plain_data():
    assert {key: type(value) for key, value in trained().state().items()} == {"backend": str, "pad_id": int, "max_length": int}


def test_long_texts_are_cut_counted_and_keep_their_end_token():
    tokenizer = trained(max_length=5)
    texts = ["red", TEXTS[0], None, TEXTS[1]]
    whole = rows(trained(max_length=50), texts)
    cut = rows(tokenizer, texts)
    assert [len(ids) for ids in whole] == [3, 8, 0, 8]
    assert tokenizer.encode(texts).cut == 2
    assert trained(max_length=50).encode(texts).cut == 0
    assert cut[0] == whole[0]
    assert cut[1] == [*whole[1][:4], SEP]


def test_a_text_of_exactly_the_greatest_length_is_not_cut():
    assert trained(max_length=8).encode([TEXTS[0]]).cut == 0
    assert trained(max_length=7).encode([TEXTS[0]]).cut == 1


def test_no_text_gives_an_absent_row_and_an_empty_one_does_not():
    batch = batch_texts(trained(), [TEXTS[0], None, ""])
    assert batch.mask.any(dim=1).tolist() == [True, False, True]
    assert batch.ids[1].eq(PAD).all()
    assert batch.ids[2][batch.mask[2]].tolist() == [CLS, SEP]


def test_a_batch_without_any_text_still_has_one_column():
    batch = batch_texts(trained(), [None, None])
    assert batch.ids.shape == batch.mask.shape == (2, 1)
    assert not batch.mask.any()


def test_a_batch_is_padded_to_its_own_longest_text():
    tokenizer = trained()
    store = tokenizer.encode(["red", TEXTS[0], "red circle"])
    short, long = store.batch([0, 2], tokenizer.pad_id), store.batch([0, 1], tokenizer.pad_id)
    assert short.ids.shape == (2, 4)
    assert long.ids.shape == (2, 8)
    assert (long.ids[0, :3] == short.ids[0, :3]).all()
    assert (long.ids[0, 3:] == PAD).all()
    assert not long.mask[0, 3:].any()
    assert long.ids.dtype == np.int64


def test_a_text_gets_the_same_tokens_whatever_stands_beside_it():
    tokenizer = trained()
    alone = [rows(tokenizer, [text])[0] for text in TEXTS]
    assert rows(tokenizer, TEXTS) == alone


# Pretrained ones.


@pytest.fixture
def local_folder(tmp_path):
    """A tokenizer as transformers saves it, with padding at 7."""
    words = ["x", "[UNK]", "[CLS]", "[SEP]", "red", "circle", "a", "[PAD]"]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    fast.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_pretrained_tokenizer_comes_from_a_local_folder(local_folder):
    tokenizer = pretrained_tokenizer(str(local_folder), max_length=4)
    assert tokenizer.pad_id == 7
    assert rows(tokenizer, ["a red circle", "red"]) == [[2, 6, 4, 3], [2, 4, 3]]
    assert tokenizer.encode(["a red circle", "red"]).cut == 1
    batch = batch_texts(tokenizer, ["red", "a red"])
    assert batch.ids.tolist() == [[2, 4, 3, 7], [2, 6, 4, 3]]
    assert batch.mask.tolist() == [[True, True, True, False], [True] * 4]


def test_a_pretrained_tokenizer_survives_as_state_without_its_folder(local_folder):
    tokenizer = pretrained_tokenizer(str(local_folder), max_length=4)
    again = Tokenizer.from_state(tokenizer.state())
    assert (again.pad_id, again.max_length) == (7, 4)
    assert rows(again, ["a red circle", None]) == rows(tokenizer, ["a red circle", None])


WORDS = {"<unk>": 0, "a": 1, "red": 2}
PIECES = [("<unk>", 0.0), ("▁a", -1.0), ("▁red", -1.0)]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (models.WordLevel(WORDS, unk_token="<unk>"), 1 / 3),
        (models.WordPiece(WORDS, unk_token="<unk>"), 1 / 3),
        (models.Unigram(PIECES, unk_id=0, byte_fallback=False), 1 / 2),  # whose unknown piece is "▁ж" here, beside a lone "▁red"
        (models.BPE({"a": 0, "r": 1}, []), 0),  # knows no unknown token
    ],
)
def test_every_kind_of_tokenizer_reports_its_unknown_tokens(model, expected):
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace() if not isinstance(model, models.Unigram) else pre_tokenizers.Metaspace()
    tokenizer = Tokenizer(backend, pad_id=0, max_length=8)
    assert tokenizer.encode(["a red ж" if expected != 1 / 2 else "red ж"]).unknown == pytest.approx(expected)


def test_the_id_limit_counts_ids_left_out_and_padding():
    backend = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "red": 20}, unk_token="[UNK]"))
    assert Tokenizer(backend, pad_id=0, max_length=8).id_limit == 21
    assert Tokenizer(backend, pad_id=30, max_length=8).id_limit == 31
    assert Tokenizer(backend, pad_id=0, max_length=8).vocab_size == 3
    assert trained().id_limit == trained().vocab_size


@pytest.mark.parametrize("content", [{}, {"config.json": '{"model_type": "bert"}'}, {"tokenizer.json": "{"}, {"tokenizer.json": "{}"}])
def test_a_folder_without_a_usable_tokenizer_is_refused_by_name(tmp_path, monkeypatch, content):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        pretrained_tokenizer(str(tmp_path), max_length=8)
    assert str(tmp_path) in str(caught.value)
