"""Text encoders: any transformers model of texts, an encoder, the encoder of an encoder-decoder, or a decoder."""

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)

from fusion.encoders.base import Encoder, Reading, drop_unused, mixed_tokens
from fusion.encoders.pooling import Pooling, check_pooling, pool, sentence_pooling
from fusion.encoders.pretrained import Source, recompute_blocks
from fusion.errors import UserError, first_line, nearest
from fusion.features import Features
from fusion.inputs import Mixture, Texts

# Ids of the tokenizer that will be trained for a model from scratch; those of the published vocabulary don't exist there.
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TransformersText(Encoder):
    """Encode texts with a transformers model, by hub name, local folder, or from scratch by a config.

    Takes Texts with ids (B, N); returns tokens (B, N, dim) and pooled (B, dim). Of an encoder-decoder with an encoder of its own in
    transformers (T5), that is used; a decoder (GPT-2, Llama, Qwen) reads each token after those before it alone.

    Args:
        name_or_path: hub name, or folder with config.json, weights and tokenizer.
        config: a model from scratch instead: {"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2, ...}; its
            `vocab_size` is then the maximum vocabulary size of the tokenizer trained on the texts.
        pretrained: load the weights of name_or_path; False uses only its architecture and tokenizer.
        pooling: "mean" of the real tokens, "first" ([CLS]), "last" (end of text), "max", "mean_sqrt_len" (sum over the root of the
            number) or "weighted_mean" (by position). None: as a sentence-transformers model says (modules.json); else "last" for decoders
            and CLIP's causal tower, "mean" for others.
        normalize: divide the pooled vector by its length. None: as a sentence-transformers model says where pooling is None too, else no.
        frozen: no gradient, eval mode.
        dtype: dtype of the weights, regardless of that in the file; features of half-precision weights have torch's default dtype.
        resize_embeddings: enlarge the word embeddings for a tokenizer that has more tokens, which is rejected otherwise; the new ones start
            near the mean of the others.
        trim_vocabulary: drop the embeddings of tokens that no training text has, except single characters and special tokens, so that other
            words are divided into shorter pieces; for tokenizers of BERT's family (WordPiece).
        attention: attention implementation on GPUs: "sdpa" also computes padding, up to the longest text of a batch; "flash_attention_2"
            (needs the package flash-attn and half precision) skips padding, "flex_attention" skips blocks of 128 padded tokens. Not stored
            in checkpoints: the weights are the same, and predictions use "sdpa".

    Raises UserError for unknown model types, configs that can't be built, and weights that are not available or do not fit.
    """

    takes = Texts
    trim_vocabulary: bool = False

    def __init__(
        self,
        name_or_path: str | None = None,
        *,
        config: dict[str, Any] | None = None,
        pretrained: bool = True,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        frozen: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        resize_embeddings: bool = False,
        trim_vocabulary: bool = False,
        attention: Literal["sdpa", "flash_attention_2", "flex_attention"] = "sdpa",
    ) -> None:
        super().__init__()
        if (name_or_path is None) == (config is None):
            raise UserError("text encoder: give exactly one of name_or_path (hub name or folder) and config (from scratch)")
        if trim_vocabulary and config is not None:
            raise UserError("text encoder: trim_vocabulary is for pretrained models; a model from scratch has a vocabulary of its texts")
        self.name_or_path, self.from_scratch = name_or_path, config is not None
        self.trim_vocabulary = trim_vocabulary
        self.dtype, self.resize_embeddings = dtype_of(dtype), resize_embeddings
        check_pooling(pooling)
        if config is not None:
            body = from_config(config, self.dtype)
        else:
            source = text_source(str(name_or_path))
            if pooling is None and (own := sentence_pooling(source)) is not None:
                pooling, normalize = own.pooling, own.normalize if normalize is None else normalize
            body = from_name(source, pretrained, self.dtype)
        self.set_body(body, pooling, attention, frozen, normalize=bool(normalize))

    def set_body(self, body: Any, pooling: Pooling | None, attention: str, frozen: bool, *, normalize: bool = False) -> None:
        """Make this model the encoder's, without modules that it doesn't use. Raises UserError if it can't be run on texts."""
        self.body, self.normalize = body, normalize
        body.config.use_cache = False  # decoders' keys and values for the next token
        self.pooling = pooling or ("last" if is_causal(body.config) else "mean")
        try:
            drop_unused(self, lambda: self(self.example()))
            with torch.no_grad():
                self.broadcasts_mask  # noqa: B018 (computed now, and not within a compiled forward pass)
                self.dim = self(self.example()).dim
                if hasattr(body, "embeddings"):
                    self.embed(self.example())
        except UserError:
            raise
        except Exception as error:  # of any type, from within the model's own code
            raise UserError(
                f"text encoder: '{body.config.model_type}' can't be run on token ids and a mask alone, as a BERT-like model can "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        if attention != "sdpa":
            self.set_attention(attention)
        if frozen:
            self.freeze()

    def set_attention(self, attention: str) -> None:
        """Raises UserError if the model, its dropout or this machine doesn't support it."""
        config = self.body.config
        dropout = getattr(config, "attention_probs_dropout_prob", getattr(config, "attention_dropout", 0.0))
        if attention == "flex_attention" and dropout:
            raise UserError(
                f"text encoder: flex_attention has no dropout of attention weights, but this {config.model_type} has {dropout:g}; "
                "set it to 0 in its config, or use attention 'sdpa'"
            )
        try:
            self.body.set_attn_implementation(attention)
        except (ValueError, ImportError) as error:
            raise UserError(f"text encoder: a {config.model_type} can't use {attention} here ({first_line(error)})") from error
        if config._attn_implementation != attention:  # transformers only warns
            raise UserError(f"text encoder: a {config.model_type} can't use {attention}; use attention 'sdpa'")
        del self.broadcasts_mask  # cached for the previous implementation

    def forward(self, x: Texts) -> Features:
        with torch.no_grad() if self.frozen else nullcontext():
            words, x = self.words(x, self.body)
            features = self.features(self.body(**words, attention_mask=self.attention_mask(x)).last_hidden_state, x)
            return features._replace(pooled=normalize(features.pooled, dim=-1)) if self.normalize else features

    def embed(self, x: Texts) -> Features:
        assert self.embed_dim  # raises UserError if there are no embeddings
        with torch.no_grad() if self.frozen else nullcontext():
            words, x = self.words(x, self.body.embeddings)
            return self.features(self.body.embeddings(**words), x)

    def words(self, x: Texts, module: torch.nn.Module) -> tuple[dict[str, Tensor | None], Texts]:
        """The keyword arguments by which a module of the model takes the words, ids or mixed embeddings; and the input with their mask."""
        if x.mixture is None:
            return {"input_ids": x.ids}, x
        tokens, x = mixed_tokens(self.embedding(x.ids), x)
        return {"input_ids": None, embeddings_argument(module): tokens}, x

    def check_mixing(self, what: Reading, depths: Sequence[int] = ()) -> None:
        """Raises UserError for a model that doesn't take word embeddings instead of ids, or doesn't encode them like the ids."""
        kind, training, device = self.body.config.model_type, self.training, self.embedding.weight.device
        ids = self.vocab_size - 1 - torch.arange(4, device=device).view(2, 2) % self.vocab_size
        partner, weight = torch.tensor([1, 0], device=device), torch.tensor(0.0, device=device)
        plain, mask = Texts(ids.flip(0), torch.ones_like(ids, dtype=torch.bool)), torch.ones_like(ids, dtype=torch.bool)
        self.eval()
        try:
            with torch.no_grad():
                expected, found = (self.read(x, what, depths) for x in (plain, Texts(ids, mask, mixture=Mixture(partner, weight))))
            pairs = zip(expected, found, strict=True) if what == "levels" else [(expected, found)]
            same = all(torch.allclose(a.pooled, b.pooled, rtol=1e-3, atol=1e-3) for a, b in pairs)  # type: ignore[union-attr]
        except Exception as error:  # of any type, from within the model's own code
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"text encoder: a {kind} can't encode mixed word embeddings instead of ids ({reason})") from error
        finally:
            self.train(training)
        if not same:
            raise UserError(f"text encoder: a {kind} encodes word embeddings differently from their ids, so that texts can't be mixed")

    @cached_property
    def embed_dim(self) -> int:  # type: ignore[override]
        """The width of `embed`'s features. Raises UserError for a model without a module of words with their positions."""
        if not hasattr(self.body, "embeddings"):
            parts = ", ".join(name for name, _ in self.body.named_children())
            raise UserError(
                f"text encoder '{self.body.config.model_type}' has no module of embeddings with positions, which early fusion reads (its "
                f"parts: {parts}); use a head that reads tokens or pooled features, or a BERT-like model"
            )
        with torch.no_grad():
            return self.body.embeddings(input_ids=self.example().ids).shape[-1]

    def levels(self, x: Texts, depths: Sequence[int]) -> list[Features]:
        with torch.no_grad() if self.frozen else nullcontext():
            words, x = self.words(x, self.body)
            hidden = self.body(**words, attention_mask=self.attention_mask(x), output_hidden_states=True).hidden_states[1:]
            for depth in depths:
                if not -self.depth <= depth < self.depth:
                    raise UserError(f"the text encoder has {self.depth} levels; there is no depth {depth}")
            return [self.features(hidden[depth], x) for depth in depths]

    def attention_mask(self, x: Texts) -> Tensor | None:
        """The model's attention mask: None if nothing is masked, which the fastest attention needs; else (B, 1, 1, N) if the model accepts
        it, else (B, N), which transformers expands to (B, 1, N, N) after a device synchronisation that checks whether it is needed.
        """
        if x.full:
            return None
        mask = never_empty(x.mask)
        return mask[:, None, None, :] if self.broadcasts_mask else mask

    @cached_property
    def broadcasts_mask(self) -> bool:
        """Whether a mask (B, 1, 1, N) of keys has the same effect as (B, N): found by trying, since models differ; False for local
        attention."""
        config = self.body.config
        local = any(getattr(config, name, None) for name in ("sliding_window", "local_attention", "attention_window", "layer_types"))
        if local or getattr(config, "_attn_implementation", None) != "sdpa":
            return False
        training, device = self.training, self.embedding.weight.device
        ids = torch.arange(12, device=device).view(2, 6) % self.vocab_size
        mask = torch.arange(6, device=device)[None] < torch.tensor([[6], [3]], device=device)
        self.eval()
        try:
            with torch.no_grad():
                flat, wide = (self.body(input_ids=ids, attention_mask=m).last_hidden_state for m in (mask, mask[:, None, None, :]))
            return torch.allclose(flat[mask], wide[mask], atol=1e-4)
        except Exception:  # of any type, from within the model's own code
            return False
        finally:
            self.train(training)

    @property
    def depth(self) -> int:
        return self.body.config.num_hidden_layers

    def level_dims(self, depths: Sequence[int]) -> list[int]:
        return [self.dim for _ in depths]

    def features(self, tokens: Tensor, x: Texts, pooled: Tensor | None = None) -> Features:
        """pooled: by the model itself; None: by `pooling`."""
        dtype = tokens.dtype if self.dtype == torch.float32 else torch.get_default_dtype()
        tokens = tokens.to(dtype)
        pooled = pool(tokens, x.mask, self.pooling) if pooled is None else pooled.to(dtype)
        return Features(tokens, x.mask, pooled, full=x.full)

    def checkpoint_activations(self) -> None:
        recompute_blocks(self.body, "text encoder")

    def layers_of_parameters(self) -> dict[str, int]:
        matches = {name: re.search(r"\.(\d+)\.", name) for name, _ in self.named_parameters()}
        # Parameters outside the blocks come before them (embeddings) or after them (a final norm).
        words = {id(p) for p in self.embedding.parameters()}
        first = {name for name, p in self.named_parameters() if id(p) in words or re.search(r"emb|\bwpe\b|\bwte\b", name)}
        outside = {name: 0 if name in first else self.depth for name in matches}
        return {name: int(match[1]) + 1 if match else outside[name] for name, match in matches.items()}

    def spec(self) -> dict[str, Any]:
        return {
            "config": self.body.config.to_dict(),
            "pooling": self.pooling,
            "normalize": self.normalize,
            "frozen": self.frozen,
            "dtype": self.dtype_name,
        }

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def example(self) -> Texts:
        ids = torch.full((1, 2), self.vocab_size - 1, device=self.embedding.weight.device)
        return Texts(ids, torch.ones_like(ids, dtype=torch.bool))

    @property
    def embedding(self) -> torch.nn.Embedding:
        return cast(torch.nn.Embedding, self.body.get_input_embeddings())

    @property
    def vocab_size(self) -> int:
        return self.embedding.num_embeddings

    @property
    def longest(self) -> int | None:
        """Maximum number of tokens, for which the model has positions; None if it has no such limit."""
        module = getattr(self.body, "embeddings", None)
        tables = [
            getattr(module, "position_embeddings", None),
            getattr(module, "position_embedding", None),
            getattr(self.body, "wpe", None),
        ]
        table = next((one for one in tables if isinstance(one, torch.nn.Embedding)), None)
        if table is None:
            return None
        # RoBERTa and similar models number their positions from padding_idx + 1.
        return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)

    def fit_vocabulary(self, size: int) -> None:
        """Truncate the word embeddings of a model from scratch to `size`, that of its trained tokenizer. Raises UserError for more than it
        has."""
        if not self.from_scratch:
            raise ValueError("only a text encoder made from a config has a vocabulary to fit")
        if size > self.vocab_size:
            raise UserError(f"{size} tokens don't fit the {self.vocab_size} embeddings of the text encoder")
        self.keep_tokens(range(size))

    def keep_tokens(self, rows: Sequence[int]) -> None:
        """Keep the word embeddings of these tokens, in this order. Raises UserError where the padding token gets another id, by which some
        models number their positions."""
        before = self.embedding.weight
        after = torch.nn.Parameter(before.detach()[list(rows)].clone(), requires_grad=before.requires_grad)
        for module in self.body.modules():  # several may share the weights (T5's)
            if isinstance(module, torch.nn.Embedding) and module.weight is before:
                padding = module.padding_idx
                if padding is not None and (padding >= len(rows) or rows[padding] != padding):
                    raise UserError(f"text encoder: its padding token has the id {padding}, which must stay the same; it can't be trimmed")
                module.weight, module.num_embeddings = after, len(rows)
        config = self.body.config
        now = {old: new for new, old in enumerate(rows)}
        for name, old in config.to_dict().items():
            if name.endswith("_token_id") and isinstance(old, int) and not isinstance(rows, range):
                setattr(config, name, now.get(old))
        config.vocab_size = len(rows)

    def cover_vocabulary(self, size: int) -> None:
        """Ensure that every id below `size` has an embedding: enlarges them if `resize_embeddings`, else raises UserError."""
        if size <= self.vocab_size:
            return
        if not self.resize_embeddings:
            raise UserError(
                f"text encoder: the tokenizer of '{self.name_or_path}' has ids up to {size - 1}, the model {self.vocab_size} embeddings; "
                "use the tokenizer that the model was trained with, or add embeddings: --model.text.resize_embeddings=true"
            )
        self.body.resize_token_embeddings(size)
        if self.frozen:
            self.freeze()


def embeddings_argument(module: torch.nn.Module) -> str:
    """The name of the argument for word embeddings: inputs_embeds, in DistilBERT's module of embeddings input_embeds. Raises TypeError if
    the module has none."""
    known = inspect.signature(module.forward).parameters
    name = next((name for name in ("inputs_embeds", "input_embeds") if name in known), None)
    if name is None:
        raise TypeError(f"{type(module).__name__} takes no inputs_embeds")
    return name


def dtype_of(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"text encoder: dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def never_empty(mask: Tensor) -> Tensor:
    """The mask, but a sample without a text attends to its first (padding) token, since softmax over nothing is NaN."""
    first = torch.zeros_like(mask)
    first[:, 0] = True
    return mask | (first & ~mask.any(dim=1, keepdim=True))


def from_config(
    config: dict[str, Any],
    dtype: torch.dtype,
    *,
    build: Callable[[Any, torch.dtype], Any] | None = None,
    what: str = "text encoder",
    defaults: Mapping[str, int] = SPECIAL_IDS,
) -> torch.nn.Module:
    """The model of a config, with random weights.

    build: makes it from transformers' config; by default the class that AutoModel makes. what: of the errors. defaults: settings where the
    config has none.

    Raises UserError for an unknown model_type or setting, and for a config of which no model can be built.
    """
    options = {**defaults, **config}
    kind = options.pop("model_type", None)
    if kind is None:
        raise UserError(f"{what}: config needs a model_type, such as bert, roberta, distilbert or deberta-v2")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"{what}: unknown model_type '{kind}'. {nearest(kind, MODEL_FOR_MASKED_LM_MAPPING_NAMES)}")
    try:
        usual = AutoConfig.for_model(kind)
        built = AutoConfig.for_model(kind, **options)
        reject_unknown_settings(config, usual, built, what)
        return (build or build_model)(text_part(built), dtype)
    except UserError:
        raise
    except Exception as error:  # of any type, from within the model's own code
        reason = " ".join(str(error).split())
        raise UserError(f"{what}: no {kind} can be built with this config ({type(error).__name__}: {reason})") from error


def reject_unknown_settings(config: dict[str, Any], usual: Any, built: Any, what: str) -> None:
    """Raises UserError for unknown settings, which transformers accepts silently. A config with transformers_version was written by
    transformers itself, and is not checked."""
    unknown = [key for key in config if not hasattr(usual, key)]
    if not unknown or "transformers_version" in config:
        return
    # Some settings (DeBERTa's position_buckets) have no default and occur only in the model's code.
    model_class = MODEL_MAPPING.get(type(text_part(built)), None)
    code = inspect.getsource(sys.modules[model_class.__module__]) if model_class else ""
    for key in unknown:
        if f'"{key}"' not in code:
            raise UserError(f"{what}: {built.model_type} has no setting '{key}'. {nearest(key, usual.to_dict())}")


def text_source(name: str) -> Source:
    alternatives = (
        "Use --model.text.name_or_path=FOLDER with config.json, model.safetensors and tokenizer.json, "
        'or train from scratch with --model.text.config=\'{"model_type": "bert", "hidden_size": 128, ...}\''
    )
    return Source(name, "text encoder", alternatives)


def from_name(source: Source, pretrained: bool, dtype: torch.dtype) -> torch.nn.Module:
    with source.loading():
        config = text_part(AutoConfig.from_pretrained(source.path))
    model_class = class_for(config)
    return source.weights(model_class, config, dtype, add_pooling_layer=False) if pretrained else build_model(config, dtype)


def build_model(config: Any, dtype: torch.dtype) -> torch.nn.Module:
    model_class = class_for(config)
    try:
        return model_class.from_config(config, dtype=dtype, add_pooling_layer=False)
    except TypeError:  # most BERT-like models accept it, the others have no pooling layer
        return model_class.from_config(config, dtype=dtype)


def text_part(config: Any) -> Any:
    """The text tower's config of a model with two towers (CLIP); any other config unchanged."""
    return getattr(config, "text_config", None) or config


def class_for(config: Any) -> Any:
    """The transformers class that makes the model. Raises UserError for one that makes none of texts alone."""
    kind = config.model_type
    # Not config.is_encoder_decoder, which T5's encoder has set to False in its own.
    if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder:
        if kind in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
            return AutoModelForTextEncoding
        raise UserError(
            f"text encoder: '{kind}' is an encoder-decoder, of which transformers has no encoder alone; use an encoder such as bert, "
            "roberta, t5"
        )
    if type(config) not in MODEL_MAPPING:
        other = "its encoder is --model.text=PairText" if kind.startswith("siglip") else "use an encoder such as bert or roberta"
        raise UserError(f"text encoder: '{kind}' is not a model that AutoModel makes; {other}")
    return AutoModel


def is_causal(config: Any) -> bool:
    """Whether a token is encoded without those after it: of decoders, and CLIP's texts."""
    kind = config.model_type
    decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return (decoder and kind not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) or "clip" in kind
