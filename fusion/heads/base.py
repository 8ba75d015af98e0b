"""The contract of all fusion heads."""

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

from torch import Tensor, nn

from fusion.features import Features, as_one_token, promote, zero_masked
from fusion.heads.missing_tokens import Missing, MissingTokens

Stage = Literal["embeddings", "levels", "tokens", "pooled"]
Family = Literal["early", "intermediate", "late", "cross-attention", "none"]


class FusionOutput(NamedTuple):
    """Output of a fusion head.

    output (B, out_dim); by_modality: each modality's own prediction (B, out_dim), if the head makes one.
    The row of a sample without the modality is meaningless there. auxiliary (B,): in training, each sample's weighted auxiliary loss, to be
    added to the loss of the output; None if the head has none. confidence: by modality (B,), the head's prediction of the probability that
    the modality gives to the true class; None if it makes none. features: by modality its pooled features (B, D), zero where it is absent,
    and under "fused" what the last layer reads; those that FusionModel.report_features asks for, None for none.
    """

    output: Tensor
    by_modality: dict[str, Tensor]
    auxiliary: Tensor | None = None
    confidence: dict[str, Tensor] | None = None
    features: dict[str, Tensor] | None = None


class FusionHead(nn.Module):
    """Base class of the heads: maps the features of any number of modalities to one prediction.

    `stage` declares what a head reads: "embeddings" (patches and words before any encoder layer), "levels" (several depths of
    each encoder), "tokens" or "pooled" (the encoders' output). A head implements `fuse(features) -> (B, width)`; this base class
    promotes plain tensors, orders the modalities as in `dims`, zeroes masked values and projects to `out_dim`.

    dims maps a modality's name to the width of its features, in order. With `unimodal=True` each modality also gets a
    linear prediction of its own from its pooled features, for auxiliary losses and for analysis. With `missing="learned"`, an option of
    the heads that read tokens, `fuse` gets one learned token in the place of a missing modality (MissingTokens).

    `init_args` holds the constructor's arguments other than dims and out_dim: `type(head)(dims, out_dim, **head.init_args)` builds an equal
    head, so that a checkpoint does not depend on the function that built it.
    """

    init_args: dict[str, Any]

    stage: Stage  # a class attribute, overridden in an instance where an option makes it read less
    family: ClassVar[Family]
    reads_shared: ClassVar[bool] = False  # whether `fuse` takes features with `rows`
    fewest_modalities: ClassVar[int] = 2
    most_modalities: ClassVar[int | None] = None  # 2 where the method is defined for two modalities only
    narrowest: ClassVar[int] = 2  # layer normalisation of a single number is always 0
    fewest_outputs: ClassVar[int] = 1
    one_of_classes: bool = False  # whether its formula assumes mutually exclusive classes
    embeds_pairs: ClassVar[bool] = False  # whether its output is two embeddings, for retrieval

    def __new__(cls, *args: Any, **options: Any) -> Self:
        head = super().__new__(cls)  # copies and pickles call it without arguments, and restore the attribute themselves
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        arguments = dict(zip(names, args, strict=False)) | options
        head.__dict__["init_args"] = {name: value for name, value in arguments.items() if name not in (*names[:2], "dims", "out_dim")}
        return head

    def __init__(
        self, dims: Mapping[str, int], out_dim: int, *, width: int | None, unimodal: bool = False, missing: Missing = "masked"
    ) -> None:
        super().__init__()
        check_dims(type(self).__name__, dims, self.fewest_modalities, self.most_modalities, self.narrowest)
        if out_dim < self.fewest_outputs:
            raise ValueError(f"{type(self).__name__}: out_dim is {out_dim}; expected at least {self.fewest_outputs}")
        if missing not in get_args(Missing):
            raise ValueError(f"{type(self).__name__}: missing is '{missing}'; expected {' or '.join(get_args(Missing))}")
        self.dims = dict(dims)
        self.out_dim = out_dim
        self.level_dims: dict[str, list[int]] = {}  # by modality, the widths of the levels that the head reads, if any
        self.classifier = None if width is None else nn.Linear(width, out_dim)
        self.unimodal = nn.ModuleDict({name: nn.Linear(dim, out_dim) for name, dim in dims.items()}) if unimodal else None
        self.missing_tokens = MissingTokens(type(self).__name__, dims) if missing == "learned" else None
        self.reports_fused = False  # whether the output has the features that `classifier` reads
        self.detached = False  # whether the unimodal predictions are probes, which pass no gradient to the features

    def forward(self, features: Mapping[str, Features | Tensor]) -> FusionOutput:
        clean = self.read(features)
        return self.classify(self.fuse(clean), self.predict_alone(clean))

    def classify(self, fused: Tensor, by_modality: dict[str, Tensor]) -> FusionOutput:
        """The output for the fused features (B, width)."""
        assert self.classifier is not None  # heads without one override forward
        return FusionOutput(self.classifier(fused), by_modality, features={"fused": fused} if self.reports_fused else None)

    def fuse(self, features: dict[str, Features]) -> Tensor:
        """Returns the fused features (B, width) from features that are complete, in order, and zero where masked."""
        raise NotImplementedError

    def read(self, features: Mapping[str, Features | Tensor]) -> dict[str, Features]:
        """Checks, promotes, orders and zeroes the features. Raises ValueError for a missing or unknown modality, or another width."""
        self.check_names(features)
        promoted = {name: promote(features[name]) for name in self.dims}
        for name, dim in self.dims.items():
            self.check_width(name, promoted[name], dim)
        self.check_sizes(promoted)
        if self.stage == "pooled":  # the unused tokens then cost nothing
            clean = {name: as_one_token(f) for name, f in promoted.items()}
        else:
            shared = self.reads_shared and self.missing_tokens is None
            clean = {name: zero_masked(f if shared else f.unshared()) for name, f in promoted.items()}
        return clean if self.missing_tokens is None else self.missing_tokens(clean)

    def output_layers(self) -> list[nn.Module]:
        """The last linear layers, which produce `output` and `by_modality`."""
        joint = [] if self.classifier is None else [self.classifier]
        return [*joint, *([] if self.unimodal is None else self.unimodal.values())]

    # Saving of a head alone (fusion/heads/saved.py, imported here so that the heads themselves need torch alone)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save the head to a folder: config.json (its class, widths and arguments) and model.safetensors.

        Raises UserError for a head that these would not rebuild, and where the folder can't be written.
        """
        from fusion.heads.saved import save

        save(self, folder)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, trusted: Sequence[str] = ()) -> Self:
        """Load a head that `save_pretrained` or `push_to_hub` has saved; in eval mode, on the CPU. Called on FusionHead it returns a head
        of whatever class was saved. No code is executed: a class outside fusion must have been imported before.

        Args:
            source: a folder, or USER/NAME or USER/NAME@REVISION on the Hugging Face Hub.
            trusted: names of packages that may be imported to find the head's class.

        Raises UserError for what is no such head, for a head of another class, and for a hub that can't be reached.
        """
        from fusion.heads.saved import load

        return load(cls, source, trusted)

    def push_to_hub(self, repository: str, *, private: bool = False, message: str = "Push a fusion head") -> str:
        """Upload the head to the Hugging Face Hub, as `save_pretrained` saves it; returns the page of the commit.

        Args:
            repository: USER/NAME, which is made if there is none.
            private: make a repository that only its owners can read.
            message: of the commit.

        Raises UserError as `save_pretrained` does, without a login, and for a repository that may not be written to.
        """
        from fusion.heads.saved import push

        return push(self, repository, private=private, message=message)

    def check_names(self, features: Mapping[str, object]) -> None:
        if features.keys() != self.dims.keys():
            raise ValueError(f"{type(self).__name__} was built for {', '.join(self.dims)}; got {', '.join(features) or 'nothing'}")

    def check_width(self, name: str, features: Features, dim: int) -> None:
        if features.dim != dim or features.pooled.shape[-1] != dim:
            width = features.dim if features.dim != dim else f"pooled features of {features.pooled.shape[-1]}"
            raise ValueError(f"{type(self).__name__} was built for '{name}' of width {dim}; got {width}")

    def check_sizes(self, features: Mapping[str, Features]) -> None:
        sizes = {name: f.mask.shape[0] for name, f in features.items()}
        if any(size != next(iter(sizes.values())) for size in sizes.values()):  # they would be broadcast silently
            numbers = ", ".join(f"{size} of '{name}'" for name, size in sizes.items())
            raise ValueError(f"{type(self).__name__}: every modality must have the same number of samples; got {numbers}")

    def predict_alone(self, features: dict[str, Features]) -> dict[str, Tensor]:
        if self.unimodal is None:
            return {}
        pooled = {name: features[name].unshared().pooled for name in self.dims}
        return {name: self.unimodal[name](x.detach() if self.detached else x) for name, x in pooled.items()}


def check_options(head: str, **options: float) -> None:
    """Raises ValueError for sizes below 1, and for a dropout or mlp_ratio that is out of range."""
    for name, value in options.items():
        if name == "dropout":
            if not 0 <= value < 1:
                raise ValueError(f"{head}: dropout is {value}; expected a probability, from 0 to below 1")
        elif name == "mlp_ratio":
            if not 0 < value < math.inf:
                raise ValueError(f"{head}: mlp_ratio is {value}; expected a number above 0")
        elif value < 1:
            raise ValueError(f"{head}: {name} is {value}; expected at least 1")


def check_dims(head: str, dims: Mapping[str, int], fewest: int, most: int | None, narrowest: int) -> None:
    if len(dims) < fewest:
        raise ValueError(f"{head} fuses at least {fewest} modalities; got {', '.join(dims) or 'none'}. For one modality use Unimodal")
    if most is not None and len(dims) > most:
        raise ValueError(
            f"{head} fuses {most} modalities, as in its paper; got {', '.join(dims)}. For more use CrossAttention or LowRankTensor"
        )
    for name, dim in dims.items():
        # The names become those of submodules.
        if not name.isidentifier() or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
            raise ValueError(f"'{name}' is not a valid name of a modality; use a plain word such as text, image or report")
        if dim < narrowest:
            narrow = "; layer normalisation maps a single number to 0: embed it in more dimensions first" if narrowest > 1 else ""
            raise ValueError(f"{head}: the width of '{name}' is {dim}; expected at least {narrowest}{narrow}")


def stream_and_other(head: str, dims: Mapping[str, int], chosen: str | None, *, usual: str) -> tuple[str, str]:
    """Returns the modality that is transformed (the stream, `chosen` or else the usual one) and the one that conditions it.

    >>> stream_and_other("FiLM", {"text": 8, "image": 16}, None, usual="image")
    ('image', 'text')
    """
    stream = chosen or default_modality(usual, dims)
    if stream not in dims:
        raise ValueError(f"{head}: stream is '{stream}'; expected one of the modalities {', '.join(dims)}")
    return stream, next(name for name in dims if name != stream)


def default_modality(usual: str, dims: Mapping[str, int]) -> str:
    """The modality named "text" or "image"; if there is none of that name, the first for "text", the last for "image"."""
    return usual if usual in dims else list(dims)[0 if usual == "text" else -1]
