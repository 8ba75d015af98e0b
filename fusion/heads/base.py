"""The one contract that every fusion head keeps."""

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from fusion.features import Features, promote, zero_masked

Stage = Literal["embeddings", "tokens", "pooled"]
Family = Literal["early", "intermediate", "late", "cross-attention", "none"]


class FusionOutput(NamedTuple):
    """What a head gives back.

    output (B, out_dim); by_modality: a modality's own prediction (B, out_dim), where the head makes one.
    The row of a sample that lacks the modality carries no meaning there.
    """

    output: Tensor
    by_modality: dict[str, Tensor]


class FusionHead(nn.Module):
    """Base of the heads: takes any number of modalities' features to one prediction.

    A head says what it reads (`stage`): "embeddings" (patches and words before any encoder layer), "tokens" or "pooled"
    (the encoders' output). It implements `fuse(features) -> (B, width)`; this base promotes plain tensors, puts the
    modalities in the order of `dims`, zeroes what stands under a False mask and projects to `out_dim`.

    dims maps a modality's name to the width of its features, in order. With `unimodal=True` each modality also gets a
    linear prediction of its own from its pooled features, for auxiliary losses and for evidence.
    """

    stage: ClassVar[Stage]
    family: ClassVar[Family]
    reads_shared: ClassVar[bool] = False  # whether `fuse` takes features with `rows`
    fewest_modalities: ClassVar[int] = 2

    def __init__(self, dims: Mapping[str, int], out_dim: int, *, width: int | None, unimodal: bool = False) -> None:
        super().__init__()
        check_dims(type(self).__name__, dims, out_dim, self.fewest_modalities)
        self.dims = dict(dims)
        self.out_dim = out_dim
        self.classifier = None if width is None else nn.Linear(width, out_dim)
        self.unimodal = nn.ModuleDict({name: nn.Linear(dim, out_dim) for name, dim in dims.items()}) if unimodal else None

    def forward(self, features: Mapping[str, Features | Tensor]) -> FusionOutput:
        clean = self.read(features)
        assert self.classifier is not None  # heads without one override forward
        return FusionOutput(self.classifier(self.fuse(clean)), self.predict_alone(clean))

    def fuse(self, features: dict[str, Features]) -> Tensor:
        """(B, width) from features that are complete, in order, and zero under every False mask."""
        raise NotImplementedError

    def read(self, features: Mapping[str, Features | Tensor]) -> dict[str, Features]:
        """Checked, promoted, ordered and zeroed features. Raises ValueError for a modality missing, unknown or of another width."""
        if features.keys() != self.dims.keys():
            raise ValueError(f"{type(self).__name__} was built for {', '.join(self.dims)}; got {', '.join(features) or 'nothing'}")
        given = {name: promote(features[name]) for name in self.dims}
        clean = {name: zero_masked(f if self.reads_shared else f.unshared()) for name, f in given.items()}
        for name, dim in self.dims.items():
            if clean[name].dim != dim:
                raise ValueError(f"{type(self).__name__} was built for '{name}' of width {dim}; got {clean[name].dim}")
        return clean

    def predict_alone(self, features: dict[str, Features]) -> dict[str, Tensor]:
        if self.unimodal is None:
            return {}
        return {name: self.unimodal[name](features[name].unshared().pooled) for name in self.dims}


def check_dims(head: str, dims: Mapping[str, int], out_dim: int, fewest: int) -> None:
    if len(dims) < fewest:
        raise ValueError(f"{head} fuses at least {fewest} modalities; got {', '.join(dims) or 'none'}. For one modality use Unimodal")
    for name, dim in dims.items():
        # The names become those of submodules.
        if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"'{name}' can't name a modality; take a plain word such as text, image or report")
        if dim < 1:
            raise ValueError(f"{head}: the width of '{name}' is {dim}; expected at least 1")
    if out_dim < 1:
        raise ValueError(f"{head}: out_dim is {out_dim}; expected at least 1")
