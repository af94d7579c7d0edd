"""Multinomial logistic regression for a whole path of regularisation strengths, in one go.

Legend: N samples, D features, R their rank (at most min(N, D)), K classes, S strengths.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MAX_STEPS = 50
_MAX_INNER = 250
_FORCING = 0.3
_SUFFICIENT = 1e-4
_FLOOR = 0.1
_REACH = 4.0
_ON_THE_WAY = 0.1
_LENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
_BLOCK = 4096
"""Samples at once: memory is that of the rotated features and of the probabilities, [N, R] and [N, K]."""


def logistic_path(
    x: Tensor, y: Tensor, num_classes: int, strengths: Sequence[float], *, tolerance: float = 1e-3
) -> Tensor:
    """Minimise the sum of cross-entropies + strength/2 |W|^2 for every strength; the bias is not penalised.

    That is scikit-learn's `LogisticRegression(C=1 / strength)`, by Newton's method whose steps are found by conjugate
    gradients, and three things that make the path cheap:

    - The features are rotated into their principal axes once, which changes neither loss nor penalty. There the Hessian
      is nearly diagonal, and its exact diagonal preconditions the conjugate gradients.
    - From strong to weak, each fit starts at the one before, whose gradient under the new strength needs no data; where
      strengths lie far apart, rough fits between them lead there.
    - A step is found only as well as the distance to the solution asks for, and no fit is better than `tolerance`.

    Args:
        x: Features, float of shape [N, D]; centred and of like scale, or the guess is poor. Their dtype and device are
            those of the computation.
        y: Class numbers in [0, K), int64 of shape [N].
        num_classes: K.
        strengths: Positive, in any order.
        tolerance: Stop when the objective is, by estimate, this part of itself above the least one; where the mean
            objective is below 0.1 nats, this part of 0.1 nats.

    Returns:
        Weights and, in the last column, biases: [S, K, D + 1], in the order of `strengths`.

    Example:
        >>> x, y = torch.tensor([[-1.0], [0.5], [1.0]]), torch.tensor([0, 1, 1])
        >>> logistic_path(x, y, 2, [1.0, 100.0])[:, 1, 0] > torch.tensor([0.1, 0.0])  # weak, strong
        tensor([True, True])
    """
    n = len(x)
    x_NR, basis_DR = _principal_axes(x)
    del x  # where the caller holds it no more, memory is that of one copy
    problem = _Problem(x_NR, y, num_classes)
    solutions = x_NR.new_empty(len(strengths), num_classes, len(basis_DR) + 1)
    # A first step that no penalty holds may end where probabilities are 0 and 1 and Newton's method is lost: the way
    # starts where the penalty outweighs every direction of the features, and goes down in small steps.
    strength = torch.linalg.vector_norm(x_NR, dim=0).max().item() ** 2
    for s in sorted(range(len(strengths)), key=lambda i: -strengths[i]):
        while strength > _REACH * strengths[s]:
            problem.solve(strength / n, _ON_THE_WAY)
            strength /= _REACH
        strength = strengths[s]
        w_KR = problem.solve(strength / n, tolerance)
        solutions[s, :, :-1] = w_KR[:, :-1] @ basis_DR.T
        solutions[s, :, -1] = w_KR[:, -1] - w_KR[:, -1].mean()  # a constant in all biases changes nothing
    return solutions


def _principal_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates and a column of ones [N, R + 1], basis [D, R]."""
    n, d = x.shape
    if n < d:
        values, vectors = _eigh(x @ x.T)
        keep = values > values[-1] * max(n, d) * torch.finfo(x.dtype).eps
        root = values[keep].sqrt()
        return torch.cat([vectors[:, keep] * root, x.new_ones(n, 1)], 1), x.T @ (vectors[:, keep] / root)
    _, basis = _eigh(x.T @ x)
    x_NR = x.new_ones(n, d + 1)
    for x_BR, x_BD in zip(x_NR.split(_BLOCK), x.split(_BLOCK), strict=True):
        x_BR[:, :-1] = x_BD @ basis
    return x_NR, basis


def _eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    if a.is_cuda:
        return torch.linalg.eigh(a)
    values, vectors = np.linalg.eigh(a.cpu().numpy())  # several times as fast as torch's on a CPU
    return torch.from_numpy(values).to(a.device), torch.from_numpy(vectors).to(a.device)


class _Problem:
    """One data set in principal axes and where its path has got to. Objectives are means over samples."""

    def __init__(self, x_NR: Tensor, y: Tensor, num_classes: int) -> None:
        self.x_NR, self.y = x_NR, y
        self.penalised_R = torch.ones_like(x_NR[0])
        self.penalised_R[-1] = 0
        self.penalty = 0.0
        self.w_KR = x_NR.new_zeros(num_classes, x_NR.shape[1])
        self.sums_KR = torch.zeros_like(self.w_KR).index_add_(0, y, x_NR)
        self.p_NK = x_NR.new_empty(len(y), num_classes)
        self.loss, self.loss_gradient_KR = self.evaluate(self.w_KR)
        self.diagonal_KR = self.diagonal()

    def evaluate(self, w_KR: Tensor) -> tuple[float, Tensor]:
        """Mean cross-entropy and its gradient; the probabilities are those of these weights from now on."""
        loss, expected_KR = 0.0, torch.zeros_like(self.sums_KR)
        for x_BR, p_BK, y_B in zip(*(t.split(_BLOCK) for t in (self.x_NR, self.p_NK, self.y)), strict=True):
            p_BK.copy_(torch.log_softmax(x_BR @ w_KR.T, dim=1))
            loss -= p_BK.gather(1, y_B[:, None]).sum().item()
            expected_KR.addmm_(p_BK.exp_().T, x_BR)
        return loss / len(self.y), (expected_KR - self.sums_KR) / len(self.y)

    def solve(self, penalty: float, tolerance: float) -> Tensor:
        """Minimise loss + penalty/2 |W|^2 from where the last solution was."""
        self.penalty = penalty
        objective, gradient = self.objective(self.w_KR, self.loss, self.loss_gradient_KR)
        for _ in range(_MAX_STEPS):
            allowed = tolerance * max(objective, _FLOOR)
            step_KR = self.step(gradient, allowed)
            gap = -(step_KR * gradient).sum().item() / 2
            if gap <= allowed / 10:
                break
            for length in _LENGTHS:
                w_KR = self.w_KR + length * step_KR
                loss, loss_gradient = self.evaluate(w_KR)
                new_objective, new_gradient = self.objective(w_KR, loss, loss_gradient)
                if new_objective <= objective - _SUFFICIENT * length * 2 * gap:
                    break
            else:  # rounding: nothing makes it smaller
                self.evaluate(self.w_KR)  # for its probabilities
                break
            is_quadratic = length == 1 and abs((objective - new_objective) / gap - 1) < 0.5
            self.w_KR, self.loss, self.loss_gradient_KR = w_KR, loss, loss_gradient
            self.diagonal_KR = self.diagonal()
            objective, gradient = new_objective, new_gradient
            # After such a step little is left; how little, its own model does not tell where probabilities are near 0
            # and 1 (it spoke of a hundredth of what was left), so the step itself has to lie within what is allowed.
            if is_quadratic and gap <= allowed:
                break
        return self.w_KR

    def objective(self, w_KR: Tensor, loss: float, loss_gradient_KR: Tensor) -> tuple[float, Tensor]:
        """Objective and gradient at the current penalty, from those of the loss."""
        penalised = w_KR * self.penalised_R
        value = loss + self.penalty / 2 * penalised.square().sum().item()
        return value, loss_gradient_KR + self.penalty * penalised

    def step(self, gradient: Tensor, allowed: float) -> Tensor:
        """Newton step by preconditioned conjugate gradients, stopped early."""
        diagonal = (self.diagonal_KR + self.penalty * self.penalised_R).clamp_min(torch.finfo(gradient.dtype).tiny)
        step, residual = torch.zeros_like(gradient), -gradient
        guess = residual / diagonal
        direction, size = guess.clone(), (residual * guess).sum()
        enough = max(_FORCING**2 * size.item(), 2 * _FORCING * allowed)
        for _ in range(_MAX_INNER):
            if not size > enough:
                break
            product = self.hessian_times(direction)
            along = size / (direction * product).sum()
            step += along * direction
            residual -= along * product
            guess = residual / diagonal
            size, last = (residual * guess).sum(), size
            direction = guess + size / last * direction
        return step

    def hessian_times(self, v_KR: Tensor) -> Tensor:
        """Product of the objective's Hessian at the current solution with a direction."""
        total_KR = torch.zeros_like(v_KR)
        for x_BR, p_BK in zip(self.x_NR.split(_BLOCK), self.p_NK.split(_BLOCK), strict=True):
            u_BK = x_BR @ v_KR.T
            u_BK *= p_BK
            u_BK.addcmul_(p_BK, u_BK.sum(1, keepdim=True), value=-1)
            total_KR.addmm_(u_BK.T, x_BR)
        return total_KR / len(self.y) + self.penalty * self.penalised_R * v_KR

    def diagonal(self) -> Tensor:
        """Diagonal of the Hessian of the loss, [K, R + 1]."""
        total = torch.zeros_like(self.w_KR)
        for x_BR, p_BK in zip(self.x_NR.split(_BLOCK), self.p_NK.split(_BLOCK), strict=True):
            total += (p_BK - p_BK.square()).T @ x_BR.square()
        return total / len(self.y)
