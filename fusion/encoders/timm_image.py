"""Image encoders: any timm model that gives a feature map or tokens."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from fusion.encoders.base import drop_unused
from fusion.encoders.image_encoder import Encoded, ImageEncoder, check_data_config, height_and_width
from fusion.errors import UserError, first_line, nearest
from fusion.features import Features
from fusion.inputs import Images

# Modules before the first block, by their names in timm's model families; the first tuple whose first member the model has is used.
STEMS = (("patch_embed",), ("stem",), ("conv_stem", "bn1", "act1"), ("conv1", "bn1", "act1", "maxpool"))
LARGEST_GRID = 14
CONSTANTS = ("mean", "std", "interpolation")


class TimmImage(ImageEncoder):
    """Encode images with a timm model, by name or from a local folder.

    Takes Images with pixels (B, C, H, W), normalises them itself, and returns tokens (B, N, dim): the patches of a transformer with
    its class token, or the positions of a feature map, row by row, layer-normalised and with cosine position embeddings added (which a
    convolutional model has none of). pooled (B, dim) is the class token if there is one, else the mean.

    Args:
        name: a timm model ("resnet18", "vit_small_patch16_224.augreg_in21k") or a folder with config.json and model.safetensors.
        pretrained: load its pretrained weights; False trains from scratch.
        image_size: side in pixels, or [height, width]; the model's own if None.
        frozen: no gradient, eval mode.
        options: further arguments of the timm model (drop_path_rate, channels, ...); in_chans: 1 converts the images to greyscale, other
            numbers read images of as many channels (ImageInput's channels), to which timm adapts pretrained weights.
        data_config: overrides of the model's own mean, std and interpolation. Mean and std of other than 1 or 3 channels are 0.5.

    Raises UserError for an unknown name, weights that are not available, and a model that can't be built or run with these settings.
    Whether a model has embeddings before its first block, and levels, is checked only when they are used.
    """

    library = "timm's "

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = True,
        image_size: int | tuple[int, int] | None = None,
        frozen: bool = False,
        options: dict[str, Any] | None = None,
        data_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        overrides = check_data_config(data_config, CONSTANTS)
        size = None if image_size is None else height_and_width(image_size)
        self.body = cast(Any, load_timm(name, pretrained, size, options or {}))
        self.memory_format = fastest_format(self.body)
        self.body.to(memory_format=self.memory_format)
        config = resolve_model_data_config(self.body) | overrides
        self.image_size: tuple[int, int] = size or tuple(config["input_size"][1:])
        channels = self.body._model_args.get("in_chans") or config["input_size"][0]
        # The model's own constants are those of RGB.
        mean, std = (config[key] if channels in (1, 3) or key in overrides else 0.5 for key in ("mean", "std"))
        mean, std = self.set_constants(mean, std, channels)
        self.data_config = {"mean": mean, "std": std, "interpolation": config["interpolation"]}
        self.channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
        self.has_batch_statistics = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.body.modules())
        self.known_levels: list[int] | None = None  # computed on first use
        with self.explained("does not run on images of {} x {} pixels".format(*self.image_size)):
            # timm retains modules that only its own classifier uses (head norm, head convolution), which would never get a gradient.
            drop_unused(self, lambda: self(self.example()))
            self.dim = self.probe(self.forward)[0].dim
        if frozen:
            self.freeze()

    def forward(self, x: Images | Tensor) -> Features:
        return self.encode(x, lambda pixels: [self.tokens_of(self.body.forward_features(pixels))])[0]

    def embed(self, x: Images | Tensor) -> Features:
        assert self.embed_dim  # raises UserError if there are no embeddings
        return self.encode(x, self.embeddings)[0]

    @cached_property
    def embed_dim(self) -> int:  # type: ignore[override]
        """The width of `embed`'s features. Raises UserError for a model whose stem can't be run by itself."""
        with self.explained("can't be run up to its first block alone, as early fusion does"):
            return self.probe(lambda x: self.encode(x, self.embeddings))[0].dim

    def levels(self, x: Images | Tensor, depths: Sequence[int]) -> list[Features]:
        requested = self.depth_indices(depths)
        ascending = sorted(set(requested))  # the order in which timm returns them

        def run(pixels: Tensor) -> list[Encoded]:
            maps = self.intermediate(pixels, ascending)
            return [grid_tokens(maps[ascending.index(depth)]) for depth in requested]

        return self.encode(x, run)

    def intermediate(self, pixels: Tensor, indices: list[int] | None = None) -> list[Tensor]:
        """Returns the feature maps (U, D, H, W) after these blocks or stages, all if None."""
        return self.body.forward_intermediates(pixels, indices=indices, output_fmt="NCHW", intermediates_only=True)

    def level_dims(self, depths: Sequence[int]) -> list[int]:
        return [self.level_channels()[depth] for depth in self.depth_indices(depths)]

    @property
    def depth(self) -> int:
        return len(self.level_channels())

    def level_channels(self) -> list[int]:
        """The width of each level. Raises UserError for a model that does not return intermediate features."""
        if self.known_levels is None:
            with self.explained("gives no features of its levels"):
                levels = self.probe(lambda x: self.encode(x, lambda pixels: list(map(grid_tokens, self.intermediate(pixels)))))
            self.known_levels = [features.dim for features in levels]
        return self.known_levels

    def depth_indices(self, depths: Sequence[int]) -> list[int]:
        count = self.depth
        for depth in depths:
            if not -count <= depth < count:
                raise UserError(f"'{self.name}' has {count} levels; there is no depth {depth}")
        return [depth % count for depth in depths]

    def checkpoint_activations(self) -> None:
        try:
            self.body.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise UserError(f"timm's '{self.name}' does not support activation checkpointing") from error

    def layers_of_parameters(self) -> dict[str, int]:
        with self.explained("does not define which layer a parameter belongs to"):
            layers = group_parameters(self.body, self.body.group_matcher(coarse=False), reverse=True)
        return {f"body.{name}": layer for name, layer in layers.items()}

    def spec(self) -> dict[str, Any]:
        options = {key: value for key, value in self.body._model_args.items() if key not in ("num_classes", "img_size")}
        architecture = self.body.pretrained_cfg.get("architecture") or self.name
        return {
            "name": architecture,
            "pretrained": False,
            "image_size": list(self.image_size),
            "frozen": self.frozen,
            "options": options,
            "data_config": self.data_config,
        }

    def tokens_of(self, y: Tensor) -> Encoded:
        """Converts the body's output: a map (U, D, H, W) or (U, H, W, D), or tokens (U, N, D)."""
        if not isinstance(y, Tensor) or y.dim() not in (3, 4):
            shape = f"a tensor of {y.dim()} dimensions" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise UserError(f"timm's '{self.name}' gives {shape}; expected one feature map (B, D, H, W) or tokens (B, N, D)")
        if y.dim() == 4:
            return grid_tokens(y.permute(0, 3, 1, 2) if self.channels_last else y)
        prefix = getattr(self.body, "num_prefix_tokens", 0) or 0
        return Encoded(y, y[:, 0] if prefix else y.mean(dim=1))

    def embeddings(self, pixels: Tensor) -> list[Encoded]:
        """Encoding before the first block, with the model's own positions if it has a method that adds them, else with cosines."""
        stem = self.stem()
        if not stem:
            parts = ", ".join(name for name, _ in self.body.named_children())
            known = ", ".join("+".join(names) for names in STEMS)
            raise UserError(f"early fusion can't find the stem of '{self.name}': its parts are {parts}; expected one of {known}")
        y = pixels
        for part in stem:
            y = first(getattr(self.body, part)(y))
        if hasattr(self.body, "_pos_embed"):  # a vision transformer's class token and positions
            y = first(self.body._pos_embed(y))
            if y.dim() == 3:
                return [self.tokens_of(self.body.norm_pre(y) if hasattr(self.body, "norm_pre") else y)]
        y = as_map(y, pixels, self.channels_last)
        return [grid_tokens(at_most(y, LARGEST_GRID))]

    def stem(self) -> list[str]:
        for names in STEMS:
            if hasattr(self.body, names[0]):
                return [name for name in names if hasattr(self.body, name)]
        return []


def grid_tokens(y: Tensor) -> Encoded:
    """A feature map (U, D, H, W) as H*W tokens, normalised and with their positions added; pooled is the map's plain mean."""
    tokens = y.flatten(2).transpose(1, 2)
    return Encoded(layer_norm(tokens, tokens.shape[-1:]) + positions_2d(y), tokens.mean(dim=1))


def at_most(y: Tensor, side: int) -> Tensor:
    """A map (U, D, H, W) reduced to at most `side` positions per axis: adaptive average pooling as matrix products, whose gradient is
    deterministic on CUDA."""
    for axis in (2, 3):
        if y.shape[axis] > side:
            y = (averages(y.shape[axis], side, y.device).to(y.dtype) @ y.movedim(axis, -2)).movedim(-2, axis)
    return y


def averages(length: int, parts: int, device: torch.device) -> Tensor:
    """Averaging matrix (parts, length) with one row per part; parts overlap by one position where they can't be of equal size, as in
    torch's adaptive pooling.

    >>> averages(3, 2, torch.device("cpu"))
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.5000, 0.5000]])
    """
    part, position = torch.arange(parts, device=device)[:, None], torch.arange(length, device=device)
    inside = (position >= part * length // parts) & (position < -(-(part + 1) * length // parts))
    return inside / inside.sum(dim=1, keepdim=True)


def first(y: Any) -> Any:
    """The features from a stage's output, which may also contain the size of its grid or the like."""
    return y[0] if isinstance(y, tuple | list) else y


def as_map(y: Tensor, pixels: Tensor, channels_last: bool) -> Tensor:
    """A stem's output as a map (U, D, H, W): from patches (U, N, D) row by row, or from a map of either layout, which is inferred from the
    aspect ratio of the images.

    channels_last: the layout to assume if both fit.
    """
    height, width = pixels.shape[2:]
    if y.dim() == 3:
        rows = max(1, round((y.shape[1] * height / width) ** 0.5))
        if y.shape[1] % rows:
            raise ValueError(f"its {y.shape[1]} patches do not form a grid")
        return y.transpose(1, 2).unflatten(2, (rows, y.shape[1] // rows))
    first_layout, last_layout = (
        abs(rows * width - columns * height) <= max(height, width) for rows, columns in (y.shape[2:], y.shape[1:3])
    )
    return y.permute(0, 3, 1, 2) if last_layout and (channels_last or not first_layout) else y


def positions_2d(y: Tensor) -> Tensor:
    """Cosine position embeddings (H*W, D) of a map (B, D, H, W): cosines of the row, then of the column, half of D each.

        cos(pi * k * (i + 1/2) / n),  k = 1, 2, ..., for row or column i of n

    The basis of the cosine transform: its first function spans the map whatever its size, whereas the usual sinusoids of
    absolute positions hardly vary over a small map.
    """
    _, dim, height, width = y.shape
    half = -(-dim // 2)
    waves = torch.arange(1, half + 1, device=y.device, dtype=torch.float32) * torch.pi
    rows = torch.cos((torch.arange(height, device=y.device, dtype=torch.float32)[:, None] + 0.5) / height * waves)
    columns = torch.cos((torch.arange(width, device=y.device, dtype=torch.float32)[:, None] + 0.5) / width * waves)
    rows, columns = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)[:, :dim].to(y.dtype)


def fastest_format(body: nn.Module) -> torch.memory_format:
    """Channels last, in which convolutions run 1.3 to 1.6 times as fast on a CPU, and faster on GPUs under autocast; but not for a strided
    1 x 1 convolution of few channels (FastViT, MobileOne): its gradient on a CPU writes out of bounds and aborts the process (torch 2.14).
    """
    strided = (m for m in body.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1))
    return torch.contiguous_format if any(m.in_channels < 32 for m in strided) else torch.channels_last


def load_timm(name: str, pretrained: bool, size: tuple[int, int] | None, options: dict[str, Any]) -> nn.Module:
    folder = Path(name).expanduser()
    is_folder = folder.is_dir() or name.startswith((".", "/", "~"))
    if is_folder and not (folder / "config.json").is_file():
        raise UserError(f"image encoder: no config.json in folder '{name}'; expected a timm model folder (config.json, model.safetensors)")
    source = f"local-dir:{folder}" if is_folder else name
    architecture = name.split(".")[0]
    if not is_folder and ":" not in name and not timm.is_model(architecture):
        raise UserError(f"unknown image encoder '{name}'. {nearest(architecture, timm.list_models())} timm.list_models() lists them all.")

    def create(**more: Any) -> nn.Module:
        with reject_missing_weights():
            return timm.create_model(source, pretrained=pretrained, num_classes=0, **options, **more)

    try:
        # The weights of transformers depend on their grid: these models need img_size, and only these accept it.
        fixed = is_folder or ":" in name or timm.get_pretrained_cfg_value(architecture, "fixed_input_size")
        if size and fixed:
            try:
                return create(img_size=size[0] if size[0] == size[1] else size)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
        return create()
    except UserError:
        raise
    except Exception as error:  # of any type, from within the model's own code
        unavailable = OSError | RuntimeError | ValueError | LookupError | SafetensorError if pretrained else OSError
        if isinstance(error, unavailable):
            tried = str(folder) if is_folder else f"hub weights of {name}"
            raise UserError(
                f"image encoder: pretrained weights could not be loaded (tried {tried}: {first_line(error)}). Use "
                "--model.image.name=FOLDER with config.json and model.safetensors, or train from scratch: --model.image.pretrained=false"
            ) from error
        of_size = f" and size {size[0]} x {size[1]}" if size else ""
        raise UserError(f"image encoder '{name}' rejected its options {options}{of_size}: {first_line(error)}") from error


@contextmanager
def reject_missing_weights() -> Iterator[None]:
    """Raises RuntimeError for weights missing in a file, which timm leaves at random and reports only in its log, at level INFO."""
    logger = logging.getLogger("timm.models._builder")
    level, shown = logger.level, logger.getEffectiveLevel()

    def reject(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("Missing keys"):
            raise RuntimeError(shorten(record.getMessage().partition(" discovered")[0], 160))
        return record.levelno >= shown

    logger.addFilter(reject)
    logger.setLevel(min(shown, logging.INFO))
    try:
        yield
    finally:
        logger.removeFilter(reject)
        logger.setLevel(level)
