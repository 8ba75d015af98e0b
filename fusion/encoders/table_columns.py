"""Table encoder: one token per column."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fusion.encoders.base import Encoder, Reading, mixed_tokens
from fusion.errors import UserError
from fusion.features import Features, masked_mean
from fusion.inputs import Columns


class TableColumns(Encoder):
    """Encode a table row: each column is a token, and transformer blocks let the tokens attend to each other.

        number x_j: x_j w_j + b_j            category c_j: E_j[c_j] + b_j            then `depth` pre-norm blocks, and a norm

    A missing cell is a masked token. Takes Columns; returns tokens (B, F + G, dim) and pooled (B, dim), the mean of the real tokens.

    Source: Gorishniy et al. (2021), "Revisiting Deep Learning Models for Tabular Data" (FT-Transformer).

    Args:
        dim: width of the tokens.
        depth: number of transformer blocks; 0 for the tokens alone.
        heads: number of attention heads, of which dim is a multiple.
        mlp_ratio: hidden width of the feed-forward layers, as a multiple of dim; above 0.
        dropout: dropout probability on the outputs of attention and of the feed-forward layers; from 0 to below 1.
        frozen: no gradient, eval mode.
        numbers: number of numeric columns; set from the data.
        cardinalities: number of categories of each categorical column, including the unknown one; set from the data.
    """

    takes = Columns

    def __init__(
        self,
        dim: int = 64,
        depth: int = 1,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
        frozen: bool = False,
        numbers: int = 0,
        cardinalities: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if dim < 2 or depth < 0 or heads < 1 or dim % heads or mlp_ratio <= 0 or not 0 <= dropout < 1:
            raise UserError(
                f"table encoder: dim {dim}, depth {depth}, heads {heads}, mlp_ratio {mlp_ratio}, dropout {dropout}; expected a dim that "
                "is a multiple of heads, a depth of 0 or more, an mlp_ratio above 0, and a dropout from 0 to below 1"
            )
        self.dim = self.embed_dim = dim
        self.options: dict[str, Any] = {"dim": dim, "depth": depth, "heads": heads, "mlp_ratio": mlp_ratio, "dropout": dropout}
        self.blocks = nn.ModuleList(Block(dim, heads, round(mlp_ratio * dim), dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.checkpointed = False
        self.fit_columns(numbers, cardinalities)
        if frozen:
            self.freeze()

    def fit_columns(self, numbers: int, cardinalities: Sequence[int]) -> None:
        """Build the tokenizer for this number of numeric columns, and for categorical columns of these cardinalities."""
        self.counts = numbers, list(cardinalities)
        self.tokens = ColumnTokens(numbers, self.counts[1], self.dim)
        if self.frozen:
            self.freeze()

    def forward(self, x: Columns) -> Features:
        with torch.no_grad() if self.frozen else nullcontext():
            hidden, x = self.run_blocks(x, self.depth)
            return self.features(self.norm(hidden[-1]), x)

    def embed(self, x: Columns) -> Features:
        with torch.no_grad() if self.frozen else nullcontext():
            return self.features(*mixed_tokens(self.tokens(x), x))

    def levels(self, x: Columns, depths: Sequence[int]) -> list[Features]:
        for depth in depths:
            if not -self.depth <= depth < self.depth:
                raise UserError(f"the table encoder has {self.depth} levels; there is no depth {depth}")
        with torch.no_grad() if self.frozen else nullcontext():
            hidden, x = self.run_blocks(x, max((depth % self.depth for depth in depths), default=-1) + 1)
            return [self.features(hidden[depth % self.depth + 1], x) for depth in depths]

    def run_blocks(self, x: Columns, blocks: int) -> tuple[list[Tensor], Columns]:
        """Returns the tokens before the first block and after each of the first `blocks` blocks, and the input with their mask."""
        tokens, x = mixed_tokens(self.tokens(x), x)
        hidden = [tokens]
        # A sample without any cell attends to its first token, since softmax over nothing is NaN.
        first = torch.zeros_like(x.mask)
        first[:, 0] = True
        mask = None if x.full else x.mask | (first & ~x.present[:, None])
        for block in list(self.blocks)[:blocks]:
            recompute = self.checkpointed and self.training
            hidden.append(checkpoint(block, hidden[-1], mask, use_reentrant=False) if recompute else block(hidden[-1], mask))
        return hidden, x

    def check_mixing(self, what: Reading, depths: Sequence[int] = ()) -> None:
        """Every reading mixes the tokens."""

    def features(self, tokens: Tensor, x: Columns) -> Features:
        return Features(tokens, x.mask, masked_mean(tokens, x.mask), full=x.full)

    @property
    def depth(self) -> int:
        return self.options["depth"]

    def level_dims(self, depths: Sequence[int]) -> list[int]:
        if not self.depth:
            raise UserError("the table encoder has depth 0, and so no levels; set its depth, for example --model.encoders.NAME.depth=2")
        return [self.dim for _ in depths]

    def checkpoint_activations(self) -> None:
        self.checkpointed = True

    def layers_of_parameters(self) -> dict[str, int]:
        layers = {}
        for name, _ in self.named_parameters():
            part, _, rest = name.partition(".")
            layers[name] = int(rest.partition(".")[0]) + 1 if part == "blocks" else self.depth if part == "norm" else 0
        return layers

    def spec(self) -> dict[str, Any]:
        return {**self.options, "frozen": self.frozen, "numbers": self.counts[0], "cardinalities": self.counts[1]}

    def example(self) -> Columns:
        numbers, cardinalities = self.counts
        device = self.tokens.bias.device  # not that of the norm, which `trim` may have removed
        mask = torch.ones(1, numbers + len(cardinalities), dtype=torch.bool, device=device)
        categories = torch.zeros(1, len(cardinalities), dtype=torch.int64, device=device)
        return Columns(torch.ones(1, numbers, device=device), categories, mask)


class ColumnTokens(nn.Module):
    """FT-Transformer's feature tokenizer."""

    def __init__(self, numbers: int, cardinalities: Sequence[int], dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(dim)
        count = numbers + len(cardinalities)
        self.weight = nn.Parameter(torch.empty(numbers, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, dim).uniform_(-bound, bound))
        self.categories = nn.Embedding(max(sum(cardinalities), 1), dim)
        nn.init.uniform_(self.categories.weight, -bound, bound)
        self.starts: Tensor
        starts = torch.tensor([0, *cardinalities[:-1]] if cardinalities else [], dtype=torch.int64).cumsum(0)
        self.register_buffer("starts", starts, persistent=False)

    def forward(self, x: Columns) -> Tensor:  # (B, F + G, dim)
        numbers = x.numbers[..., None] * self.weight
        return torch.cat([numbers, self.categories(x.categories + self.starts)], dim=1) + self.bias


class Block(nn.Module):
    """Pre-norm transformer block over tokens (B, N, D); mask (B, N) is True for those that may be attended to, None for all."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        queries, keys, values = self.qkv(self.norm_attention(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(queries, keys, values, attn_mask=None if mask is None else mask[:, None, None])
        tokens = tokens + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return tokens + self.dropout(self.mlp(self.norm_mlp(tokens)))
