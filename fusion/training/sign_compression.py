"""Sign compression: gradients said in one bit a value between the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from fusion.training.ddp import DDP


class SignCompression:
    """One bit a value, and one byte a row and a column: the sign of the gradient and its factored size, with error feedback.

        p = g + e        sent: sign(p), r, c        q = r c' * sign(p)        e <- p - q        gradient = mean over the ranks of q

    r and c are the mean sizes of the rows and the columns of |p|, scaled so that r c' is as near to |p| as can be; a vector has one number.
    What a rank could not say so, e, it says with its next gradient. (One size for a whole matrix would leave more of it unsaid, of which
    optimisers that turn all directions alike, such as Muon, make much.) Both are kept in units of the loss, whatever the gradient scaler's
    scale; of an update that is skipped nothing was said. Values that are not finite make all ranks' gradients NaN, so that all see them,
    and leave e as it was.

    Source: Karimireddy et al. (2019), "Error Feedback Fixes SignSGD and other Gradient Compression Schemes"; Seide et al. (2014),
    "1-Bit Stochastic Gradient Descent"; factored sizes: Shazeer and Stern (2018), "Adafactor".
    """

    def __init__(self) -> None:
        self.scale = 1.0
        self.residual: dict[Tensor, Tensor] = {}  # by parameter: DDP's buckets change after the first update
        self.next: dict[Tensor, Tensor] = {}

    def settle(self, *, skipped: bool) -> None:
        """After an update: keep what it left to be said, unless it was skipped."""
        if not skipped:
            self.residual |= self.next
        self.next = {}

    def exchange(self, strategy: DDP, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        parameters, gradients = bucket.parameters(), bucket.gradients()
        signs, sizes, tops = [], [], []
        for p, gradient in zip(parameters, gradients, strict=True):
            said = gradient.float() / self.scale
            if p in self.residual:
                said = said + self.residual[p]
            positive = said.flatten() >= 0
            size, top = factored(said)
            left = said - spoken(positive, size, top, said.shape)
            self.next[p] = torch.where(top.isfinite(), left, self.residual.get(p, torch.zeros_like(said)))
            signs.append(positive)
            sizes.append(size)
            tops.append(top)
        counts, lengths = [len(s) for s in signs], [len(s) for s in sizes]
        message = torch.cat([packed(torch.cat(signs)), torch.cat(sizes).view(torch.uint8), torch.stack(tops).view(torch.uint8)])
        strategy.sent += message.nbytes
        parts = [len(message) - sum(lengths) - 4 * len(tops), sum(lengths), 4 * len(tops)]
        world = strategy.world_size
        everywhere = [torch.empty_like(message) for _ in range(world)]
        work = dist.all_gather(everywhere, message, async_op=True)

        def mean(_: Any) -> Tensor:
            total = [torch.zeros(gradient.shape, device=buffer.device) for gradient in gradients]
            for one in everywhere:
                bits, size, top = one.split(parts)
                heard = zip(
                    total,
                    unpacked(bits, sum(counts)).split(counts),
                    size.view(torch.float8_e4m3fn).split(lengths),
                    top.clone().view(torch.float32),  # cloned, since it may begin anywhere
                    strict=True,
                )
                for whole, own, factors, largest in heard:
                    whole += spoken(own, factors, largest, whole.shape)
            for gradient, whole in zip(gradients, total, strict=True):
                gradient.copy_(whole * (self.scale / world))
            return buffer

        return work.get_future().then(mean)


def factored(p: Tensor) -> tuple[Tensor, Tensor]:
    """(R + C,) float8, how large the rows and the columns of |p| are beside each other, and the number that brings their products nearest
    to |p|. Of a vector, which has no rows: none, and its mean size.

    >>> factors, top = factored(torch.tensor([[1.0, -2.0], [-2.0, 4.0]]))
    >>> spoken(torch.tensor([True, False, False, True]), factors, top, (2, 2))
    tensor([[ 1., -2.],
            [-2.,  4.]])
    """
    if p.dim() < 2:
        return torch.empty(0, dtype=torch.float8_e4m3fn, device=p.device), p.abs().mean()
    sizes = p.flatten(1).abs()
    factors = torch.cat([most_is_one(sizes.mean(dim=1)), most_is_one(sizes.mean(dim=0))]).to(torch.float8_e4m3fn)
    products = outer(factors, len(p))
    return factors, (sizes * products).sum() / products.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def most_is_one(sizes: Tensor) -> Tensor:
    return sizes / sizes.max().clamp(min=torch.finfo(torch.float32).tiny)


def outer(factors: Tensor, rows: int) -> Tensor:
    """(R, C): the products of the factors of rows and columns."""
    return factors[:rows].float()[:, None] * factors[rows:].float()


def spoken(positive: Tensor, factors: Tensor, top: Tensor, shape: Sequence[int]) -> Tensor:
    """What others hear: each value's sign (n,), times its size."""
    sizes = outer(factors, shape[0]).flatten() * top if len(factors) else top
    return torch.where(positive, sizes, -sizes).view(shape)


BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def packed(bits: Tensor) -> Tensor:
    """(n,) bool as ceil(n / 8) bytes.

    >>> packed(torch.tensor([True, False, True, False, False, False, False, False, True]))
    tensor([5, 1], dtype=torch.uint8)
    """
    filled = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (filled * torch.tensor(BITS, dtype=torch.uint8, device=bits.device)).sum(dim=1, dtype=torch.uint8)


def unpacked(packed_bits: Tensor, count: int) -> Tensor:
    """The first `count` of the bits, (count,) bool."""
    weights = torch.tensor(BITS, dtype=torch.uint8, device=packed_bits.device)
    return (packed_bits[:, None] & weights).ne(0).flatten()[:count]
