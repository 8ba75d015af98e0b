"""Intermediate fusion: graph convolutions over the tokens of all modalities, with a learned adjacency."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from fusion.features import Features, masked_mean
from fusion.heads.attention import Projection
from fusion.heads.base import FusionHead, Stage, check_options
from fusion.heads.missing_tokens import Missing

KINDS = ("cosine", "mlp")


class AdaptiveGraph(FusionHead):
    """Make every token (or pooled feature) of every modality a node, learn the adjacency, and convolve over the graph.

        s_ij = cos(U h_i, U h_j) / t    or    v . GELU(P h_i + Q h_j)            A = softmax of s_i over the real nodes j, or over the top k
        h <- h + GELU(A norm(h) W)            y = [mean(h_1); ...; mean(h_M)]

    y passes through one more layer, GELU(W' norm(y)). The adjacency A depends on the sample and is trained with the convolutions; the
    temperature t is learned. Masked nodes get no edges.

    Source: Kipf and Welling (2017), "Semi-Supervised Classification with Graph Convolutional Networks", over the learned adjacency of
    Chen et al. (2020), "Iterative Deep Graph Learning for Graph Neural Networks" (cosine) or Brody et al. (2022), "How Attentive are
    Graph Attention Networks?" (mlp).
    Reads: tokens (B, N_m, D_m), N = sum(N_m) nodes; or pooled features (B, D_m), N = M.
    Cost: sum(D_m) * dim + (depth + 1 + M) * dim^2 parameters ("mlp": depth + M, and 2 * dim * edge_dim); (depth + 1) * (N * dim^2 +
    N^2 * dim) multiply-adds ("mlp": depth, and N^2 * edge_dim) and N^2 edges per sample (N^2 * edge_dim values for "mlp").

    Args:
        dim: width of the nodes and of the fused features.
        depth: number of graph convolutions.
        nodes: "tokens" makes each token a node, "pooled" each modality.
        adjacency: how s_ij is computed: by "cosine" similarity, or by a small "mlp".
        top_k: number of strongest edges to other nodes that each node retains, besides the edge to itself. None: all edges.
        edge_dim: hidden width of the "mlp"; not used by "cosine".
        dropout: dropout probability on each convolution's output; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.
        missing: a modality that a sample lacks is "masked", or replaced by a "learned" token of its own for each pattern of present ones.

    >>> head = AdaptiveGraph({"text": 8, "image": 16}, 3, dim=32, top_k=4)
    >>> head({"text": torch.randn(4, 7, 8), "image": torch.randn(4, 49, 16)}).output.shape
    torch.Size([4, 3])
    """

    stage: Stage = "tokens"
    family = "intermediate"

    def __init__(
        self,
        dims: Mapping[str, int],
        out_dim: int,
        *,
        dim: int = 256,
        depth: int = 2,
        nodes: Literal["tokens", "pooled"] = "tokens",
        adjacency: Literal["cosine", "mlp"] = "cosine",
        top_k: int | None = None,
        edge_dim: int = 16,
        dropout: float = 0.0,
        unimodal: bool = False,
        missing: Missing = "masked",
    ) -> None:
        if nodes not in ("tokens", "pooled") or adjacency not in KINDS:
            raise ValueError(
                f"AdaptiveGraph: nodes is '{nodes}', adjacency '{adjacency}'; expected tokens or pooled, and {' or '.join(KINDS)}"
            )
        if top_k is not None and top_k < 1:
            raise ValueError(f"AdaptiveGraph: top_k is {top_k}; expected at least 1 edge per node, or none for all edges")
        check_options(type(self).__name__, dim=dim, depth=depth, edge_dim=edge_dim, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal, missing=missing)
        if nodes == "pooled":  # the base class then passes each modality as one token
            self.stage = "pooled"
        self.project = nn.ModuleDict({name: Projection(width, dim) for name, width in dims.items()})
        self.modality = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(dim)) for name in dims})
        self.adjacency = Adjacency(dim, adjacency, top_k, edge_dim)
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.convolve = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.mix = nn.Sequential(nn.LayerNorm(len(dims) * dim), nn.Linear(len(dims) * dim, dim), nn.GELU())

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        h = torch.cat([self.project[name](f.tokens) + self.modality[name] for name, f in features.items()], dim=1)
        mask = torch.cat([f.mask for f in features.values()], dim=1)
        edges = self.adjacency(h, mask)
        for norm, convolve in zip(self.norm, self.convolve, strict=True):
            h = h + self.dropout(gelu(edges @ convolve(norm(h))))
        counts = [f.mask.shape[1] for f in features.values()]
        parts = zip(h.split(counts, dim=1), mask.split(counts, dim=1), strict=True)
        return self.mix(torch.cat([masked_mean(part, real) for part, real in parts], dim=-1))


class Adjacency(nn.Module):
    """Adjacency (B, N, N) of nodes (B, N, D) with mask (B, N): row i has the weights with which node i aggregates each j; rows sum to 1.

    Masked nodes get weight 0, except in samples without any real node.
    """

    def __init__(self, dim: int, kind: str, top_k: int | None, edge_dim: int) -> None:
        super().__init__()
        self.kind, self.top_k = kind, top_k
        self.norm = nn.LayerNorm(dim)
        if kind == "cosine":
            self.embed = nn.Linear(dim, dim)
            self.log_sharpness = nn.Parameter(torch.tensor(2.0))  # 1 / t = 7.4, since cosines differ by little
        else:
            self.source = nn.Linear(dim, edge_dim)
            self.target = nn.Linear(dim, edge_dim, bias=False)
            self.score = nn.Linear(edge_dim, 1, bias=False)

    def forward(self, nodes: Tensor, mask: Tensor) -> Tensor:
        scores = self.scores(self.norm(nodes))
        real = mask[:, None, :]
        if self.top_k is not None:
            self_loops = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
            real = real & (self_loops | strongest(scores, real & ~self_loops, self.top_k))
        # The lowest finite number, not -inf: a sample without any real node gets uniform weights instead of NaN.
        return scores.masked_fill(~real, torch.finfo(scores.dtype).min).softmax(dim=-1)

    def scores(self, nodes: Tensor) -> Tensor:
        if self.kind == "cosine":
            unit = normalize(self.embed(nodes), dim=-1, eps=1e-6)
            return self.log_sharpness.exp().to(unit.dtype) * unit @ unit.mT
        return self.score(gelu(self.source(nodes)[:, :, None] + self.target(nodes)[:, None, :])).squeeze(-1)

    def attention_weights(self, nodes: Tensor, mask: Tensor) -> Tensor:
        """Returns the adjacency as attention weights (B, 1, N, N) of one head."""
        return self.forward(nodes, mask)[:, None]


def strongest(scores: Tensor, real: Tensor, count: int) -> Tensor:
    """Boolean mask (B, N, N), True at the `count` greatest scores of each row among the real entries."""
    allowed = scores.detach().masked_fill(~real, float("-inf"))
    # Padded, so that topk always has `count` columns to choose from; chosen padding is cut off below.
    padded = torch.nn.functional.pad(allowed, (0, count), value=float("-inf"))
    chosen = torch.zeros_like(padded, dtype=torch.bool).scatter(-1, padded.topk(count, dim=-1).indices, True)
    return chosen[..., : scores.shape[-1]]
