"""Sign compression: gradients said in one bit a value between the ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

LONGEST = 1024  # a longer side keeps its own axes
MEMORY = 0.9  # how much of an axis's past an update leaves
TURN_EVERY = 2  # updates


class Exchanging(Protocol):
    """A strategy whose gradients are exchanged; sent: bytes that this rank has handed over."""

    sent: int

    @property
    def world_size(self) -> int: ...


class SignCompression:
    """One bit a value, and one byte a row and a column: the sign of the gradient and its factored size, with error feedback.

        p = g + e        sent: sign(U' p V), r, c        q = U (r c' * sign(U' p V)) V'        e <- p - q
        gradient = mean over the ranks of q

    r and c are the mean sizes of the rows and the columns of |U' p V|, scaled so that r c' is as near to it as can be. U and V turn a
    matrix to the axes along which the gradients heard so far were large or small (an eigenbasis, in which all ranks agree without a byte,
    since all heard the same): what is left unsaid is then small where gradients are small. In the matrix's own axes it would be alike
    everywhere, and optimisers that turn all directions alike, such as Muon, would make as much of it as of the gradient. Only matrices are
    turned (no filters; nor embeddings, whose rare rows would bear the error of the common ones), on sides of up to 1,024, of each of which
    two squares are kept. Vectors, which are few, take four bits a value.

    What a rank could not say so, e, it says with its next gradient. Both are kept in units of the loss, whatever the gradient scaler's
    scale; of an update that is skipped nothing was said. Values that are not finite make all ranks' gradients NaN, so that all see them,
    and leave e as it was.

    Cost: for a square matrix of side n, 14 n^3 operations of float32 an update, and about 4 n^3 more to follow the axes (QR); for ViT-B and
    BERT-base together 1.0 TFLOP, and 180 QRs every other update. It is for slow networks between machines: where the exchange of all
    gradients in full (0.8 GB there) takes less than that, compress=fp16 or bf16 is faster.

    Source: Karimireddy et al. (2019), "Error Feedback Fixes SignSGD and other Gradient Compression Schemes"; Seide et al. (2014),
    "1-Bit Stochastic Gradient Descent"; factored sizes: Shazeer and Stern (2018), "Adafactor"; the axes and how they are followed: Gupta
    et al. (2018), "Shampoo", and Vyas et al. (2024), "SOAP". That a sign is taken in these axes is our own.
    """

    def __init__(self) -> None:
        self.scale: float | Tensor = 1.0
        self.embeddings: set[Tensor] = set()
        self.residual: dict[Tensor, Tensor] = {}  # by parameter: DDP's buckets change after the first update
        self.axes: dict[Tensor, Sides] = {}
        self.updates = 0
        self.left: dict[Tensor, Tensor] = {}  # of the update at hand
        self.heard: list[tuple[list[Tensor], Tensor]] = []

    def settle(self, *, skipped: bool) -> None:
        """After an update: keep what it left to be said, and learn of what was heard, unless it was skipped."""
        if not skipped:
            self.residual |= self.left
            for alike, heard in self.heard:
                heard = torch.where(heard.isfinite().all(dim=(1, 2), keepdim=True), heard, 0.0)
                for p, own in zip(alike, heard, strict=True):
                    for axes, side in zip(self.axes[p], (own, own.mT), strict=True):
                        if axes is not None:
                            axes.moment.lerp_(side @ side.mT, 1 - MEMORY)
            self.updates += 1
            if self.updates % TURN_EVERY == 0:
                turn([axes for sides in self.axes.values() for axes in sides if axes is not None])
        self.left, self.heard = {}, []

    def exchange(self, strategy: Exchanging, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer, gradients = bucket.buffer(), dict(zip(bucket.parameters(), bucket.gradients(), strict=True))
        groups = self.alike(list(gradients))
        said = [self.encode(alike, torch.stack([gradients[p] for p in alike])) for alike in groups]
        message = written(said)
        strategy.sent += message.nbytes
        world = strategy.world_size
        everywhere = [torch.empty_like(message) for _ in range(world)]
        work = dist.all_gather(everywhere, message, async_op=True)

        def mean(_: Any) -> Tensor:
            total = [torch.zeros(len(alike), *matrix(alike[0]), device=buffer.device) for alike in groups]
            for one in everywhere:
                for whole, alike, part in zip(total, groups, read(one, said), strict=True):
                    whole += spoken(*part, matrix(alike[0]))
            for alike, whole in zip(groups, total, strict=True):
                heard = self.turned_back(alike, whole / world)
                for p, own in zip(alike, heard, strict=True):
                    gradients[p].copy_(own.view_as(p) * self.scale)
                if any(self.axes[alike[0]]):
                    self.heard.append((alike, heard))
            return buffer

        return work.get_future().then(mean)

    def alike(self, parameters: list[Tensor]) -> list[list[Tensor]]:
        """What can be computed at once."""
        groups: dict[tuple[torch.Size, bool], list[Tensor]] = defaultdict(list)
        for p in parameters:
            groups[p.shape, p in self.embeddings].append(p)
        return list(groups.values())

    def encode(self, parameters: list[Tensor], gradients: Tensor) -> Said:
        """What is said of parameters of one shape: bits, factors of the sizes, and sizes. Keeps what that leaves."""
        for p in parameters:
            if p not in self.axes:
                self.axes[p] = (None, None) if p in self.embeddings else axes_of(p)
                self.residual.setdefault(p, torch.zeros(p.shape, device=p.device))
        before = torch.stack([self.residual[p] for p in parameters])
        said = gradients.float() / self.scale + before
        shape = matrix(parameters[0])
        bits, factors, top = code(self.turned(parameters, said.reshape(-1, *shape)))
        left = said - self.turned_back(parameters, spoken(bits, factors, top, shape)).view_as(said)
        left = torch.where(top.isfinite().view(-1, *[1] * (left.dim() - 1)), left, before)
        self.left |= dict(zip(parameters, left, strict=True))
        return bits, factors, top

    # What exact resuming needs, as plain data by parameter name: the axes, which are the same on all ranks, and what this one left unsaid.

    def state(self, parameters: dict[str, Tensor]) -> dict[str, Any]:
        named = {name: self.axes[p] for name, p in parameters.items() if p in self.axes}
        axes = {name: [side and {"moment": side.moment, "basis": side.basis} for side in sides] for name, sides in named.items()}
        return {"axes": axes, "updates": self.updates}

    def unsaid(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.residual[p].cpu() for name, p in parameters.items() if p in self.residual}

    def load_state(self, state: dict[str, Any], unsaid: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Where the parameters are now: on their device."""
        self.residual = {parameters[name]: r.to(parameters[name].device) for name, r in unsaid.items()}
        for name, sides in state["axes"].items():
            device = parameters[name].device
            rows, columns = (side and Axes(side["moment"].to(device), side["basis"].to(device)) for side in sides)
            self.axes[parameters[name]] = rows, columns
        self.updates = state["updates"]

    def turned(self, parameters: list[Tensor], matrices: Tensor) -> Tensor:
        """U' M V of each of (n, R, C)."""
        rows, columns = self.bases(parameters)
        matrices = matrices if rows is None else rows.mT @ matrices
        return matrices if columns is None else matrices @ columns

    def turned_back(self, parameters: list[Tensor], matrices: Tensor) -> Tensor:
        """U M V', which undoes `turned`."""
        rows, columns = self.bases(parameters)
        matrices = matrices if rows is None else rows @ matrices
        return matrices if columns is None else matrices @ columns.mT

    def bases(self, parameters: list[Tensor]) -> list[Tensor | None]:
        """(n, R, R) and (n, C, C); None where a side keeps its own axes."""
        by_side = zip(*(self.axes[p] for p in parameters), strict=True)
        return [None if None in side else torch.stack([axes.basis for axes in side]) for side in by_side]


@dataclass
class Axes:
    """One side of a matrix, of length n.

    moment: (n, n), the running mean of the products of its rows (or columns) with each other, of what was heard.
    basis: (n, n), whose columns are the axes: orthonormal, near the moment's eigenvectors.
    """

    moment: Tensor
    basis: Tensor

    @classmethod
    def of(cls, length: int, device: torch.device) -> Axes:
        return cls(torch.zeros(length, length, device=device), torch.eye(length, device=device))


Said = tuple[Tensor, Tensor, Tensor]  # of n parameters of one shape: bits (n, B), factors (n, F), sizes (n,)
Sides = tuple[Axes | None, Axes | None]  # of rows and of columns


def axes_of(p: Tensor) -> Sides:
    if p.dim() != 2:
        return None, None
    rows, columns = (Axes.of(length, p.device) if length <= LONGEST else None for length in p.shape)
    return rows, columns


def turn(sides: Sequence[Axes]) -> None:
    """Bring axes nearer to their moments' eigenvectors, by one step of the power method. The moments are damped, so that it isn't
    rounding that decides of axes along which nothing was heard.
    """
    same_length: dict[int, list[Axes]] = defaultdict(list)
    for side in sides:
        same_length[len(side.moment)].append(side)
    for length, alike in same_length.items():
        moments = torch.stack([side.moment for side in alike])
        level = moments.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        damped = moments / level[:, None, None] + 0.01 * torch.eye(length, device=moments.device)
        bases = torch.linalg.qr(damped @ torch.stack([side.basis for side in alike]))[0]
        for side, basis in zip(alike, bases, strict=True):
            side.basis = basis.clone()


def written(said: Sequence[Said]) -> Tensor:
    """As bytes: all bits, then all factors, then all sizes."""
    bits, factors, tops = (torch.cat([one.flatten() for one in of_all]) for of_all in zip(*said, strict=True))
    return torch.cat([packed(bits), factors.view(torch.uint8), tops.view(torch.uint8)])


def read(message: Tensor, own: Sequence[Said]) -> list[Said]:
    """What another said, of parameters of the same shapes as one's own."""
    bits, factors, tops = ([one.numel() for one in of_all] for of_all in zip(*own, strict=True))
    in_bits, in_factors, in_tops = message.split([len(message) - sum(factors) - 4 * sum(tops), sum(factors), 4 * sum(tops)])
    parts = zip(
        unpacked(in_bits, sum(bits)).split(bits),
        in_factors.view(torch.float8_e4m3fn).split(factors),
        in_tops.clone().view(torch.float32).split(tops),  # cloned, since it may begin anywhere
        strict=True,
    )
    return [(b.view(len(top), -1), f.view(len(top), -1), top) for b, f, top in parts]


def matrix(p: Tensor) -> tuple[int, ...]:
    """The shape that it is said in: (R, C), with the filters of a convolution as rows (in what order their values come is all one: DDP
    gives those of channels-last filters as they lie in memory); (L,) for a vector.
    """
    return (p.numel(),) if p.dim() < 2 else (len(p), p[0].numel())


def code(p: Tensor) -> Said:
    """Of each of the matrices (n, R, C): (R C,) bits, the signs; (R + C,) float8, how large the rows and the columns of |p| are beside each
    other; and the number that brings their products nearest to |p|. Of each of the vectors (n, L): (4 L,) bits, the signs, and by how many
    powers of two each value is below the largest, with 7 for 0; no factors; and the largest.

    >>> said = code(torch.tensor([[[1.0, -2.0], [-2.0, 4.0]]]))
    >>> spoken(*said, (2, 2))
    tensor([[[ 1., -2.],
             [-2.,  4.]]])
    >>> spoken(*code(torch.tensor([[8.0, 2.1, -1.0, 0.001]])), (4,))
    tensor([[ 8.,  2., -1.,  0.]])
    """
    sizes = p.abs()
    tiny = torch.finfo(torch.float32).tiny
    if p.dim() < 3:
        top = sizes.amax(dim=1)
        below = (top[:, None] / sizes.clamp(min=tiny)).log2().round().clamp(0, 7).to(torch.uint8)
        bits = torch.cat([p >= 0, *((below & bit).ne(0) for bit in (1, 2, 4))], dim=1)
        return bits, torch.empty(len(p), 0, dtype=torch.float8_e4m3fn, device=p.device), top
    factors = torch.cat([most_is_one(sizes.mean(dim=2)), most_is_one(sizes.mean(dim=1))], dim=1).to(torch.float8_e4m3fn)
    products = outer(factors, p.shape[1])
    return (p >= 0).flatten(1), factors, (sizes * products).sum(dim=(1, 2)) / products.square().sum(dim=(1, 2)).clamp(min=tiny)


def most_is_one(sizes: Tensor) -> Tensor:
    return sizes / sizes.amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def outer(factors: Tensor, rows: int) -> Tensor:
    """(n, R, C): the products of the factors of rows and columns."""
    return factors[:, :rows, None].float() * factors[:, None, rows:].float()


def spoken(bits: Tensor, factors: Tensor, top: Tensor, shape: Sequence[int]) -> Tensor:
    """What others hear: (n, *shape)."""
    if len(shape) == 2:
        positive, sizes = bits, outer(factors, shape[0]).flatten(1)
    else:
        positive, *powers = bits.chunk(4, dim=1)
        below = powers[0] + 2 * powers[1] + 4 * powers[2]
        sizes = torch.where(below == 7, 0.0, 0.5**below)
    sizes = sizes * top[:, None]
    return torch.where(positive, sizes, -sizes).view(-1, *shape)


def packed(bits: Tensor) -> Tensor:
    """(n,) bool as ceil(n / 8) bytes.

    >>> packed(torch.tensor([True, False, True, False, False, False, False, False, True]))
    tensor([5, 1], dtype=torch.uint8)
    """
    filled = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (filled << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(dim=1, dtype=torch.uint8)


def unpacked(packed_bits: Tensor, count: int) -> Tensor:
    """The first `count` of the bits, (count,) bool."""
    return (packed_bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed_bits.device) & 1).bool().flatten()[:count]
