"""The contract of all encoders."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from fusion.errors import UserError
from fusion.features import Features, keep
from fusion.inputs import Columns, Images, Texts

Reading = Literal["embeddings", "levels", "tokens", "pooled"]
Tokens = TypeVar("Tokens", Texts, Columns)


class Encoder(nn.Module, ABC):
    """Encodes one modality's input as Features.

    `takes` is the type of its input.
    `dim` is the width of `forward`'s features, `embed_dim` that of `embed`'s. A frozen encoder stays in eval mode, gets no
    gradient and stores no activations. Only `forward` must work: if an encoder has no embeddings or no levels, their methods and widths
    raise UserError.
    """

    takes: ClassVar[type]  # Images, Texts, Columns
    dim: int
    embed_dim: int
    frozen: bool = False
    has_pooler: bool = False  # whether modules of its own make the pooled features, of which the tokens know nothing

    @abstractmethod
    def embed(self, x: Any) -> Features:
        """Features before the first block: patches of an image, words with their positions."""

    @abstractmethod
    def forward(self, x: Any) -> Features:
        """Features after the last block."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Number of levels: blocks of a transformer, stages of a convolutional model."""

    @abstractmethod
    def levels(self, x: Any, depths: Sequence[int]) -> list[Features]:
        """Features after each of the given blocks (or stages); negative depths count from the last."""

    @abstractmethod
    def level_dims(self, depths: Sequence[int]) -> list[int]:
        """The widths of the features that `levels` returns for these depths."""

    @abstractmethod
    def checkpoint_activations(self) -> None:
        """Recompute the blocks' activations in the backward pass instead of storing them. Raises UserError if that is not supported."""

    @abstractmethod
    def layers_of_parameters(self) -> dict[str, int]:
        """The layer of each parameter, by name: 0 before the first block, then 1, 2, ..."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Keyword arguments, as plain data, that rebuild this encoder without any file or hub (a checkpoint has its weights)."""

    @abstractmethod
    def example(self) -> Any:
        """The smallest valid input, for probing the encoder."""

    def read(self, x: Any, what: Reading, depths: Sequence[int] = ()) -> Features | list[Features]:
        """`embed` for "embeddings", `forward` for "tokens" and "pooled", `levels` at the given depths for "levels"."""
        if what == "levels":
            return self.levels(x, depths)
        return self.embed(x) if what == "embeddings" else self(x)

    def trim(self, what: Reading, depths: Sequence[int] = (), *, pooled: bool = True) -> None:
        """Remove every module that reading `what` doesn't use: early fusion has no unused layers, and DDP finds no unused parameters.

        pooled: whether pooled features are read beside tokens. If not, an encoder that pools by modules of its own loses them, and its
        pooled features are then others.
        """
        frozen, self.frozen = self.frozen, False  # the used modules are found by their gradient, which a frozen encoder has none of
        reach: Literal["all", "tokens", "pooled"] = "pooled" if what == "pooled" else "all" if pooled else "tokens"
        drop_unused(self, lambda: self.read(self.example(), what, depths), keep_if_reaches=reach)
        self.frozen = frozen

    def check_mixing(self, what: Reading, depths: Sequence[int] = ()) -> None:
        """Raises UserError unless `read` mixes what its input's `mixture` says. Images are mixed before they are encoded, by pixels, so
        that every encoder of images qualifies."""
        if self.takes is not Images:
            raise UserError(f"a {type(self).__name__} can't encode mixed samples")

    def freeze(self) -> None:
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Encoder":
        return super().train(mode and not self.frozen)


def drop_unused(
    module: nn.Module, run: Callable[[], Features | list[Features]], *, keep_if_reaches: Literal["all", "tokens", "pooled"] = "all"
) -> None:
    """Replace with Identity each module of which no parameter gets a gradient from the features that `run` returns: from tokens and pooled,
    or from one of these."""
    training = module.training
    module.eval()
    named = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    was_trainable = {name: p.requires_grad for name, p in named.items()}
    for p in named.values():
        p.requires_grad_(True)
    with torch.enable_grad():
        features = run()
        levels = [features] if isinstance(features, Features) else features
        parts = [(f.tokens, f.pooled) if keep_if_reaches == "all" else (getattr(f, keep_if_reaches),) for f in levels]
        total = torch.stack([x.sum() for xs in parts for x in xs]).sum()
        gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    for p, trainable in zip(named.values(), was_trainable.values(), strict=True):
        p.requires_grad_(trainable)
    unused = {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}
    dropped: list[str] = []
    for name, child in list(module.named_modules()):
        own = {f"{name}.{key}" for key, _ in child.named_parameters()}
        inside_dropped = any(name.startswith(f"{above}.") for above in dropped)
        if name and own and own <= unused and not inside_dropped:
            module.set_submodule(name, nn.Identity())
            dropped.append(name)
    module.train(training)


def mixed_tokens(tokens: Tensor, x: Tokens) -> tuple[Tensor, Tokens]:
    """Mixes embeddings (B, N, D) of words or cells as `x.mixture` says; returns them, and the input with the mask of the mixed ones.

        e_b <- weight e_b + (1 - weight) e_partner[b]            where the shorter text ends or a cell is missing, its e is zero

    Source: Guo et al. (2019), "Augmenting Data with Mixup for Sentence Classification" (wordMixup). A mixed token is real if it is real in
    either sample.
    """
    if x.mixture is None:
        return tokens, x
    partner, weight = x.mixture
    real = tokens if x.full else keep(tokens, x.mask)
    mixed = weight * real + (1 - weight) * real.index_select(0, partner)
    return mixed, x._replace(mask=x.mask | x.mask.index_select(0, partner), mixture=None)


def fill_absent(x: Tensor, present: Tensor) -> Tensor:
    """Replaces each absent sample of `x` (B, ...) by a present one, so that absent samples don't affect batch statistics.

    Returns zeros if none is present. Shapes are static: it can be compiled and exported.
    """
    index = torch.arange(x.shape[0], device=x.device)
    order = torch.argsort(present.int(), descending=True, stable=True)
    source = torch.where(present, index, order[index % present.sum().clamp(min=1)])
    any_present = present.any().reshape([1] * x.dim())
    return torch.where(any_present, x[source], torch.zeros((), dtype=x.dtype, device=x.device))
