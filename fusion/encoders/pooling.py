"""Pooling of a text's tokens to one vector, and what a sentence-transformers folder says of it."""

import json
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from fusion.encoders.pretrained import Source
from fusion.errors import UserError
from fusion.features import keep, masked_mean

Pooling: TypeAlias = Literal["mean", "first", "last", "max", "mean_sqrt_len", "weighted_mean"]
# As 1_Pooling/config.json names them: by flags "pooling_mode_...", newer ones by "pooling_mode" alone.
FLAGS: dict[str, Pooling] = {
    "mean_tokens": "mean",
    "cls_token": "first",
    "lasttoken": "last",
    "max_tokens": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean_tokens": "weighted_mean",
}


class SentencePooling(NamedTuple):
    """How a sentence-transformers model makes one vector of a text. normalize: whether its length is then 1."""

    pooling: Pooling
    normalize: bool


def pool(tokens: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector (B, D) for each text, of its tokens (B, N, D) where mask (B, N) is True.

    "mean_sqrt_len" is the sum over the square root of the number of tokens; "weighted_mean" weighs the n-th token by n.
    """
    if pooling == "first":
        return tokens[:, 0]
    if pooling == "last":
        return token_at(tokens, (mask.sum(dim=1) - 1).clamp(min=0))
    if pooling == "max":
        lowest = torch.finfo(tokens.dtype).min
        return keep(tokens.masked_fill(~mask[..., None], lowest).amax(dim=1), mask.any(dim=1))
    if pooling == "mean_sqrt_len":
        return masked_mean(tokens, mask) * mask.sum(dim=1, keepdim=True).sqrt().to(tokens.dtype)
    if pooling == "weighted_mean":
        weights = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=torch.float32)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        return (keep(tokens, mask) * weights[..., None]).sum(dim=1).to(tokens.dtype)
    return masked_mean(tokens, mask)


def token_at(tokens: Tensor, position: Tensor) -> Tensor:
    """The token (B, D) at each sample's position (B,)."""
    return tokens.gather(1, position[:, None, None].expand(-1, 1, tokens.shape[-1]))[:, 0]


def check_pooling(pooling: str | None) -> None:
    if pooling is not None and pooling not in get_args(Pooling):
        raise UserError(f"text encoder: pooling is {pooling!r}; expected one of {', '.join(get_args(Pooling))}")


def sentence_pooling(source: Source) -> SentencePooling | None:
    """The pooling of a sentence-transformers hub name or folder (modules.json); None for any other.

    Raises UserError for modules that can't be expressed: Dense, several poolings that are concatenated.
    """
    path = source.file("modules.json")
    if path is None:
        return None
    instead = "To use its transformer alone, choose the pooling: --model.text.pooling=mean"
    where = f"{source.what}: {source.described} (sentence-transformers)"
    modules = [(str(module["type"]).rpartition(".")[2], str(module.get("path") or "")) for module in read_json(path, source)]
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(f"{where} consists of {', '.join(kinds)}; expected Transformer, Pooling and perhaps Normalize. {instead}")
    if modules[0][1]:
        raise UserError(f"{where} has its transformer in '{modules[0][1]}', expected in the folder itself. {instead}, and name that folder")
    config = source.file(f"{modules[1][1]}/config.json")
    if config is None:
        raise UserError(f"{where} has no {modules[1][1]}/config.json. {instead}")
    modes = modes_of(read_json(config, source))
    if len(modes) != 1 or modes[0] not in FLAGS:
        raise UserError(f"{where} pools by {' and '.join(modes) or 'nothing'}; expected one of {', '.join(FLAGS)}. {instead}")
    return SentencePooling(FLAGS[modes[0]], "Normalize" in kinds)


def modes_of(config: dict[str, Any]) -> list[str]:
    """The poolings of 1_Pooling/config.json, by the names of its flags."""
    given = config.get("pooling_mode")
    if given is None:
        return [key.removeprefix("pooling_mode_") for key, value in config.items() if key.startswith("pooling_mode_") and value]
    # "mean" for the flag mean_tokens, "cls" for cls_token, "lasttoken" for itself
    full = {name.removesuffix("_tokens").removesuffix("_token"): name for name in FLAGS}
    return [full.get(mode, mode) for mode in map(str, given if isinstance(given, list) else [given])]


def read_json(path: Any, source: Source) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{source.what}: can't read {path} ({error})") from error
