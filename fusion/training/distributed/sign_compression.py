"""Sign compression: gradients exchanged between the ranks in one bit a value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

LONGEST = 1024  # longer sides are not rotated
MOMENT_DECAY = 0.9
UPDATE_BASES_EVERY = 2  # updates


class Exchanging(Protocol):
    """A strategy whose gradients are exchanged; sent: bytes that this rank has sent."""

    sent: int

    @property
    def world_size(self) -> int: ...


class SignCompression:
    """The sign of the gradient (one bit a value) and its factored magnitude (one byte a row and a column), with error feedback.

        p = g + e        sent: sign(U' p V), r, c        q = U (r c' * sign(U' p V)) V'        e <- p - q
        gradient = mean over the ranks of q

    r and c are the mean magnitudes of the rows and columns of |U' p V|, scaled so that r c' is as close to it as possible. U and V rotate a
    matrix into the axes along which the decoded gradients so far were large or small (an approximate eigenbasis, the same on all ranks
    without communication, since all decode the same values): the residual is then small where gradients are small. Without rotation it
    would be equally large in all directions, and optimisers that update all directions equally, such as Muon, would amplify it as much as
    the gradient. Only matrices are rotated (no filters; no embeddings, whose rare rows would get the error of the frequent ones), on sides
    of up to 1,024, for each of which two square matrices are stored. Vectors, which are few, take four bits a value.

    The residual e is added to the next gradient. Residuals and axes are in units of the unscaled loss, whatever the gradient scaler's
    scale; a skipped update doesn't change them. Values that are not finite make all ranks' gradients NaN, so that all ranks detect them,
    and leave e unchanged.

    Cost: for a square matrix of side n, 14 n^3 float32 operations an update, and about 4 n^3 more to update the axes (QR); for ViT-B and
    BERT-base together 1.0 TFLOP, and 180 QRs every other update. It is for slow networks between machines: where exchanging all gradients
    uncompressed (0.8 GB there) takes less time than that, compress=fp16 or bf16 is faster.

    Source: Karimireddy et al. (2019), "Error Feedback Fixes SignSGD and other Gradient Compression Schemes"; Seide et al. (2014),
    "1-Bit Stochastic Gradient Descent"; factored magnitudes: Shazeer and Stern (2018), "Adafactor"; the axes and their updates: Gupta
    et al. (2018), "Shampoo", and Vyas et al. (2024), "SOAP". Taking the sign in these axes is our own addition.
    """

    def __init__(self) -> None:
        self.scale: float | Tensor = 1.0
        self.embeddings: set[Tensor] = set()
        self.residual: dict[Tensor, Tensor] = {}  # by parameter: DDP's buckets change after the first update
        self.axes: dict[Tensor, Sides] = {}
        self.updates = 0
        self.new_residual: dict[Tensor, Tensor] = {}  # of the current update
        self.decoded: list[tuple[list[Tensor], Tensor]] = []

    def end_update(self, *, skipped: bool) -> None:
        """After an update, unless it was skipped: store the new residuals, and update the axes from the decoded gradients."""
        if not skipped:
            self.residual |= self.new_residual
            for group, decoded in self.decoded:
                decoded = torch.where(decoded.isfinite().all(dim=(1, 2), keepdim=True), decoded, 0.0)
                for p, own in zip(group, decoded, strict=True):
                    for axes, side in zip(self.axes[p], (own, own.mT), strict=True):
                        if axes is not None:
                            axes.moment.lerp_(side @ side.mT, 1 - MOMENT_DECAY)
            self.updates += 1
            if self.updates % UPDATE_BASES_EVERY == 0:
                update_bases([axes for sides in self.axes.values() for axes in sides if axes is not None])
        self.new_residual, self.decoded = {}, []

    def exchange(self, strategy: Exchanging, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer, gradients = bucket.buffer(), dict(zip(bucket.parameters(), bucket.gradients(), strict=True))
        groups = self.group_by_shape(list(gradients))
        encoded = [self.encode_with_feedback(group, torch.stack([gradients[p] for p in group])) for group in groups]
        message = pack_message(encoded)
        strategy.sent += message.nbytes
        world = strategy.world_size
        messages = [torch.empty_like(message) for _ in range(world)]
        work = dist.all_gather(messages, message, async_op=True)

        def mean(_: Any) -> Tensor:
            totals = [torch.zeros(len(group), *matrix_shape(group[0]), device=buffer.device) for group in groups]
            for received in messages:
                for total, group, part in zip(totals, groups, unpack_message(received, encoded), strict=True):
                    total += decode(*part, matrix_shape(group[0]))
            for group, total in zip(groups, totals, strict=True):
                decoded = self.rotate_back(group, total / world)
                for p, own in zip(group, decoded, strict=True):
                    gradients[p].copy_(own.view_as(p) * self.scale)
                if any(self.axes[group[0]]):
                    self.decoded.append((group, decoded))
            return buffer

        return work.get_future().then(mean)

    def group_by_shape(self, parameters: list[Tensor]) -> list[list[Tensor]]:
        """Groups of parameters that are encoded in one batch."""
        groups: dict[tuple[torch.Size, bool], list[Tensor]] = defaultdict(list)
        for p in parameters:
            groups[p.shape, p in self.embeddings].append(p)
        return list(groups.values())

    def encode_with_feedback(self, parameters: list[Tensor], gradients: Tensor) -> Encoded:
        """Encode the gradients of parameters of one shape, with their residuals added; stores the new residuals until the update ends."""
        for p in parameters:
            if p not in self.axes:
                self.axes[p] = (None, None) if p in self.embeddings else axes_of(p)
                self.residual.setdefault(p, torch.zeros(p.shape, device=p.device))
        before = torch.stack([self.residual[p] for p in parameters])
        corrected = gradients.float() / self.scale + before
        shape = matrix_shape(parameters[0])
        bits, factors, top = encode(self.rotate(parameters, corrected.reshape(-1, *shape)))
        after = corrected - self.rotate_back(parameters, decode(bits, factors, top, shape)).view_as(corrected)
        after = torch.where(top.isfinite().view(-1, *[1] * (after.dim() - 1)), after, before)
        self.new_residual |= dict(zip(parameters, after, strict=True))
        return bits, factors, top

    # Checkpoint state as plain data by parameter name: the axes, which are the same on all ranks, and this rank's residuals

    def state(self, parameters: dict[str, Tensor]) -> dict[str, Any]:
        named = {name: self.axes[p] for name, p in parameters.items() if p in self.axes}
        axes = {name: [side and {"moment": side.moment, "basis": side.basis} for side in sides] for name, sides in named.items()}
        return {"axes": axes, "updates": self.updates}

    def residual_state(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.residual[p].cpu() for name, p in parameters.items() if p in self.residual}

    def load_state(self, state: dict[str, Any], residuals: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Load the state to the parameters' current device."""
        self.residual = {parameters[name]: r.to(parameters[name].device) for name, r in residuals.items()}
        for name, sides in state["axes"].items():
            device = parameters[name].device
            rows, columns = (side and Axes(side["moment"].to(device), side["basis"].to(device)) for side in sides)
            self.axes[parameters[name]] = rows, columns
        self.updates = state["updates"]

    def rotate(self, parameters: list[Tensor], matrices: Tensor) -> Tensor:
        """U' M V of each of (n, R, C)."""
        rows, columns = self.bases(parameters)
        matrices = matrices if rows is None else rows.mT @ matrices
        return matrices if columns is None else matrices @ columns

    def rotate_back(self, parameters: list[Tensor], matrices: Tensor) -> Tensor:
        """U M V', the inverse of `rotate`."""
        rows, columns = self.bases(parameters)
        matrices = matrices if rows is None else rows @ matrices
        return matrices if columns is None else matrices @ columns.mT

    def bases(self, parameters: list[Tensor]) -> list[Tensor | None]:
        """(n, R, R) and (n, C, C); None for a side that is not rotated."""
        by_side = zip(*(self.axes[p] for p in parameters), strict=True)
        return [None if None in side else torch.stack([axes.basis for axes in side]) for side in by_side]


@dataclass
class Axes:
    """One side of a matrix, of length n.

    moment: (n, n), the running mean of the products of the decoded gradients' rows (or columns) with each other.
    basis: (n, n), whose columns are the axes: orthonormal, approximate eigenvectors of the moment.
    """

    moment: Tensor
    basis: Tensor

    @classmethod
    def of(cls, length: int, device: torch.device) -> Axes:
        return cls(torch.zeros(length, length, device=device), torch.eye(length, device=device))


Encoded = tuple[Tensor, Tensor, Tensor]  # of n parameters of one shape: bits (n, B), factors (n, F), sizes (n,)
Sides = tuple[Axes | None, Axes | None]  # of rows and of columns


def axes_of(p: Tensor) -> Sides:
    if p.dim() != 2:
        return None, None
    rows, columns = (Axes.of(length, p.device) if length <= LONGEST else None for length in p.shape)
    return rows, columns


def update_bases(sides: Sequence[Axes]) -> None:
    """Move axes towards their moments' eigenvectors, by one step of the power method. The moments are damped, so that directions without
    gradients aren't determined by rounding.
    """
    same_length: dict[int, list[Axes]] = defaultdict(list)
    for side in sides:
        same_length[len(side.moment)].append(side)
    for length, group in same_length.items():
        moments = torch.stack([side.moment for side in group])
        level = moments.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        damped = moments / level[:, None, None] + 0.01 * torch.eye(length, device=moments.device)
        bases = torch.linalg.qr(damped @ torch.stack([side.basis for side in group]))[0]
        for side, basis in zip(group, bases, strict=True):
            side.basis = basis.clone()


def pack_message(encoded: Sequence[Encoded]) -> Tensor:
    """The bytes to send: all bits, then all factors, then all sizes."""
    bits, factors, tops = (torch.cat([one.flatten() for one in of_all]) for of_all in zip(*encoded, strict=True))
    return torch.cat([pack_bits(bits), factors.view(torch.uint8), tops.view(torch.uint8)])


def unpack_message(message: Tensor, own: Sequence[Encoded]) -> list[Encoded]:
    """The parts of another rank's message, of the same shapes as this rank's own."""
    bits, factors, tops = ([one.numel() for one in of_all] for of_all in zip(*own, strict=True))
    in_bits, in_factors, in_tops = message.split([len(message) - sum(factors) - 4 * sum(tops), sum(factors), 4 * sum(tops)])
    parts = zip(
        unpack_bits(in_bits, sum(bits)).split(bits),
        in_factors.view(torch.float8_e4m3fn).split(factors),
        in_tops.clone().view(torch.float32).split(tops),  # cloned, since its offset may not be aligned
        strict=True,
    )
    return [(b.view(len(top), -1), f.view(len(top), -1), top) for b, f, top in parts]


def matrix_shape(p: Tensor) -> tuple[int, ...]:
    """The shape in which a gradient is encoded: (R, C), with the filters of a convolution as rows (the order of values within a filter is
    irrelevant: DDP passes channels-last filters in memory order); (L,) for a vector.
    """
    return (p.numel(),) if p.dim() < 2 else (len(p), p[0].numel())


def encode(p: Tensor) -> Encoded:
    """Bits, factors and sizes of (n, R, C) matrices or (n, L) vectors.

    Of each matrix: (R C,) bits, the signs; (R + C,) float8, the relative magnitudes of the rows and of the columns of |p|; and the number
    that brings their products closest to |p|. Of each vector: (4 L,) bits, the signs and by how many powers of two each value is below the
    largest, with 7 for 0; no factors; and the largest.

    >>> encoded = encode(torch.tensor([[[1.0, -2.0], [-2.0, 4.0]]]))
    >>> decode(*encoded, (2, 2))
    tensor([[[ 1., -2.],
             [-2.,  4.]]])
    >>> decode(*encode(torch.tensor([[8.0, 2.1, -1.0, 0.001]])), (4,))
    tensor([[ 8.,  2., -1.,  0.]])
    """
    sizes = p.abs()
    tiny = torch.finfo(torch.float32).tiny
    if p.dim() < 3:
        top = sizes.amax(dim=1)
        below = (top[:, None] / sizes.clamp(min=tiny)).log2().round().clamp(0, 7).to(torch.uint8)
        bits = torch.cat([p >= 0, *((below & bit).ne(0) for bit in (1, 2, 4))], dim=1)
        return bits, torch.empty(len(p), 0, dtype=torch.float8_e4m3fn, device=p.device), top
    factors = torch.cat([relative(sizes.mean(dim=2)), relative(sizes.mean(dim=1))], dim=1).to(torch.float8_e4m3fn)
    products = outer(factors, p.shape[1])
    return (p >= 0).flatten(1), factors, (sizes * products).sum(dim=(1, 2)) / products.square().sum(dim=(1, 2)).clamp(min=tiny)


def relative(sizes: Tensor) -> Tensor:
    """Divided by their largest value."""
    return sizes / sizes.amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def outer(factors: Tensor, rows: int) -> Tensor:
    """(n, R, C): products of the factors of rows and columns."""
    return factors[:, :rows, None].float() * factors[:, None, rows:].float()


def decode(bits: Tensor, factors: Tensor, top: Tensor, shape: Sequence[int]) -> Tensor:
    """The values that were encoded, approximately: (n, *shape)."""
    if len(shape) == 2:
        positive, sizes = bits, outer(factors, shape[0]).flatten(1)
    else:
        positive, *powers = bits.chunk(4, dim=1)
        below = powers[0] + 2 * powers[1] + 4 * powers[2]
        sizes = torch.where(below == 7, 0.0, 0.5**below)
    sizes = sizes * top[:, None]
    return torch.where(positive, sizes, -sizes).view(-1, *shape)


def pack_bits(bits: Tensor) -> Tensor:
    """(n,) bool as ceil(n / 8) bytes.

    >>> pack_bits(torch.tensor([True, False, True, False, False, False, False, False, True]))
    tensor([5, 1], dtype=torch.uint8)
    """
    filled = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (filled << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed_bits: Tensor, count: int) -> Tensor:
    """The first `count` of the bits, (count,) bool."""
    return (packed_bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed_bits.device) & 1).bool().flatten()[:count]
