"""Multinomial logistic regression for a whole path of regularisation strengths, in one go.

Legend: N samples, D features, R their rank (at most min(N, D)), K classes, S strengths.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MEMORY = 10
_MAX_STEPS = 500
_SUFFICIENT = 1e-4
_FLOOR = 0.1  # nats: below this objective the tolerance is absolute
_BLOCK = 8192


def logistic_path(
    x: Tensor, y: Tensor, num_classes: int, strengths: Sequence[float], *, tolerance: float = 1e-3
) -> Tensor:
    """Minimise the sum of cross-entropies + strength/2 |W|^2 for every strength; the bias is not penalised.

    That is scikit-learn's `LogisticRegression(C=1 / strength)`, in three steps that make the path cheap:

    - The features are rotated into their principal axes once, which changes neither loss nor penalty. There the Hessian
      is nearly diagonal, and its exact diagonal is the first guess of L-BFGS at every strength.
    - From strong to weak, each fit starts at the one before. Its gradient there is known without touching the data.
    - L-BFGS keeps its memory: between two strengths the Hessian changes by exactly a multiple of the identity.

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
    problem = _Problem(x_NR, y, num_classes)
    solutions = x.new_empty(len(strengths), num_classes, x.shape[1] + 1)
    for s in sorted(range(len(strengths)), key=lambda i: -strengths[i]):
        w_KR = problem.solve(strengths[s] / n, tolerance)
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
        coordinates = vectors[:, keep] * root
        basis = x.T @ (vectors[:, keep] / root)
    else:
        _, basis = _eigh(x.T @ x)
        coordinates = x @ basis
    return torch.cat([coordinates, x.new_ones(n, 1)], 1), basis


def _eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    if a.is_cuda:
        return torch.linalg.eigh(a)
    values, vectors = np.linalg.eigh(a.numpy())  # several times as fast as torch's on a CPU
    return torch.from_numpy(values), torch.from_numpy(vectors)


class _Problem:
    """One data set in principal axes and where its path has got to. Objectives are means over samples."""

    def __init__(self, x_NR: Tensor, y: Tensor, num_classes: int) -> None:
        self.x_NR, self.y = x_NR, y
        self.penalised_R = torch.ones_like(x_NR[0])
        self.penalised_R[-1] = 0
        self.penalty = 0.0
        self.memory: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MEMORY)
        self.w_KR = x_NR.new_zeros(num_classes, x_NR.shape[1])
        self.loss, self.loss_gradient_KR = self.evaluate(self.w_KR)
        self.diagonal_KR = self.diagonal()

    def evaluate(self, w_KR: Tensor) -> tuple[float, Tensor]:
        """Mean cross-entropy and its gradient."""
        p_NK = torch.log_softmax(self.x_NR @ w_KR.T, dim=1)
        at_label = self.y[:, None]
        loss = -p_NK.gather(1, at_label).mean().item()
        p_NK.exp_()
        p_NK.scatter_add_(1, at_label, -torch.ones_like(at_label, dtype=p_NK.dtype))
        return loss, p_NK.T @ self.x_NR / len(self.y)

    def solve(self, penalty: float, tolerance: float) -> Tensor:
        """Minimise loss + penalty/2 |W|^2 from where the last solution was."""
        difference = penalty - self.penalty
        self.penalty = penalty
        for s_KR, y_KR in self.memory:
            y_KR += difference * s_KR * self.penalised_R
        objective, gradient = self.objective(self.w_KR, self.loss, self.loss_gradient_KR)
        current = False
        for _ in range(_MAX_STEPS):
            step = self.direction(gradient)
            gap = -(step * gradient).sum().item() / 2
            if gap <= tolerance * max(objective, _FLOOR):
                break
            if not current:  # the diagonal at the last strength's start was good enough to see whether we are done
                self.diagonal_KR, current = self.diagonal(), True
                continue
            for length in (1.0, 0.3, 0.1, 0.01):
                w_KR = self.w_KR + length * step
                loss, loss_gradient = self.evaluate(w_KR)
                new_objective, new_gradient = self.objective(w_KR, loss, loss_gradient)
                if new_objective <= objective - _SUFFICIENT * length * 2 * gap:
                    break
            else:
                if not self.memory:  # rounding: nothing makes it smaller
                    break
                self.memory.clear()
                continue
            s_KR, y_KR = length * step, new_gradient - gradient
            if (s_KR * y_KR).sum() > 0:
                self.memory.append((s_KR, y_KR))
            self.w_KR, self.loss, self.loss_gradient_KR = w_KR, loss, loss_gradient
            objective, gradient = new_objective, new_gradient
        return self.w_KR

    def diagonal(self) -> Tensor:
        """Diagonal of the Hessian of the loss, [K, R + 1]."""
        total = torch.zeros_like(self.w_KR)
        for x_BR in self.x_NR.split(_BLOCK):  # blocks bound the memory of the squares
            p_BK = torch.softmax(x_BR @ self.w_KR.T, dim=1)
            total += (p_BK - p_BK.square()).T @ x_BR.square()
        return total / len(self.y)

    def objective(self, w_KR: Tensor, loss: float, loss_gradient_KR: Tensor) -> tuple[float, Tensor]:
        """Objective and gradient at the current penalty, from those of the loss."""
        penalised = w_KR * self.penalised_R
        value = loss + self.penalty / 2 * penalised.square().sum().item()
        return value, loss_gradient_KR + self.penalty * penalised

    def direction(self, gradient: Tensor) -> Tensor:
        """L-BFGS direction that starts from the diagonal of the Hessian."""
        q = gradient.clone()
        steps = []
        for s_KR, y_KR in reversed(self.memory):
            rho = 1 / (s_KR * y_KR).sum()
            alpha = rho * (s_KR * q).sum()
            q -= alpha * y_KR
            steps.append((s_KR, y_KR, rho, alpha))
        q /= (self.diagonal_KR + self.penalty * self.penalised_R).clamp_min(torch.finfo(q.dtype).tiny)
        for s_KR, y_KR, rho, alpha in reversed(steps):
            q += (alpha - rho * (y_KR * q).sum()) * s_KR
        return -q
