"""One model of every family that timm lists, at its own size: each reading works, or is refused with the reason."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch

from fusion.encoders import Images, TimmImage
from fusion.errors import UserError
from fusion.features import Features

# Reasons that a model is no encoder here, or lacks a reading.
REASONS = re.compile(
    r"^timm's '\w+' gives a list; expected one feature map"  # several branches, no single map
    r"|^early fusion can't find the stem of '\w+': its parts are .*; expected one of "
    r"|^timm's '\w+' can't be run up to its first block alone, as early fusion does \(\w+: .+\)$"
    r"|^timm's '\w+' gives no features of its levels \(\w+: .+\)$"
)
# Transformers of 88 to 412 million parameters at 384 to 768 pixels, a minute and more each: with one of their blocks, which are all alike.
ONE_BLOCK = ("deepseek_vit", "gemma4_vit", "naflexvit", "qwen3_vit")


def smallest(family: str) -> str:
    """The family's model of fewest parameters, built without memory for them."""

    def parameters(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())

    names = timm.list_models(module=family)
    return min([name for name in names if name.startswith("test_")] or names, key=parameters)  # timm's own for tests are its smallest


def works_or_is_refused(read: Callable[[], Any]) -> Any:
    """What is read, or None with a reason that is known."""
    reason = None
    try:
        found = read()
    except UserError as refused:
        reason = str(refused)
    if reason is not None:
        assert REASONS.search(reason), reason
        return None
    for features in found if isinstance(found, list) else [found]:
        assert features.tokens.isfinite().all()
        assert features.tokens.shape[:2] == features.mask.shape
        assert features.pooled.shape == (1, features.dim)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", timm.list_modules())
def test_a_model_of_every_family_works_or_is_refused_with_the_reason(family: str) -> None:
    torch.manual_seed(0)
    made: list[TimmImage] = []

    def forward() -> Features:
        made.append(TimmImage(smallest(family), pretrained=False, options={"depth": 1} if family in ONE_BLOCK else None).eval())
        return made[0](batch(made[0]))

    with torch.no_grad():
        if works_or_is_refused(forward) is None:
            return
        (encoder,) = made
        if (embedded := works_or_is_refused(lambda: encoder.embed(batch(encoder)))) is not None:
            assert embedded.dim == encoder.embed_dim
        if (levels := works_or_is_refused(lambda: encoder.levels(batch(encoder), [0, -1]))) is not None:
            assert [f.dim for f in levels] == encoder.level_dims([0, -1])


def batch(encoder: TimmImage) -> Images:
    pixels = torch.rand(1, 3, *encoder.image_size, generator=torch.Generator().manual_seed(1))
    return Images(pixels, torch.tensor([True]))
