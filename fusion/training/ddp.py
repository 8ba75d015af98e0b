"""Distributed data parallel whose gradients may be compressed on their way between the ranks, and whose bytes are counted."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from fusion.errors import UserError
from fusion.training.precision import scaler_of

Compression = Literal["none", "fp16", "bf16", "powersgd", "sign"]


class DDP(DDPStrategy):
    """Lightning's DDP (NCCL between GPUs, gloo between processes on CPUs) with the gradients' form on the wire chosen in the recipe.

    (Lightning registers DDP's communication hooks on GPUs alone, in silence; here they work on both.)

    compress: "none"; "fp16" or "bf16" halve the bytes; "powersgd" sends matrices of low rank (Vogels et al., 2019; needs NCCL); "sign"
    sends one bit a value (SignCompression).
    powersgd_rank: the rank of those matrices. powersgd_start: updates sent in full before.
    timeout_s: how long a rank waits for another before the run ends.
    find_unused_parameters: needed where a parameter gets no gradient (model.allow_unused).
    """

    def __init__(
        self,
        compress: Compression = "none",
        powersgd_rank: int = 4,
        powersgd_start: int = 100,
        timeout_s: float = 1800.0,
        find_unused_parameters: bool = False,
    ) -> None:
        if timeout_s <= 0 or powersgd_rank < 1 or powersgd_start < 2:
            raise UserError("DDP: timeout_s must be above 0, powersgd_rank at least 1, powersgd_start at least 2")
        super().__init__(timeout=timedelta(seconds=timeout_s), find_unused_parameters=find_unused_parameters)
        self.compress = compress
        self.powersgd_rank, self.powersgd_start = powersgd_rank, powersgd_start
        self.sign = SignCompression()
        self.powersgd: powerSGD_hook.PowerSGDState | None = None
        self.sent = 0

    def _configure_launcher(self) -> None:
        """Refuse, before any other process is started, what their backend can't do."""
        if self.compress in ("bf16", "powersgd") and self._get_process_group_backend() != "nccl":
            why = "gloo doesn't sum bf16" if self.compress == "bf16" else "its low-rank exchange is unreliable over gloo"
            raise UserError(f"DDP: compress={self.compress} needs NCCL, that is GPUs: {why}. On a CPU take fp16 or sign")
        super()._configure_launcher()

    def _register_ddp_hooks(self) -> None:
        model = self.model
        assert isinstance(model, DistributedDataParallel)
        if self.compress == "none":  # DDP's own way, which is faster than a hook
            return
        if self.compress == "powersgd" and self.powersgd is None:
            self.powersgd = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=self.powersgd_rank, start_powerSGD_iter=self.powersgd_start
            )
        model.register_comm_hook(self, exchange)

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        self.sent = 0
        if self.compress != "sign":
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        scaler = scaler_of(self.precision_plugin)
        self.sign.scale = scaler.get_scale() if scaler is not None else 1.0
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.sign.settle(skipped=scaler is not None and scaler.get_scale() < self.sign.scale)
        return result

    def sent_bytes(self) -> int:
        """Bytes that this rank has handed to the exchange of gradients in the last update."""
        return full_bytes(self.lightning_module) if self.compress == "none" else self.sent

    # What exact resuming needs: the residuals, which differ from rank to rank.

    def compression_state(self, parameters: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """By rank and parameter name, what is left to be sent. A collective: all ranks call it."""
        if self.compress != "sign" or not self.sign.residual:
            return []
        mine = {name: self.sign.residual[p] for name, p in parameters.items() if p in self.sign.residual}
        flat = torch.cat([r.flatten() for r in mine.values()])
        gathered = [torch.empty_like(flat) for _ in range(self.world_size)]
        dist.all_gather(gathered, flat)
        sizes = [r.numel() for r in mine.values()]
        return [
            {name: part.view_as(mine[name]).cpu() for name, part in zip(mine, of_rank.split(sizes), strict=True)} for of_rank in gathered
        ]

    def load_compression_state(self, state: list[dict[str, Tensor]], parameters: dict[str, Tensor]) -> None:
        """Each rank takes its own; with another number of ranks, each takes an equal share of their sum."""
        if not state:
            return
        if len(state) == self.world_size:
            own = state[self.global_rank]
        else:
            own = {name: sum(of_rank[name] for of_rank in state) / len(state) for name in state[0]}  # type: ignore[misc]
        self.sign.residual = {parameters[name]: r.to(parameters[name].device) for name, r in own.items()}


def full_bytes(model: Any) -> int:
    """Of all gradients as they are."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def exchange(strategy: DDP, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the mean over the ranks of a bucket of gradients."""
    buffer = bucket.buffer()
    if strategy.compress == "sign":
        return strategy.sign.exchange(strategy, bucket)
    if strategy.compress == "powersgd":
        assert strategy.powersgd is not None
        before = strategy.powersgd.compression_stats()[2] if strategy.powersgd.iter >= strategy.powersgd_start else None
        future = powerSGD_hook.powerSGD_hook(strategy.powersgd, bucket)
        after = strategy.powersgd.compression_stats()[2]
        strategy.sent += buffer.nbytes if before is None else int((after - before) * buffer.element_size())
        return future
    strategy.sent += buffer.numel() * 2
    hook = default_hooks.fp16_compress_hook if strategy.compress == "fp16" else default_hooks.bf16_compress_hook
    return hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]


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
