"""The model of encoders and a fusion head, which is trained, exported, served and reused."""

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
from fusion.features import Features, as_one_token, promote
from fusion.heads.base import FusionHead, FusionOutput, Stage

HeadFactory = Callable[[Mapping[str, Any], int], FusionHead]


class FusionModel(nn.Module):
    """One encoder per modality, and a head that fuses their features: a plain module without loss or Lightning.

    encoders: by the modality's name, in the order of the head's `dims`. Parts of an encoder that the head's stage doesn't use
    are removed. Use `FusionModel.build` to make a head for the widths of the encoders.
    """

    def __init__(self, encoders: Mapping[str, Encoder], head: FusionHead) -> None:
        super().__init__()
        if list(encoders) != list(head.dims):
            raise ValueError(f"the head was built for {', '.join(head.dims)}; the encoders are {', '.join(encoders)}")
        pooled = not any(encoder.has_pooler for encoder in encoders.values()) or reads_pooled(head)
        for name, encoder in encoders.items():
            encoder.trim(head.stage, depths_of(head, name), pooled=pooled)
        self.encoders = nn.ModuleDict(encoders)
        self.head = head
        self.recompute_head = False
        self.reported: list[str] = []  # modalities of which the output has the pooled features

    @classmethod
    def build(cls, encoders: Mapping[str, Encoder], head: HeadFactory, out_dim: int) -> "FusionModel":
        """Builds the model with a head for the widths of these encoders.

        head: returns a FusionHead for widths and `out_dim`: a class, a functools.partial of one, or any function. A function is called
        again with other widths if the head that it returns reads levels or embeddings.

        Raises UserError for arguments that the head's constructor rejects, and for encoders without the features that the head reads.
        """
        return cls(encoders, make_head(encoders, head, out_dim))

    def forward(self, inputs: Mapping[str, Any], modality_mask: Mapping[str, Tensor] | None = None) -> FusionOutput:
        """Encodes and fuses the inputs: output (B, out_dim) and the predictions by modality.

        inputs: by name, the encoder's input (Images, Texts, Columns). modality_mask: by name, (B,) bool, False for samples whose input is
        treated as missing.
        """
        features = self.encode(inputs, modality_mask)
        output = self.fuse(features)
        if not self.reported:
            return output
        pooled = {name: as_one_token(f[-1] if isinstance(f, list) else f).pooled for name, f in features.items() if name in self.reported}
        return output._replace(features=pooled | (output.features or {}))

    def encode(self, inputs: Mapping[str, Any], modality_mask: Mapping[str, Tensor] | None = None) -> dict[str, Features | list[Features]]:
        """Returns, by name, the features of each input that the head reads; a list with one entry per depth if it reads levels.

        inputs, modality_mask: as for `forward`.
        """
        features: dict[str, Features | list[Features]] = {}
        for name, encoder in self.encoders.items():
            assert isinstance(encoder, Encoder)  # a type that nn.ModuleDict doesn't preserve
            encoded = encoder.read(inputs[name], self.head.stage, depths_of(self.head, name))
            if modality_mask is not None:
                mask = modality_mask[name]
                encoded = [mask_samples(f, mask) for f in encoded] if isinstance(encoded, list) else mask_samples(encoded, mask)
            features[name] = encoded
        return features

    def fuse(self, features: Mapping[str, Features | list[Features]]) -> FusionOutput:
        """Applies the head to features from `encode`; with stored features, heads can be trained and compared without encoders."""
        return checkpoint(self.head, features, use_reentrant=False) if self.recompute_head and self.training else self.head(features)

    def report_features(self, names: Collection[str]) -> dict[str, int]:
        """From now on the output has the pooled features of these modalities (of the last level, if the head reads several), and for
        "fused" those that the head's last layer reads. Returns their widths. Raises UserError for a name that the model doesn't have.
        """
        layer = self.head.classifier
        known = {name: self.head.dims[name] for name in self.encoders} | ({} if layer is None else {"fused": layer.in_features})
        for name in names:
            if name not in known:
                why = f"its head {type(self.head).__name__} has no fused features before its last layer. " if name == "fused" else ""
                raise UserError(f"the model has no features '{name}': {why}{nearest(name, known)}")
        self.reported = [name for name in names if name in self.encoders]
        self.head.reports_fused = "fused" in names
        return {name: known[name] for name in names}

    def parts(self) -> dict[str, nn.Module]:
        """The encoders by modality, then the head."""
        return {**dict(self.encoders.items()), "head": self.head}

    def checkpoint_activations(self, parts: Collection[str]) -> None:
        """Recompute the activations of these parts in the backward pass instead of storing them: less memory, more time."""
        for name, encoder in self.encoders.items():
            assert isinstance(encoder, Encoder)
            if name in parts:
                encoder.checkpoint_activations()
        self.recompute_head = "head" in parts


def plain_name(name: str) -> str:
    """A parameter's name as shown to users, which begins with the part that it belongs to.

    >>> plain_name("encoders.text.body.embeddings.word_embeddings.weight"), plain_name("head.classifier.bias")
    ('text.body.embeddings.word_embeddings.weight', 'head.classifier.bias')
    """
    return name.removeprefix("encoders.")


def part_of(name: str) -> str:
    """The part that a parameter belongs to: a modality, or "head"."""
    return plain_name(name).partition(".")[0]


def check_part(option: str, part: str, modalities: Sequence[str], more: str = "") -> None:
    """Raises UserError if `part` is not a part of the model."""
    if part not in (*modalities, "head"):
        raise UserError(f"{option}: unknown part '{part}'. {nearest(part, [*modalities, 'head'])}{more}")


def mask_samples(features: Features, modality_mask: Tensor) -> Features:
    """The features with all tokens masked of the samples where modality_mask (B,) is False."""
    return features._replace(mask=features.mask & modality_mask[:, None], full=None)


def widths(encoder: Encoder, stage: Stage) -> int | list[int]:
    """The width of the features that a head of this stage reads; for "levels" the widths of all depths."""
    if stage == "levels":
        return encoder.level_dims(range(encoder.depth))
    return encoder.embed_dim if stage == "embeddings" else encoder.dim


def depths_of(head: FusionHead, name: str) -> list[int]:
    """The depths of an encoder that the head reads, counted from the last: -2, -1; none unless it reads levels."""
    return list(range(-len(head.level_dims.get(name, [])), 0))


def reads_pooled(head: FusionHead) -> bool:
    """Whether the head reads pooled features, as heads of tokens do for unimodal predictions alone: found by their gradient."""
    if head.stage != "tokens":
        return True
    training, weight = head.training, next(head.parameters())
    features = {name: promote(torch.ones(1, 4, dim, device=weight.device, dtype=weight.dtype)) for name, dim in head.dims.items()}
    pooled = [f.pooled.requires_grad_() for f in features.values()]
    head.eval()
    with torch.enable_grad():
        found = head(features)
        total = torch.stack([y.float().sum() for y in (found.output, *found.by_modality.values())]).sum()
        gradients = torch.autograd.grad(total, pooled, allow_unused=True)
    head.train(training)
    return any(gradient is not None for gradient in gradients)


def make_head(encoders: Mapping[str, Encoder], factory: HeadFactory, out_dim: int) -> FusionHead:
    """Builds the head for the widths of the features that it reads."""
    known = head_class(factory)
    dims = all_widths(encoders, known.stage if known else "pooled")
    random_state = torch.get_rng_state()
    head = call_factory(factory, dims, out_dim)
    own_dims = all_widths(encoders, head.stage)
    if own_dims == dims:
        return head
    torch.set_rng_state(random_state)  # so that the initial weights equal those of a head built once
    return call_factory(factory, own_dims, out_dim)


def all_widths(encoders: Mapping[str, Encoder], stage: Stage) -> dict[str, int | list[int]]:
    return {name: widths(encoder, stage) for name, encoder in encoders.items()}


def call_factory(factory: HeadFactory, dims: Mapping[str, Any], out_dim: int) -> FusionHead:
    with construction():  # heads depend on torch alone, and don't raise UserError
        head = factory(dims, out_dim)
    if not isinstance(head, FusionHead):
        raise TypeError(f"expected a function (dims, out_dim) that returns a FusionHead; {factory!r} returned a {type(head).__name__}")
    return head


def head_spec(model: FusionModel) -> dict[str, Any]:
    """The model's head as plain data for a checkpoint: its class, and the arguments that rebuild it.

    Raises UserError for a head that these would not rebuild.
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
        rebuilt = make_head(dict(model.encoders.items()), partial(cls, **head.init_args), head.out_dim)  # type: ignore[arg-type]
    shapes, expected = ({key: tuple(x.shape) for key, x in one.state_dict().items()} for one in (rebuilt, head))
    if shapes != expected:
        different = next(key for key in {**expected, **shapes} if shapes.get(key) != expected.get(key))
        raise UserError(
            f"the head can't be saved: {cls.__name__} with arguments {head.init_args} has {different} of shape {shapes.get(different)}, "
            f"this head {expected.get(different)}; it must not be changed after construction"
        )
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "init": dict(head.init_args)}


def is_plain(value: Any) -> bool:
    """Whether a value consists only of None, booleans, numbers, strings, lists, tuples and dicts.

    >>> is_plain({"dim": 8, "depths": [1, 2]}), is_plain({"activation": len})
    (True, False)
    """
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, [*value, *value.values()]))
    return value is None or type(value) in (bool, int, float, str)


def head_class(factory: HeadFactory) -> type[FusionHead] | None:
    """The head class of a factory; None if it is unknown until the factory is called."""
    try:
        return factory_parts(factory, FusionHead)[0]
    except TypeError:
        return None


def factory_parts(factory: Any, base: type) -> tuple[type, dict[str, Any]]:
    """The class of a factory, and the keyword arguments that it binds.

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
    """Binds unimodal=True to a head's factory, if it accepts that; late heads predict from each modality alone anyway."""
    cls = head_class(factory)
    options = signature(cls or factory).parameters
    accepted = "unimodal" in options or (cls is not None and any(option.kind is option.VAR_KEYWORD for option in options.values()))
    return partial(factory, unimodal=True) if accepted and (cls is None or cls.family != "late") else factory


def predicts_alone(head: FusionHead) -> bool:
    return head.family == "late" or head.unimodal is not None
