"""Classification by sparse variational scale mixtures of network Gaussian processes.

Part of Lee et al., "Scale Mixtures of Neural Network Gaussian Processes", ICLR 2022.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.engine import seeded
from torchfolio.theory.mixture_process import cholesky, own_kernel
from torchfolio.theory.network_kernels import NNGPKernel, raw_of

__all__ = ["SparseStudentTClassifier", "kl_inverse_gamma"]


def kl_inverse_gamma(a_q: Tensor, b_q: Tensor, a: float, b: float) -> Tensor:
    """Divergence of the inverse-gamma distribution $(a_q, b_q)$ from $(a, b)$."""
    return (
        a * (b_q / b).log()
        - torch.lgamma(a_q)
        + math.lgamma(a)
        + (a_q - a) * torch.digamma(a_q)
        + (b - b_q) * a_q / b_q
    )


class _SparseProcess(nn.Module):
    """$q(u_c \\mid \\sigma^2) = N(L m_c, \\sigma^2 L S_c L^\\top)$ at inducing inputs, $K_{ZZ} = LL^\\top$, $S_c$ diagonal."""

    def __init__(self, kernel: NNGPKernel, Z: Tensor, classes: int, prior: tuple[float, float] | None) -> None:
        super().__init__()
        self.kernel, self.prior = kernel, prior
        self.Z = nn.Parameter(Z.clone())
        self.mean = nn.Parameter(torch.zeros(len(Z), classes, dtype=torch.float64))
        self.raw_scale = nn.Parameter(torch.full((len(Z), classes), math.log(math.e - 1), dtype=torch.float64))
        self.raw = nn.ParameterList([raw_of(value) for value in (prior or (1.0,))])

    def marginals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances `[n, classes]` at $\\sigma^2 = 1$; only marginal ones are ever needed."""
        factor = cholesky(self.kernel(self.Z), 1e-6)
        half = torch.linalg.solve_triangular(factor, self.kernel(self.Z, x), upper=False).T
        rest = (self.kernel.diagonal(x) - half.square().sum(1)).clamp_min(1e-12)
        scale = F.softplus(self.raw_scale)
        return half @ self.mean, half.square() @ scale.square() + rest[:, None]

    def scales(self, samples: int) -> Tensor:
        """Draws of $\\sigma$ `[samples, 1, 1]`: one for all points and classes."""
        if self.prior is None:
            return F.softplus(self.raw[0]).expand(samples, 1, 1)  # trained with the Gaussian twin's last layer
        a, b = (F.softplus(raw) for raw in self.raw)
        return (b / torch.distributions.Gamma(a, torch.ones_like(a)).rsample(torch.Size((samples, 1, 1)))).sqrt()

    def values(self, mean: Tensor, variance: Tensor, scales: Tensor) -> Tensor:
        """Draws `[samples, n, classes]` of the process by its marginals."""
        noise = torch.randn(len(scales), *mean.shape, dtype=mean.dtype)
        return mean * (scales if self.prior is None else 1) + scales * variance.sqrt() * noise

    def divergence(self) -> Tensor:
        squares, scale = self.mean.square().sum(), F.softplus(self.raw_scale)
        rest = (scale.square() - 1 - 2 * scale.log()).sum()
        if self.prior is None:
            return (squares + rest) / 2
        a, b = (F.softplus(raw) for raw in self.raw)
        return (a / b * squares + rest) / 2 + kl_inverse_gamma(a, b, *self.prior)


class SparseStudentTClassifier(ClassifierMixin, BaseEstimator):
    """Classification by a scale mixture of network Gaussian processes, with inducing points and variational inference.

    Maximises $E[\\log \\mathrm{softmax}_y f] - \\mathrm{KL} / N$ over inducing inputs, the distributions of their values
    and of $\\sigma^2$, and the kernel's variances. A draw has one $\\sigma^2$ for all points and classes.

    Args:
        kernel: `NNGPKernel` or another module with its two methods, `NNGPKernel()` by default; left as it is.
        n_inducing: number of inducing points, by class in proportion to the training points.
        prior: shape and scale of the inverse-gamma prior; `"fixed"` for the Gaussian twin with a trained scale.
        epochs: passes over the training points.
        batch_size: points of a batch.
        samples: draws for a training step.
        test_samples: draws for a prediction.
        lr: learning rate of Adam; falls to 0 by a cosine.
        random_state: seed of inducing points, order and draws.

    Attributes:
        classes_: labels.
        process_: trained module.
        elbo_: bound for each datum, mean of every epoch.

    Raises:
        ValueError: from `fit`, on settings out of range.

    Reference:
        Lee et al., section 3.4. Whitened, and with one scale a draw, where the authors' code draws one for each class
        and coordinate.
    """

    def __init__(
        self,
        kernel: NNGPKernel | None = None,
        *,
        n_inducing: int = 100,
        prior: tuple[float, float] | Literal["fixed"] = (2.0, 2.0),
        epochs: int = 100,
        batch_size: int = 100,
        samples: int = 20,
        test_samples: int = 1000,
        lr: float = 1e-2,
        random_state: int | None = None,
    ) -> None:
        self.kernel = kernel
        self.n_inducing = n_inducing
        self.prior = prior
        self.epochs = epochs
        self.batch_size = batch_size
        self.samples = samples
        self.test_samples = test_samples
        self.lr = lr
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> SparseStudentTClassifier:
        """Train on inputs `[N, features]` with labels `[N]`."""
        for name in ("n_inducing", "epochs", "batch_size", "samples", "test_samples"):
            checks.whole(name, getattr(self, name), 1)
        checks.positive("lr", self.lr)
        if self.prior != "fixed":
            if not isinstance(self.prior, tuple | list) or len(self.prior) != 2:
                raise ValueError(f'expected prior to be "fixed" or a pair (a, b), got {self.prior!r}')
            for name, value in zip("ab", self.prior, strict=True):
                checks.positive(f"the prior's {name}", value)
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"expected two classes or more, got 1 class: {self.classes_[0]!r}")
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        with seeded(self.seed_):
            self._train(torch.from_numpy(X), torch.from_numpy(codes))
        return self

    def _train(self, X: Tensor, y: Tensor) -> None:
        kernel = own_kernel(self.kernel)
        prior = None if self.prior == "fixed" else (float(self.prior[0]), float(self.prior[1]))
        # Every k-th point of a random order by class has the classes in proportion.
        order = torch.argsort(y + torch.rand(len(y)) / 2)
        chosen = order[torch.linspace(0, len(y) - 1, min(self.n_inducing, len(y))).round().long()]
        process = _SparseProcess(kernel, X[chosen], len(self.classes_), prior)
        optimizer = torch.optim.Adam(process.parameters(), lr=self.lr)
        batches = -(-len(X) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * batches)
        self.elbo_ = []
        for _ in range(self.epochs):
            bounds = []
            for rows in torch.randperm(len(X)).split(self.batch_size):
                optimizer.zero_grad()
                logits = process.values(*process.marginals(X[rows]), process.scales(self.samples)).log_softmax(-1)
                fits = logits.gather(-1, y[rows].expand(self.samples, -1)[..., None]).mean()
                bound = fits - process.divergence() / len(X)
                (-bound).backward()
                optimizer.step()
                schedule.step()
                bounds.append(float(bound.detach()))
            self.elbo_.append(float(np.mean(bounds)))
        self.process_ = process.requires_grad_(False)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities `[m, classes]`, the mean over draws; the same ones at every call."""
        check_is_fitted(self)
        checked: Any = validate_data(self, X, reset=False, dtype=np.float64)
        points = torch.from_numpy(checked)
        with torch.no_grad(), seeded(self.seed_):
            mean, variance = self.process_.marginals(points)
            rows = max(1, 2_000_000 // (self.test_samples * mean.shape[1]))
            scales = self.process_.scales(self.test_samples)
            parts = [
                self.process_.values(m, v, scales).softmax(-1).mean(0)
                for m, v in zip(mean.split(rows), variance.split(rows), strict=True)
            ]
        return torch.cat(parts).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Labels `[m]`."""
        return self.classes_[self.predict_proba(X).argmax(1)]
