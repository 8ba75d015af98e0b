"""Pretrained pairs of an image and a text tower whose pooled features share one space: CLIP, SigLIP and SigLIP 2."""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
)

from fusion.encoders.pretrained import Source
from fusion.encoders.transformers_text import SPECIAL_IDS, from_config
from fusion.errors import UserError, nearest

Side = Literal["image", "text"]
PAIRS: dict[str, Any] = {"clip": CLIPModel, "siglip": SiglipModel}  # SigLIP 2 of fixed resolution is a siglip, too
TOWERS: dict[Side, dict[str, Any]] = {
    "image": {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel},
    "text": {"clip_text_model": CLIPTextModel, "siglip_text_model": SiglipTextModel},
}


class Tower(NamedTuple):
    """One side of a pair.

    projection: CLIP's, to the width of the shared space; None where the tower has its own (SigLIP). temperature, logit_bias: as the pair
    was trained, the logit of an image and a text is their cosine / temperature + logit_bias.
    """

    body: Any
    projection: nn.Linear | None
    temperature: float
    logit_bias: float


def pair_source(name: str, side: Side) -> Source:
    alternatives = (
        f"Use --model.{side}.name_or_path=FOLDER with config.json, model.safetensors, preprocessor_config.json and tokenizer.json, "
        "as transformers saves a CLIPModel or SiglipModel with its processor"
    )
    return Source(name, f"{side} encoder", alternatives)


def load_tower(source: Source, side: Side, pretrained: bool, dtype: torch.dtype) -> Tower:
    """One side of a pair by hub name or folder. pretrained: with its weights, else with random ones.

    Raises UserError for what is no pair, and for weights that are not available.
    """
    if source.file("config.json") is None and source.file("open_clip_config.json") is not None:
        raise UserError(
            f"{source.what}: {source.described} is a model of open_clip, not of transformers; use one that transformers wrote (many, such "
            "as laion/CLIP-ViT-B-32-laion2B-s34B-b79K, have both), convert it with transformers' convert_clip_original_pytorch_to_hf.py, "
            "or use timm's copy of its image tower alone: --model.image=TimmImage --model.image.name=vit_base_patch16_clip_224.openai"
        )
    with source.loading():
        config = AutoConfig.from_pretrained(source.path)
    reject_other_models(source, config.model_type)
    model_class = PAIRS[config.model_type]
    model: Any = source.weights(model_class, config, dtype) if pretrained else model_class(config).to(dtype)
    body, projection = (
        (model.vision_model, getattr(model, "visual_projection", None))
        if side == "image"
        else (model.text_model, getattr(model, "text_projection", None))
    )
    if projection is not None:
        body.config.projection_dim = projection.out_features  # a tower's own says nothing: the pair's config decides
    bias = getattr(model, "logit_bias", None)
    return Tower(body, projection, math.exp(-model.logit_scale.item()), 0.0 if bias is None else bias.item())


def reject_other_models(source: Source, kind: str) -> None:
    """Raises UserError unless the model is a pair that can be read."""
    if kind == "siglip2":
        raise UserError(
            f"{source.what}: {source.described} is a SigLIP 2 with NaFlex, which reads images of any aspect ratio and isn't supported; use "
            "one of fixed resolution, such as google/siglip2-base-patch16-224"
        )
    if kind not in PAIRS:
        raise UserError(f"{source.what}: {source.described} is a '{kind}', not a pair; expected model_type {' or '.join(PAIRS)}")


def tower_from_config(config: dict[str, Any], side: Side, dtype: torch.dtype, temperature: float, logit_bias: float) -> Tower:
    """A tower with random weights, from its own config with model_type. Raises UserError for one that can't be built."""
    towers, what = TOWERS[side], f"{side} encoder"
    kind = str(config.get("model_type"))
    if kind not in towers:
        raise UserError(f"{what}: config has model_type '{kind}', which is no {side} tower of a pair. {nearest(kind, towers)}")
    ids = SPECIAL_IDS if side == "text" else {}
    body: Any = from_config(config, dtype, build=lambda built, dtype: towers[kind](built).to(dtype), what=what, defaults=ids)
    if not kind.startswith("clip"):
        return Tower(body, None, temperature, logit_bias)
    projection = nn.Linear(body.config.hidden_size, body.config.projection_dim, bias=False, dtype=dtype)
    nn.init.normal_(projection.weight, std=body.config.hidden_size**-0.5)
    return Tower(body, projection, temperature, logit_bias)
