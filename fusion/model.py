"""Encoders and a head, joined: what is trained, exported, served and reused."""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusion.encoders.base import Encoder
from fusion.errors import UserError, construction, nearest
from fusion.features import Features
from fusion.heads.base import FusionHead, FusionOutput, Stage

HeadFactory = Callable[[Mapping[str, Any], int], FusionHead]


class FusionModel(nn.Module):
    """One encoder a modality, and the head that joins them: a plain module without loss or Lightning.

    encoders: by the modality's name, in the order of the head's `dims`. The parts of an encoder that the head's stage never reads
    are taken out. Use `FusionModel.build` to make the head for the widths of the encoders.
    """

    def __init__(self, encoders: Mapping[str, Encoder], head: FusionHead) -> None:
        super().__init__()
        if list(encoders) != list(head.dims):
            raise ValueError(f"the head was built for {', '.join(head.dims)}; the encoders are {', '.join(encoders)}")
        for name, encoder in encoders.items():
            encoder.trim(head.stage, depths_of(head, name))
        self.encoders = nn.ModuleDict(encoders)
        self.head = head
        self.recompute_head = False

    @classmethod
    def build(cls, encoders: Mapping[str, Encoder], head: HeadFactory, out_dim: int) -> "FusionModel":
        """The model whose head fits these encoders.

        head: gives a FusionHead for widths and `out_dim`: a class, a functools.partial of one, or any function. A function is called again
        with other widths where the head that it gives reads levels or embeddings.

        Raises UserError for what the head's constructor rejects, and for encoders that lack what the head reads.
        """
        return cls(encoders, make_head(encoders, head, out_dim))

    def forward(self, inputs: Mapping[str, Any], kept: Mapping[str, Tensor] | None = None) -> FusionOutput:
        """`fuse` of `encode`: output (B, out_dim) and the predictions by modality.

        inputs: by name, what its encoder takes (Images, Texts, Columns). kept: by name, (B,) bool, False for samples whose input is to
        count as missing.
        """
        return self.fuse(self.encode(inputs, kept))

    def encode(self, inputs: Mapping[str, Any], kept: Mapping[str, Tensor] | None = None) -> dict[str, Features | list[Features]]:
        """By name, the features that the head reads of each input; a list, one for each depth, where it reads levels.

        inputs, kept: as for `forward`.
        """
        features: dict[str, Features | list[Features]] = {}
        for name, encoder in self.encoders.items():
            assert isinstance(encoder, Encoder)  # which nn.ModuleDict's types forget
            read = encoder.read(inputs[name], self.head.stage, depths_of(self.head, name))
            if kept is not None:
                read = [hidden(f, kept[name]) for f in read] if isinstance(read, list) else hidden(read, kept[name])
            features[name] = read
        return features

    def fuse(self, features: Mapping[str, Features | list[Features]]) -> FusionOutput:
        """The head's output of what `encode` gave: of features that were kept, a head is trained and compared without its encoders."""
        return checkpoint(self.head, features, use_reentrant=False) if self.recompute_head and self.training else self.head(features)

    def parts(self) -> dict[str, nn.Module]:
        """The encoders by modality, then the head."""
        return {**dict(self.encoders.items()), "head": self.head}

    def checkpoint_activations(self, parts: Collection[str]) -> None:
        """Compute the activations of these parts again in the backward pass instead of keeping them: less memory, more time."""
        for name, encoder in self.encoders.items():
            assert isinstance(encoder, Encoder)
            if name in parts:
                encoder.checkpoint_activations()
        self.recompute_head = "head" in parts


def plain_name(name: str) -> str:
    """A parameter's name as users see it: the part that it belongs to first.

    >>> plain_name("encoders.text.body.embeddings.word_embeddings.weight"), plain_name("head.classifier.bias")
    ('text.body.embeddings.word_embeddings.weight', 'head.classifier.bias')
    """
    return name.removeprefix("encoders.")


def part_of(name: str) -> str:
    """The part that a parameter belongs to: a modality, or "head"."""
    return plain_name(name).partition(".")[0]


def check_part(option: str, part: str, modalities: Sequence[str], more: str = "") -> None:
    """Raises UserError for what is no part of the model."""
    if part not in (*modalities, "head"):
        raise UserError(f"{option}: unknown part '{part}'. {nearest(part, [*modalities, 'head'])}{more}")


def hidden(features: Features, kept: Tensor) -> Features:
    """The features, all masked in the rows that are not kept."""
    return features._replace(mask=features.mask & kept[:, None], full=None)


def widths(encoder: Encoder, stage: Stage) -> int | list[int]:
    """The width of the features that a head of this stage reads; for "levels" those of all depths."""
    if stage == "levels":
        return encoder.level_dims(range(encoder.depth))
    return encoder.embed_dim if stage == "embeddings" else encoder.dim


def depths_of(head: FusionHead, name: str) -> list[int]:
    """The depths of an encoder that the head reads, counted from the last: -2, -1; none unless it reads levels."""
    return list(range(-len(head.level_dims.get(name, [])), 0))


def make_head(encoders: Mapping[str, Encoder], factory: HeadFactory, out_dim: int) -> FusionHead:
    """The head for the widths of what it reads."""
    known = head_class(factory)
    dims = all_widths(encoders, known.stage if known else "pooled")
    random_state = torch.get_rng_state()
    head = call_factory(factory, dims, out_dim)
    own_dims = all_widths(encoders, head.stage)
    if own_dims == dims:
        return head
    torch.set_rng_state(random_state)  # so that its initial weights are those of a head built once
    return call_factory(factory, own_dims, out_dim)


def all_widths(encoders: Mapping[str, Encoder], stage: Stage) -> dict[str, int | list[int]]:
    return {name: widths(encoder, stage) for name, encoder in encoders.items()}


def call_factory(factory: HeadFactory, dims: Mapping[str, Any], out_dim: int) -> FusionHead:
    with construction():  # heads stand alone, and know no UserError
        head = factory(dims, out_dim)
    if not isinstance(head, FusionHead):
        raise TypeError(f"expected a function (dims, out_dim) that gives a FusionHead; {factory!r} gave a {type(head).__name__}")
    return head


def head_spec(model: FusionModel) -> dict[str, Any]:
    """What a checkpoint says of the model's head, as plain data: its class, and the arguments that build it again.

    Raises UserError for a head that this would not bring back.
    """
    head = model.head
    cls = type(head)
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        raise UserError(f"the head can't be saved: its class {cls.__qualname__} can't be imported; define it at the top of a module")
    for name, value in head.init_args.items():
        if not is_plain(value):
            raise UserError(
                f"the head can't be saved: argument {name} of {cls.__name__} is a {type(value).__name__}; "
                "expected plain data (numbers, strings, lists, dicts)"
            )
    with torch.random.fork_rng(devices=[]):
        again = make_head(dict(model.encoders.items()), partial(cls, **head.init_args), head.out_dim)  # type: ignore[arg-type]
    shapes, expected = ({key: tuple(x.shape) for key, x in one.state_dict().items()} for one in (again, head))
    if shapes != expected:
        different = next(key for key in {**expected, **shapes} if shapes.get(key) != expected.get(key))
        raise UserError(
            f"the head can't be saved: {cls.__name__} with arguments {head.init_args} has {different} of shape {shapes.get(different)}, "
            f"this head {expected.get(different)}; it must not be changed after its constructor"
        )
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "init": dict(head.init_args)}


def is_plain(value: Any) -> bool:
    """Whether it is made of None, booleans, numbers, strings, lists, tuples and dicts alone.

    >>> is_plain({"dim": 8, "depths": [1, 2]}), is_plain({"activation": len})
    (True, False)
    """
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, [*value, *value.values()]))
    return value is None or type(value) in (bool, int, float, str)


def head_class(factory: HeadFactory) -> type[FusionHead] | None:
    """The head class behind a factory; None where only calling it would show."""
    try:
        return factory_parts(factory, FusionHead)[0]
    except TypeError:
        return None


def factory_parts(factory: Any, base: type) -> tuple[type, dict[str, Any]]:
    """The class behind a factory, and the keyword arguments that it binds.

    A factory is a subclass of `base`, a functools.partial of one, or what the command line makes of `class_path` and `init_args`.

    >>> from functools import partial
    >>> from fusion.heads import Gated
    >>> factory_parts(partial(Gated, dim=64), FusionHead)
    (<class 'fusion.heads.gated.Gated'>, {'dim': 64})
    """
    # jsonargparse's factories are partial(instantiator, cls, **kwargs).
    candidates = [factory, getattr(factory, "func", None), *getattr(factory, "args", ())]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, base):
            return candidate, dict(getattr(factory, "keywords", {}))
    raise TypeError(f"expected a {base.__name__} class or a functools.partial of one, got {factory!r}")


def with_unimodal(factory: Callable[..., FusionHead]) -> Callable[..., FusionHead]:
    """The factory of a head that also predicts from each modality alone, where that can be passed on; late heads do anyway."""
    cls = head_class(factory)
    options = signature(cls or factory).parameters
    takes = "unimodal" in options or (cls is not None and any(option.kind is option.VAR_KEYWORD for option in options.values()))
    return partial(factory, unimodal=True) if takes and (cls is None or cls.family != "late") else factory


def predicts_alone(head: FusionHead) -> bool:
    return head.family == "late" or head.unimodal is not None
