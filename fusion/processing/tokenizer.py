"""Tokenization, by a tokenizer trained on the training texts or a pretrained model's own."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from fusion.errors import UserError
from fusion.processing.preprocessor import TextArrays

# Ids 0 to 3; text encoders made from a config expect padding at 0.
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SLICE = 10_000  # texts encoded at a time, so that the tokenizer's own objects don't accumulate in memory


class TokenStore(NamedTuple):
    """Tokenized texts in two arrays: text i is ids[offsets[i]:offsets[i + 1]]; a missing text has no tokens."""

    ids: np.ndarray
    offsets: np.ndarray
    cut: int  # number of texts that were truncated to max_length
    unknown: float  # share of unknown tokens, not counting those that mark start and end

    def batch(self, samples: Sequence[int] | np.ndarray, pad_id: int) -> TextArrays:
        """The texts of these samples, padded to the longest of them: ids (B, N) int64, mask (B, N) bool, N >= 1."""
        samples = np.asarray(samples)
        starts, lengths = self.offsets[samples], self.offsets[samples + 1] - self.offsets[samples]
        mask = np.arange(max(int(lengths.max(initial=0)), 1)) < lengths[:, None]
        ids = np.full(mask.shape, pad_id, dtype=np.int64)
        source = starts[:, None] + np.arange(mask.shape[1])
        ids[mask] = self.ids[source[mask]]
        return TextArrays(ids, mask)


class Tokenizer:
    """A `tokenizers` pipeline with its padding id and maximum length; its state is plain data for the checkpoint.

    >>> tokenizer = Tokenizer.train(["is there a red circle?", "is there a blue square?"], vocab_size=100, max_length=16)
    >>> store = tokenizer.encode(["a red square", None])
    >>> store.batch([0, 1], tokenizer.pad_id).present.tolist()
    [True, False]
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, pad_id: int, max_length: int) -> None:
        self.backend = backend
        self.pad_id = pad_id
        self.max_length = max_length
        backend.no_padding()
        backend.enable_truncation(max_length)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, max_length: int) -> "Tokenizer":
        """Byte-pair encoding (Sennrich et al., 2016) learnt from the texts, lower-cased, with at most `vocab_size` entries.

        Where the texts have more distinct characters than that, the rarest become unknown. Raises UserError for a vocab_size that has no
        room for any character.
        """
        if vocab_size <= len(SPECIAL):
            raise UserError(f"tokenizer: vocab_size is {vocab_size}; expected more than the {len(SPECIAL)} of {', '.join(SPECIAL)}")
        texts = list(texts)
        backend = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        alphabet = most_frequent_characters(backend.normalizer, texts, vocab_size - len(SPECIAL))
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")]
        )
        return cls(backend, pad_id=0, max_length=max_length)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def id_limit(self) -> int:
        """One more than the largest id, of a token or of padding; above vocab_size where ids have gaps."""
        return 1 + max([self.pad_id, *self.backend.get_vocab().values()])

    @cached_property
    def unk_id(self) -> int | None:
        """The id of unknown tokens; None where there are none, as with byte-level tokenizers."""
        model: Any = self.backend.model
        if isinstance(model, models.Unigram):  # which has no such attribute
            return json.loads(self.backend.to_str())["model"]["unk_id"]
        return None if model.unk_token is None else self.backend.token_to_id(model.unk_token)

    def encode(self, texts: Sequence[str | None]) -> TokenStore:
        """Token ids of all texts, none for None; texts longer than `max_length` tokens are truncated and counted."""
        lengths = np.zeros(len(texts) + 1, dtype=np.int64)
        pieces: list[np.ndarray] = []
        cut = 0
        present = ((i, str(text)) for i, text in enumerate(texts) if text is not None)
        while chosen := list(islice(present, SLICE)):
            for (i, _), encoding in zip(chosen, self.backend.encode_batch([text for _, text in chosen]), strict=True):
                pieces.append(np.asarray(encoding.ids, dtype=np.int32))
                lengths[i + 1] = len(encoding.ids)
                cut += bool(encoding.overflowing)
        ids = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
        ordinary = len(ids) - len(pieces) * self.backend.num_special_tokens_to_add(False)
        unknown = 0 if self.unk_id is None else np.count_nonzero(ids == self.unk_id)
        return TokenStore(ids, np.cumsum(lengths), cut, unknown / max(ordinary, 1))

    def state(self) -> dict[str, Any]:
        """Plain data from which `from_state` makes the same tokenizer."""
        return {"backend": self.backend.to_str(), "pad_id": self.pad_id, "max_length": self.max_length}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Tokenizer":
        return cls(tokenizers.Tokenizer.from_str(state["backend"]), pad_id=state["pad_id"], max_length=state["max_length"])


def most_frequent_characters(normalizer: Any, texts: Iterable[str], most: int) -> list[str]:
    """The most frequent characters of the normalised texts; ties by code point, since a hash order would differ between ranks."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    characters = [character for character in counts if not character.isspace()]
    return sorted(characters, key=lambda character: (-counts[character], character))[:most]
