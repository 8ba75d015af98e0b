"""Tokenizers with less than their whole vocabulary."""

import json
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import models

from fusion.errors import UserError
from fusion.processing.tokenizer import Tokenizer


def trimmed(tokenizer: Tokenizer, texts: Sequence[str], what: str = "the tokenizer") -> tuple[Tokenizer, list[int]]:
    """A tokenizer with only those tokens that the texts have, and the earlier id of each of its tokens.

    Single characters and special tokens are kept, so that other texts can be read, too: their words are divided into shorter pieces, and a
    word is unknown only if it was before. The texts themselves are divided as before, since WordPiece takes the longest token that fits.

    what: names the tokenizer in messages.

    Raises UserError for a tokenizer that isn't a WordPiece model (BERT's family).
    """
    state: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    model = state["model"]
    if not isinstance(tokenizer.backend.model, models.WordPiece):
        raise UserError(f"{what} is of type {model.get('type')}, whose vocabulary can't be trimmed; expected WordPiece, as of BERT")
    used = set(tokenizer.encode(texts).ids.tolist())
    prefix = model["continuing_subword_prefix"]
    added = {token["content"] for token in state["added_tokens"]}
    kept = {
        old: token
        for token, old in model["vocab"].items()
        if old in used or old == tokenizer.pad_id or token in added or token == model["unk_token"] or len(token.removeprefix(prefix)) == 1
    }
    kept |= {token["id"]: token["content"] for token in state["added_tokens"]}
    rows = sorted(kept)
    now = {old: new for new, old in enumerate(rows)}
    model["vocab"] = {token: now[old] for token, old in model["vocab"].items() if old in now}
    for token in state["added_tokens"]:
        token["id"] = now[token["id"]]
    renumber(state["post_processor"], now)
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    return Tokenizer(backend, pad_id=now[tokenizer.pad_id], max_length=tokenizer.max_length), rows


def renumber(processor: Any, now: dict[int, int]) -> None:
    """Replaces the ids in a post-processor's state: those of TemplateProcessing are lists `ids`, those of BertProcessing pairs (token,
    id)."""
    if isinstance(processor, list):
        for inner in processor:
            renumber(inner, now)
    elif isinstance(processor, dict):
        for key, value in processor.items():
            if key == "ids":
                processor[key] = [now[old] for old in value]
            elif key in ("sep", "cls"):
                processor[key] = [value[0], now[value[1]]]
            else:
                renumber(value, now)
