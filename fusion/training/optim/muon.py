"""Muon: orthogonalised momentum for hidden matrices, AdamW for all other parameters."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

# Coefficients of a quintic whose iteration drives singular values in (0, 1] towards 1, chosen for its slope at 0 (Jordan et al., 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Updates hidden matrices equally in all directions; small transformers trained from scratch need fewer samples with it.

        M <- mu M + (1 - mu) G        W <- (1 - lr * decay) W - lr * 0.2 sqrt(max(rows, columns)) * orthogonal((1 - mu) G + mu M)

    "MomentUm Orthogonalized by Newton-Schulz" (Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks"), with the
    scale of Liu et al. (2025, "Muon is Scalable for LLM Training"), which makes its learning rates comparable to AdamW's. The filters of a
    convolution are the rows of one matrix. Parameter groups with `hidden` False (embeddings, output layers, vectors) are updated by AdamW;
    without such a key every parameter of two or more dimensions is hidden.

    Matrices of the same shape are orthogonalised together; on a GPU in bfloat16, which the iteration tolerates, as in the published code.
    Cost: for a matrix of R <= C, 20 R^2 C + 10 R^3 operations per update, whatever the batch size; for ViT-B and BERT-base together
    3.2 TFLOP, which is 5 % of an update of 460 pairs of an image and 64 tokens, and less for larger batches.

    Args:
        lr: learning rate, of hidden matrices and of AdamW's parameters.
        weight_decay: decoupled weight decay, multiplied by the learning rate, of all parameters.
        momentum: mu of the hidden matrices, from 0 to below 1.
        betas: AdamW's decay rates of the running means of gradients and of their squares, from 0 to below 1.
        eps: added to AdamW's denominator.

    >>> layer = torch.nn.Linear(8, 8)
    >>> optimizer = Muon(layer.parameters(), lr=0.01)
    >>> layer(torch.ones(2, 8)).square().sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
    ) -> None:
        below_one = [("momentum", momentum, 1.0), *(("betas", beta, 1.0) for beta in betas)]
        for name, value, most in [*below_one, ("lr", lr, math.inf), ("weight_decay", weight_decay, math.inf), ("eps", eps, math.inf)]:
            if not 0 <= value < most:
                raise ValueError(f"Muon: {name} is {value}; expected 0 to {most}")
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        # fused: AdamW's kernel needs the step count on the device of the weights, and with this key `load_state_dict` moves it there.
        super().__init__(params, options | {"hidden": True, "fused": True})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = [{"fused": True, **group} for group in state_dict["param_groups"]]  # missing in older checkpoints
        super().load_state_dict({**state_dict, "param_groups": groups})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            same_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            rest: list[Tensor] = []
            for p in with_gradient:
                if group["hidden"] and p.dim() > 1:
                    same_shape[len(p), p[0].numel()].append(p)
                else:
                    rest.append(p)
            for matrices in same_shape.values():
                self.orthogonal_update(matrices, group)
            self.adamw_update(rest, group)
        return loss

    def orthogonal_update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        updates = []
        for p in parameters:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            updates.append(p.grad.lerp(state["momentum"], group["momentum"]).flatten(1))  # type: ignore[union-attr]
        directions = orthogonal(torch.stack(updates))
        scale = group["lr"] * 0.2 * max(directions.shape[1:]) ** 0.5
        for p, direction in zip(parameters, directions, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction.reshape(p.shape), alpha=scale)

    def adamw_update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p].update(zeros, step=torch.zeros((), device=p.device))
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V' of each matrix U S V' of (n, R, C): singular values of 1 +- 0.3. Zero matrices stay zero."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.flatten(1).norm(dim=1, dtype=torch.float32)[:, None, None].to(x.dtype) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
