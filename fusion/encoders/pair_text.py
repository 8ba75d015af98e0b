"""The text side of a pair: CLIP's and SigLIP's text towers."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from fusion.encoders.base import Encoder
from fusion.encoders.pairs import load_tower, pair_source, tower_from_config
from fusion.encoders.pooling import token_at
from fusion.encoders.pretrained import Source, load_tokenizer
from fusion.encoders.transformers_text import TransformersText, dtype_of
from fusion.errors import UserError
from fusion.features import Features
from fusion.inputs import Texts

LEGACY_EOS = 2  # in CLIP's first configs, where it isn't the tokenizer's: the largest id then ends the text


class PairText(TransformersText):
    """Encode texts with the text tower of a pretrained pair (CLIP, SigLIP, SigLIP 2), by hub name or local folder.

    pooled (B, dim) is the pair's own embedding of the text: its cosine with the pooled features of `PairImage` of the same name is the
    similarity that the pair was trained for. tokens (B, N, dim) are those after the last block and its norm; they are projected to the
    shared space like the pooled features in CLIP, and in SigLIP where it has another width. Levels and embeddings are not projected.

    CLIP pools the token that ends the text. SigLIP was trained on texts padded to its full length, without a mask: its tower reads that
    padding, always of `pad_id` and on the right, whatever the length of the batch.

    Sources: Radford et al. (2021), CLIP; Zhai et al. (2023), SigLIP; Tschannen et al. (2025), SigLIP 2.

    Args:
        name_or_path: hub name, or folder with config.json, weights and tokenizer.
        config: a text tower from scratch instead: {"model_type": "clip_text_model", "hidden_size": 64, ...}.
        pretrained: load the weights of name_or_path; False uses only its architecture and tokenizer.
        frozen: no gradient, eval mode.
        dtype: dtype of the weights, regardless of that in the file; features of half-precision weights have torch's default dtype.
        resize_embeddings: enlarge the word embeddings for a tokenizer that has more tokens, which is rejected otherwise.
        attention: attention implementation on GPUs: "sdpa", "flash_attention_2" or "flex_attention", as for TransformersText.
        pad_id: id of the padding that SigLIP reads; that of its tokenizer if None, or of its config where it has no tokenizer.
        temperature: the pair's learned temperature; set from its weights.
        logit_bias: the pair's learned bias; set from its weights, 0 for CLIP.

    Raises UserError for models that are no such pair, and for weights that are not available.
    """

    def __init__(
        self,
        name_or_path: str | None = None,
        *,
        config: dict[str, Any] | None = None,
        pretrained: bool = True,
        frozen: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        resize_embeddings: bool = False,
        attention: Literal["sdpa", "flash_attention_2", "flex_attention"] = "sdpa",
        pad_id: int | None = None,
        temperature: float = 1.0,
        logit_bias: float = 0.0,
    ) -> None:
        Encoder.__init__(self)
        if (name_or_path is None) == (config is None):
            raise UserError("text encoder: give exactly one of name_or_path (hub name or folder of a pair) and config (from scratch)")
        self.name_or_path, self.from_scratch = name_or_path, config is not None
        self.dtype, self.resize_embeddings = dtype_of(dtype), resize_embeddings
        if config is not None:
            tower = tower_from_config(config, "text", self.dtype, temperature, logit_bias)
        else:
            source = pair_source(str(name_or_path), "text")
            tower = load_tower(source, "text", pretrained, self.dtype)
            if pad_id is None and tower.projection is None:
                pad_id = padding_of(source)
        body, self.projection, self.temperature, self.logit_bias = tower
        self.reads_padding = self.has_pooler = self.projection is None  # SigLIP
        self.pad_id = pad_id if pad_id is not None else int(body.config.pad_token_id or 0)
        # Of levels and embeddings. SigLIP pools the last position, which is padding, and before the last block not yet of the whole text.
        self.set_body(body, "mean" if self.reads_padding else "last", attention, frozen)

    def forward(self, x: Texts) -> Features:
        with torch.no_grad() if self.frozen else nullcontext():
            if self.projection is not None:
                tokens = self.projection(self.body(input_ids=x.ids, attention_mask=self.attention_mask(x)).last_hidden_state)
                return self.features(tokens, x, token_at(tokens, self.end_of_text(x)))
            output = self.body(input_ids=self.padded(x).ids)
            tokens, pooled = output.last_hidden_state[:, : x.ids.shape[1]], output.pooler_output
            return self.features(self.body.head(tokens) if pooled.shape[-1] != tokens.shape[-1] else tokens, x, pooled)

    def level_dims(self, depths: Sequence[int]) -> list[int]:
        return [self.body.config.hidden_size for _ in depths]

    def levels(self, x: Texts, depths: Sequence[int]) -> list[Features]:
        if not self.reads_padding:
            return super().levels(x, depths)
        return [self.features(f.tokens[:, : x.ids.shape[1]], x) for f in super().levels(self.padded(x), depths)]

    def padded(self, x: Texts) -> Texts:
        """The texts (B, longest) as the pair was trained on them: with its padding, which attention doesn't mask."""
        assert self.longest is not None
        more = (0, self.longest - x.ids.shape[1])
        if more[1] < 0:
            raise UserError(f"text encoder: texts of {x.ids.shape[1]} tokens, but the model has {self.longest} positions; truncate them")
        return Texts(pad(torch.where(x.mask, x.ids, self.pad_id), more, value=self.pad_id), pad(x.mask, more), full=True)

    def end_of_text(self, x: Texts) -> Tensor:
        """The position (B,) of the first token that ends the text, by the rule of the config; never of padding, which may have its id."""
        eos = self.body.config.eos_token_id
        ends = x.ids.masked_fill(~x.mask, -1) if eos == LEGACY_EOS else ((x.ids == eos) & x.mask).int()
        return ends.argmax(dim=1)

    def spec(self) -> dict[str, Any]:
        return {
            "config": self.body.config.to_dict(),
            "frozen": self.frozen,
            "dtype": self.dtype_name,
            "pad_id": self.pad_id,
            "temperature": self.temperature,
            "logit_bias": self.logit_bias,
        }


def padding_of(source: Source) -> int | None:
    """The id with which a pair's tokenizer pads; None where it has no tokenizer."""
    if source.file("tokenizer_config.json") is None:
        return None
    with source.loading():
        return load_tokenizer(source.path).pad_token_id
