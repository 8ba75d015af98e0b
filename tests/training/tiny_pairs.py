"""Small made-up CLIP and SigLIP models, saved as transformers saves the published ones: weights, tokenizer and image processor."""

from pathlib import Path

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

WORDS = ["is", "there", "a", "red", "blue", "green", "circle", "square", "triangle", "?", "what", "colour", "the"]
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 12}
VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
KINDS = ("clip", "siglip")


def save_pair(kind: str, folder: Path, seed: int = 0, text: dict | None = None, tokenizer: bool = True, **options: object) -> Path:
    """A pair of this kind; `text` changes its text tower, `options` how it is saved. Returns the folder."""
    torch.manual_seed(seed)
    model = make_clip(text or {}) if kind == "clip" else make_siglip(text or {})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)  # from zeros and small values to ones that matter
    model.save_pretrained(folder, **options)
    processor = (
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        if kind == "clip"
        else SiglipImageProcessor(size={"height": 32, "width": 32})
    )
    processor.save_pretrained(folder)
    if tokenizer:
        (clip_tokenizer() if kind == "clip" else siglip_tokenizer()).save_pretrained(folder)
    return folder


def make_clip(text: dict) -> CLIPModel:
    ids = {"vocab_size": len(WORDS) + 2, "bos_token_id": len(WORDS), "eos_token_id": len(WORDS) + 1, "pad_token_id": 1}
    return CLIPModel(CLIPConfig(text_config=TEXT | ids | text, vision_config=VISION, projection_dim=20))


def make_siglip(text: dict) -> SiglipModel:
    shape = TEXT | {"hidden_size": 24, "vocab_size": len(WORDS) + 3}
    return SiglipModel(SiglipConfig(text_config=shape | text, vision_config=VISION))


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """CLIP's: start and end of the text, which is also the padding, with the largest ids."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    backend = words_of([*WORDS, start, end], unknown=end)
    size = len(WORDS)
    backend.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=[(start, size), (end, size + 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=start, eos_token=end, unk_token=end, pad_token=end)


def siglip_tokenizer() -> PreTrainedTokenizerFast:
    """SigLIP 2's: the padding has id 0, its config says 1."""
    backend = words_of(["<pad>", "</s>", "<unk>", *WORDS], unknown="<unk>")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def words_of(words: list[str], unknown: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return backend
