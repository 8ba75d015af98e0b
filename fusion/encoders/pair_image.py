"""The image side of a pair: CLIP's and SigLIP's vision towers, with their own processing of images."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from fusion.encoders.base import drop_unused
from fusion.encoders.image_encoder import Encoded, ImageEncoder, check_data_config, height_and_width
from fusion.encoders.pairs import load_tower, pair_source, tower_from_config
from fusion.encoders.pretrained import Source, recompute_blocks
from fusion.errors import UserError
from fusion.features import Features
from fusion.inputs import Images

PROCESSING = ("mean", "std", "interpolation", "resize")
PLAIN = {"mean": 0.5, "std": 0.5, "interpolation": "bicubic", "resize": "squash"}  # SigLIP's, for a tower from scratch
RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as in preprocessor_config.json


class PairImage(ImageEncoder):
    """Encode images with the vision tower of a pretrained pair (CLIP, SigLIP, SigLIP 2), by hub name or local folder.

    pooled (B, dim) is the pair's own embedding of the image: its cosine with the pooled features of `PairText` of the same name is the
    similarity that the pair was trained for. tokens (B, N, dim) are the patches, with the class token first in CLIP, after the last block
    and its norm; those of CLIP are projected to the shared space like the pooled features. Levels and embeddings are not projected.

    Images are resized, interpolated and normalised as preprocessor_config.json says (CLIP crops the centre, SigLIP squashes), unless
    data.resize is set.

    Sources: Radford et al. (2021), CLIP; Zhai et al. (2023), SigLIP; Tschannen et al. (2025), SigLIP 2.

    Args:
        name_or_path: hub name, or folder with config.json, weights and preprocessor_config.json.
        config: a vision tower from scratch instead: {"model_type": "clip_vision_model", "hidden_size": 64, ...}.
        pretrained: load the weights of name_or_path; False uses only its architecture and processing.
        image_size: side in pixels, or [height, width]; position embeddings are interpolated for another than the model's own, which is used
            if None.
        frozen: no gradient, eval mode.
        data_config: overrides of the pair's own mean, std, interpolation and resize ("squash", "crop" or "pad").
        temperature: the pair's learned temperature; set from its weights.
        logit_bias: the pair's learned bias; set from its weights, 0 for CLIP.

    Raises UserError for models that are no such pair, and for weights or processing that are not available.
    """

    def __init__(
        self,
        name_or_path: str | None = None,
        *,
        config: dict[str, Any] | None = None,
        pretrained: bool = True,
        image_size: int | tuple[int, int] | None = None,
        frozen: bool = False,
        data_config: dict[str, Any] | None = None,
        temperature: float = 1.0,
        logit_bias: float = 0.0,
    ) -> None:
        super().__init__()
        if (name_or_path is None) == (config is None):
            raise UserError("image encoder: give exactly one of name_or_path (hub name or folder of a pair) and config (from scratch)")
        processing = check_data_config(data_config, PROCESSING)
        size = None if image_size is None else height_and_width(image_size)
        if config is not None:
            self.name = str(config.get("model_type"))
            processing = PLAIN | processing
            tower = tower_from_config(config, "image", torch.float32, temperature, logit_bias)
        else:
            self.name = str(name_or_path)
            source = pair_source(self.name, "image")
            tower = load_tower(source, "image", pretrained, torch.float32)
            if missing := [key for key in PROCESSING if key not in processing]:
                own = own_processing(source, missing, height_and_width(tower.body.config.image_size) if size is None else None)
                processing = {key: own[key] for key in missing} | processing
        self.body, self.projection, self.temperature, self.logit_bias = tower
        if self.body.config.model_type == "siglip_vision_model" and not self.body.config.vision_use_head:
            raise UserError(f"image encoder: '{self.name}' has no pooling head (vision_use_head), and so no embedding of an image")
        own_size = height_and_width(self.body.config.image_size)
        self.image_size = size or own_size
        self.interpolated = self.image_size != own_size
        mean, std = self.set_constants(processing["mean"], processing["std"], self.body.config.num_channels)
        self.data_config = {"mean": mean, "std": std, "interpolation": processing["interpolation"], "resize": processing["resize"]}
        with self.explained("does not run on images of {} x {} pixels".format(*self.image_size)):
            drop_unused(self, lambda: self(self.example()))
            self.dim, self.embed_dim = self.probe(self.forward)[0].dim, self.probe(self.embed)[0].dim
        if frozen:
            self.freeze()

    def forward(self, x: Images | Tensor) -> Features:
        return self.encode(x, lambda pixels: [self.projected(pixels)])[0]

    def projected(self, pixels: Tensor) -> Encoded:
        output = self.body(pixel_values=pixels, interpolate_pos_encoding=self.interpolated)
        if self.projection is None:
            tokens = output.last_hidden_state
            return Encoded(tokens, output.pooler_output if self.has_pooler else tokens.mean(dim=1))
        tokens = self.projection(self.body.post_layernorm(output.last_hidden_state))
        return Encoded(tokens, tokens[:, 0])

    def embed(self, x: Images | Tensor) -> Features:
        def run(pixels: Tensor) -> list[Encoded]:
            tokens = self.body.embeddings(pixels, interpolate_pos_encoding=self.interpolated)
            return [self.pooled(self.body.pre_layrnorm(tokens) if self.is_clip else tokens)]

        return self.encode(x, run)[0]

    def levels(self, x: Images | Tensor, depths: Sequence[int]) -> list[Features]:
        for depth in depths:
            if not -self.depth <= depth < self.depth:
                raise UserError(f"'{self.name}' has {self.depth} levels; there is no depth {depth}")

        def run(pixels: Tensor) -> list[Encoded]:
            output = self.body(pixel_values=pixels, interpolate_pos_encoding=self.interpolated, output_hidden_states=True)
            return [self.pooled(output.hidden_states[1:][depth]) for depth in depths]

        return self.encode(x, run)

    def pooled(self, tokens: Tensor) -> Encoded:
        """Tokens that are not projected, with their class token or mean."""
        return Encoded(tokens, tokens[:, 0] if self.is_clip else tokens.mean(dim=1))

    @property
    def has_pooler(self) -> bool:  # type: ignore[override]
        """Whether there is SigLIP's pooling head, which `trim` may have removed."""
        return not self.is_clip and not isinstance(self.body.head, nn.Identity)

    @property
    def is_clip(self) -> bool:
        return self.body.config.model_type == "clip_vision_model"

    @property
    def depth(self) -> int:
        return self.body.config.num_hidden_layers

    def level_dims(self, depths: Sequence[int]) -> list[int]:
        return [self.body.config.hidden_size for _ in depths]

    def checkpoint_activations(self) -> None:
        recompute_blocks(self.body, "image encoder")

    def layers_of_parameters(self) -> dict[str, int]:
        layers = {}
        for name, _ in self.named_parameters():
            block = re.search(r"\.layers\.(\d+)\.", name)
            first = name.startswith(("body.embeddings.", "body.pre_layrnorm."))
            layers[name] = int(block[1]) + 1 if block else 0 if first else self.depth
        return layers

    def spec(self) -> dict[str, Any]:
        return {
            "config": self.body.config.to_dict(),
            "image_size": list(self.image_size),
            "frozen": self.frozen,
            "data_config": self.data_config,
            "temperature": self.temperature,
            "logit_bias": self.logit_bias,
        }


def own_processing(source: Source, keys: Sequence[str], size: tuple[int, int] | None) -> dict[str, Any]:
    """The mean, std, interpolation and resize of a pair's images, from its preprocessor_config.json. size: what its tower reads, where the
    processing must give just that.

    Raises UserError where the file is missing, or has another processing than these can express for one of `keys`.
    """
    with source.loading():
        processor: Any = AutoImageProcessor.from_pretrained(source.path)
    resample = getattr(processor.resample, "value", processor.resample)
    interpolation = resample if resample in RESAMPLING.values() else RESAMPLING.get(resample)
    normalised = processor.do_normalize
    values = {
        "mean": list(processor.image_mean) if normalised else 0.0,
        "std": list(processor.image_std) if normalised else 1.0,
        "interpolation": interpolation,
        "resize": resize_of(processor, size),
    }
    where = f"image encoder: {source.described}: preprocessor_config.json"
    factor = processor.rescale_factor if processor.do_rescale else 1
    if abs(factor * 255 - 1) > 1e-6 and {"mean", "std"} & set(keys):
        raise UserError(f"{where} scales pixels by {factor:g}, expected 1/255; set mean and std for 0..1 by data_config")
    if interpolation is None and "interpolation" in keys:
        known = ", ".join(f"{name} ({number})" for number, name in RESAMPLING.items())
        raise UserError(f"{where} has resample {resample}; expected one of {known}, or data_config={{interpolation: bicubic}}")
    if values["resize"] is None and "resize" in keys:
        given = f"size {sizes(processor.size)} and crop_size {sizes(processor.crop_size)}"
        raise UserError(
            f"{where} resizes by {given}; expected to squash or crop to the size that the model reads; to choose it by yourself: "
            "data_config={resize: crop} (or squash, pad)"
        )
    return values


def resize_of(processor: Any, size: tuple[int, int] | None) -> str | None:
    """How a processor's images get their size; None for any other way, or another size than the given one."""
    given, crop = processor.size, processor.crop_size
    if not processor.do_resize:
        return None
    how, becomes = "squash", (given.height, given.width)
    if processor.do_center_crop:
        if given.shortest_edge:
            how, becomes = "crop", (given.shortest_edge, given.shortest_edge)
        if becomes != (crop.height, crop.width):
            return None
    return how if None not in becomes and size in (None, becomes) else None


def sizes(given: Any) -> str:
    """A processor's size as its file has it."""
    return str({key: value for key, value in dict(given or {}).items() if value})
