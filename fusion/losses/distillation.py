"""Losses of a student by the outputs and the features of its teacher (knowledge distillation)."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax


def soft_target_loss(input: Tensor, target: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Divergence of the student's softened class probabilities from the teacher's.

        l = T^2 sum_c q_c log(q_c / p_c)            p = softmax(input / T)

    T^2 makes the size of the gradients independent of T. The gradient is that of the cross entropy with soft targets; the value is 0 where
    the student equals the teacher. Source: Hinton et al. (2015), "Distilling the Knowledge in a Neural Network".

    Args:
        input: (B, C) logits of the student.
        target: (B, C) probabilities q of the teacher at the same temperature, softmax(logits / T), or their mean over several teachers.
        temperature: T; above 0.

    Returns (B,).

    >>> float(soft_target_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), temperature=3.0))  # 9 log(2)
    6.23832...
    """
    logits, target = in_single(input, target)
    log_p = log_softmax(logits / temperature, dim=1)
    return temperature**2 * (-torch.special.entr(target) - target * log_p).sum(dim=1)


def soft_label_loss(input: Tensor, target: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The same for labels that are each there or not, averaged over the labels of a sample.

        l = T^2 / L sum_c (q_c log(q_c / p_c) + (1 - q_c) log((1 - q_c) / (1 - p_c)))            p = sigmoid(input / T)

    Args:
        input: (B, L) logits of the student.
        target: (B, L) probabilities q of the teacher at the same temperature, sigmoid(logits / T), or their mean over several teachers.
        temperature: T; above 0.

    Returns (B,).

    >>> float(soft_label_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.5]])))  # log(2) / 2
    0.34657...
    """
    logits, target = in_single(input, target)
    cross = binary_cross_entropy_with_logits(logits / temperature, target, reduction="none")
    return temperature**2 * (cross - torch.special.entr(target) - torch.special.entr(1 - target)).mean(dim=1)


def feature_loss(input: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared difference of features.

        l = 1/(2 D) sum_d (input_d - target_d)^2

    Source: Romero et al. (2015), "FitNets: Hints for Thin Deep Nets", with a linear map of the student's features as `input`. Standardise
    the target over the training samples: the loss is then 1/2 for a student that predicts their mean.

    Args:
        input: (B, D) features of the student, mapped to the teacher's width.
        target: (B, D) features of the teacher.

    Returns (B,).

    >>> feature_loss(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
    tensor([2.5000])
    """
    features, target = in_single(input, target)
    return (features - target).square().mean(dim=1) / 2


def in_single(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the input's dtype, at least float32."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    return input.to(dtype), target.to(dtype)
