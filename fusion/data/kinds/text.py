"""Text inputs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
import torch

from fusion.data.cells import RawColumn, as_texts
from fusion.data.column import BLANK, Column
from fusion.data.kinds.base import Defaults, Kind, Reading, Store
from fusion.data.pretrained_tokenizer import pretrained_tokenizer
from fusion.encoders import Encoder, Texts, TransformersText
from fusion.errors import UserError
from fusion.processing.preprocessor import TextArrays
from fusion.processing.text import TextPreprocessor
from fusion.processing.tokenizer import Tokenizer, TokenStore
from fusion.processing.vocabulary import trimmed

NULLS = frozenset({"nan", "NaN", "NA", "N/A", "#N/A", "<NA>", "NaT", "None", "null", "NULL"})  # how programs write a missing value as text
MAX_LENGTH = 64  # tokens
NOTABLE = 0.001  # share of unknown tokens from which on it is reported


class TextInput(Kind):
    """One text per sample. An empty or blank cell means no text.

    Args:
        column: name of the manifest's column.
        max_length: maximum number of tokens; longer texts are truncated, counted and reported. None: data.max_length.
    """

    noun = "text"
    takes = Texts
    tokenizer: Tokenizer

    def __init__(self, column: str = "text", max_length: int | None = None) -> None:
        self.column, self.max_length = column, max_length

    def complete(self, defaults: Defaults) -> None:
        self.max_length = self.max_length or defaults.max_length

    @property
    def columns(self) -> list[str]:
        return [self.column]

    def read(self, columns: Mapping[str, RawColumn], reading: Reading) -> Sequence[Any]:
        texts = as_texts(self.column, columns[self.column], reading.nulls, reading.bad)
        texts = texts.map(lambda text: text if text and not text.isspace() else None, touches=BLANK)
        reading.notes += notes_of_nulls(reading.path, self.column, texts)
        return texts

    def learn(self, cells: Sequence[Any], encoder: Encoder) -> None:
        if not isinstance(encoder, TransformersText):
            raise TypeError(f"expected a TransformersText for the texts, got {type(encoder).__name__}")
        requested = self.max_length or MAX_LENGTH
        max_length = min(requested, encoder.longest or requested)
        if encoder.from_scratch:
            texts = [text for text in cells if text]
            self.tokenizer = Tokenizer.train(texts, vocab_size=encoder.vocab_size, max_length=max_length)
            encoder.fit_vocabulary(self.tokenizer.vocab_size)
        else:
            self.tokenizer = pretrained_tokenizer(str(encoder.name_or_path), max_length=max_length)
            encoder.cover_vocabulary(self.tokenizer.id_limit)
            if encoder.trim_vocabulary:
                what = f"text encoder: trim_vocabulary: the tokenizer of '{encoder.name_or_path}'"
                self.tokenizer, rows = trimmed(self.tokenizer, [text for text in cells if text], what)
                encoder.keep_tokens(rows)

    def store(self, cells: Sequence[Any], *, training: bool) -> Store:
        return TextStore(self.tokenizer, self.tokenizer.encode(cells))

    def raw(self, values: Any, name: str) -> list[Any]:
        return self.preprocessor().raw(values, name)

    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> Texts:
        return texts_of(self.preprocessor().batch(cells, unreadable))

    def preprocessor(self) -> TextPreprocessor:
        return TextPreprocessor(self.tokenizer)

    def learnt(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.state()}

    def set_learnt(self, learnt: dict[str, Any]) -> None:
        self.tokenizer = Tokenizer.from_state(learnt["tokenizer"])

    def differences(self, then: dict[str, Any]) -> Iterator[str]:
        if then["tokenizer"] != self.tokenizer.state():
            before = tokenizers.Tokenizer.from_str(then["tokenizer"]["backend"]).get_vocab_size()
            yield f"the tokenizer is a different one ({self.tokenizer.vocab_size} tokens, {before} before)"


class TextStore:
    """The texts of one split, tokenized."""

    in_memory, random = True, False

    def __init__(self, tokenizer: Tokenizer, tokens: TokenStore) -> None:
        self.pad_id, self.tokens = tokenizer.pad_id, tokens
        self.notes = []
        if tokens.cut:
            self.notes.append(f"{tokens.cut:,} texts truncated to {tokenizer.max_length} tokens")
        if tokens.unknown >= NOTABLE:
            self.notes.append(f"{tokens.unknown:.1%} of the tokens are unknown to the tokenizer")

    def batch(self, samples: np.ndarray, seed: int) -> Texts:
        return texts_of(self.tokens.batch(samples, self.pad_id))

    def unaugmented(self) -> "TextStore":
        return self

    def sizes(self) -> np.ndarray | None:
        return np.diff(self.tokens.offsets).astype(np.float64)

    def distinct(self) -> np.ndarray | None:
        return None


def texts_of(arrays: TextArrays) -> Texts:
    """The encoder's input from arrays."""
    return Texts(torch.from_numpy(arrays.ids), torch.from_numpy(arrays.mask), bool(arrays.mask.all()))


def batch_texts(tokenizer: Tokenizer, texts: Sequence[str | None]) -> Texts:
    """These texts as one padded batch."""
    return texts_of(TextPreprocessor(tokenizer).batch(texts, {}))


def notes_of_nulls(path: str, column: str, cells: Column[str | None]) -> list[str]:
    """A note on cells that look like a program's spelling of a missing value; they are read as text, since they may be a class or word."""
    spellings = [str(cell) for cell in cells.take(np.flatnonzero(cells.touched(f"^({'|'.join(NULLS)})$")))]
    if not spellings:
        return []
    option = ",".join(f'"{spelling}"' for spelling in sorted(set(spellings)))
    count = f"{len(spellings):,} cells of column '{column}'"
    return [f"{path}: {count} are {option}, read as text; to read them as missing: --data.format.missing='[{option}]'"]
