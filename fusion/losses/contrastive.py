"""Contrastive losses of pairs: each sample's two embeddings against those of all samples of an update."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid


def info_nce_loss(
    left: Tensor,
    right: Tensor,
    *,
    lefts: Tensor | None = None,
    rights: Tensor | None = None,
    target: Tensor | None = None,
    excluded: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Symmetric InfoNCE: each left embedding has to find its right one among all, and each right one its left one.

        l_i = -1/2 log softmax_j(left_i . right_j)_i - 1/2 log softmax_j(right_i . left_j)_i

    Source: Radford et al. (2021), "Learning Transferable Visual Models From Natural Language Supervision" (CLIP). The inner products are
    the logits: normalise and divide by the temperature before. Computed in float32 or wider.

    Args:
        left: (B, D) embeddings of one side.
        right: (B, D) embeddings of the other side.
        lefts: (G, D) the candidates of that side, such as those of all ranks; `left` if None.
        rights: (G, D) the candidates of the other side; `right` if None.
        target: (B,) int64, the number of each sample among the candidates; 0 to B - 1 if None.
        excluded: (B, G) bool, True where a candidate is no negative, such as another caption of the same image.
        weight: (B,) of each sample.
        ignore_index: a target of this number has loss 0.

    Returns (B,).

    >>> float(info_nce_loss(torch.eye(2), torch.eye(2))[0])  # log(1 + 1 / e)
    0.31326...
    """
    logits, target, ignored = pair_logits(left, right, lefts, rights, target, excluded, ignore_index)
    target = target.where(~ignored, ignore_index)
    one, other = (cross_entropy(both, target, ignore_index=ignore_index, reduction="none") for both in logits)
    loss = (one + other) / 2
    return loss if weight is None else loss * weight


def sigmoid_pair_loss(
    left: Tensor,
    right: Tensor,
    *,
    rights: Tensor | None = None,
    target: Tensor | None = None,
    excluded: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Pairwise sigmoid loss: a binary decision for every pair of a left and a right embedding, whether they belong together.

        l_i = -sum_j log sigmoid(z_ij left_i . right_j)            z_ij = 1 for j = i, else -1

    Source: Zhai et al. (2023), "Sigmoid Loss for Language Image Pre-Training" (SigLIP). The inner products are the logits: scale, and add
    the bias, before (see `fusion.heads.DualEncoder`). Computed in float32 or wider.

    Args:
        left: (B, D) embeddings of one side.
        right: (B, D) embeddings of the other side.
        rights: (G, D) the candidates of the other side, such as those of all ranks; `right` if None.
        target: (B,) int64, the number of each sample among the candidates; 0 to B - 1 if None.
        excluded: (B, G) bool, True where a pair is not counted.
        weight: (B,) of each sample.
        ignore_index: a target of this number has loss 0.

    Returns (B,).

    >>> float(sigmoid_pair_loss(torch.zeros(2, 3), torch.zeros(2, 3))[0])  # 2 log(2)
    1.38629...
    """
    (logits, _), target, ignored = pair_logits(left, right, None, rights, target, None, ignore_index)
    matches = torch.zeros_like(logits, dtype=torch.bool).scatter(1, target[:, None], True)
    each = logsigmoid(torch.where(matches, logits, -logits))
    if excluded is not None:
        each = each.masked_fill(excluded & ~matches, 0.0)
    loss = -each.sum(dim=1).masked_fill(ignored, 0.0)
    return loss if weight is None else loss * weight


def pair_logits(
    left: Tensor,
    right: Tensor,
    lefts: Tensor | None,
    rights: Tensor | None,
    target: Tensor | None,
    excluded: Tensor | None,
    ignore_index: int,
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Logits (B, G) from left to right and from right to left, -inf where excluded; target (B,), 0 where ignored; ignored (B,)."""
    if target is None:
        target = torch.arange(len(left), device=left.device)
    ignored = target == ignore_index
    target = target.where(~ignored, 0)
    logits = [products(left, right if rights is None else rights), products(right, left if lefts is None else lefts)]
    if excluded is not None:
        excluded = excluded.scatter(1, target[:, None], False)
        logits = [one.masked_fill(excluded, -torch.inf) for one in logits]
    return (logits[0], logits[1]), target, ignored


def products(one: Tensor, other: Tensor) -> Tensor:
    """Inner products (B, G) in float32 or wider, also under autocast."""
    wide = torch.promote_types(one.dtype, torch.float32)
    with torch.autocast(one.device.type, enabled=False):
        return one.to(wide) @ other.to(wide).T
