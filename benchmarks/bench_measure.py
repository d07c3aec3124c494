"""What the measurements cost, each against another way to the same number.

Products with the Hessian, Lanczos cold and warm along a training run against ARPACK, per-example gradients,
CKA, AUROC, moments and memory, timed in alternation in one process. Run it with

    python benchmarks/bench_measure.py [--rounds 7] [--only lanczos]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn import functional as F

from torchfolio.measure import (
    Hessian,
    StreamingMoments,
    alternate,
    auroc,
    hessian_eigenvalues,
    linear_cka,
    per_example_gradients,
    saved_bytes,
)


def task() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """An MLP of 10,000 parameters on digits, partly trained."""
    x, y = load_digits(return_X_y=True)
    data = torch.tensor(x / 16, dtype=torch.float32)[:1000], torch.tensor(y)[:1000]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    descend(net, data, 50)
    return net, data


def descend(net: nn.Module, data: tuple[Tensor, Tensor], steps: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(data[0]), data[1]).backward()
        optimizer.step()


def products(rounds: int) -> None:
    """A product with the Hessian: graph kept, graph built anew, forward over reverse; floor: a gradient."""
    net, data = task()
    kept = Hessian(net, F.cross_entropy, data)
    v = torch.randn(kept.n)
    values = {n: p.detach() for n, p in net.named_parameters()}
    tangents = kept.split(v)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(net, weights, (data[0],)), data[1])

    forward_over_reverse = torch.cat([t.flatten() for t in jvp(grad(loss), (values,), (tangents,))[1].values()])
    torch.testing.assert_close(kept(v), forward_over_reverse, rtol=1e-3, atol=1e-5)
    timed = alternate(
        gradient=lambda: torch.autograd.grad(F.cross_entropy(net(data[0]), data[1]), list(net.parameters())),
        kept_graph=lambda: kept(v),
        new_graph=lambda: Hessian(net, F.cross_entropy, data)(v),
        forward_over_reverse=lambda: jvp(grad(loss), (values,), (tangents,)),
        repeats=rounds,
    )
    print(timed)


def lanczos(rounds: int) -> None:
    """The largest eigenvalue at ten points of a training run, against ARPACK at the same tolerance."""
    net, data = task()
    counts: dict[str, list[int]] = {"cold": [], "warm": [], "arpack": []}
    errors: dict[str, list[float]] = {name: [] for name in counts}
    start = None
    for _ in range(10):
        exact = hessian_eigenvalues(net, F.cross_entropy, data, tolerance=1e-6).values.item()
        cold = hessian_eigenvalues(net, F.cross_entropy, data)
        warm = hessian_eigenvalues(net, F.cross_entropy, data, start=start)
        operator, calls = arpack(net, data)
        peer = largest(operator)
        start = warm.vectors
        found = (cold.values.item(), warm.values.item(), peer)
        for name, number, value in zip(counts, (cold.products, warm.products, len(calls)), found, strict=True):
            counts[name].append(number)
            errors[name].append(abs(value / exact - 1))
        descend(net, data, 5)
    for name, numbers in counts.items():
        print(f"{name:>8}: {np.mean(numbers):5.1f} products, relative error at most {max(errors[name]):.1e}")
    timed = alternate(
        warm=lambda: hessian_eigenvalues(net, F.cross_entropy, data, start=start),
        cold=lambda: hessian_eigenvalues(net, F.cross_entropy, data),
        arpack=lambda: largest(arpack(net, data)[0]),
        repeats=rounds,
    )
    print(timed)


def largest(operator: LinearOperator) -> float:
    return float(eigsh(operator, 1, which="LA", tol=1e-3, return_eigenvectors=False)[0])  # pyright: ignore


def arpack(net: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[LinearOperator, list[int]]:
    hessian, calls = Hessian(net, F.cross_entropy, data), []

    def product(v: np.ndarray) -> np.ndarray:
        calls.append(1)
        return hessian(torch.from_numpy(v.astype(np.float32).reshape(-1))).numpy()

    return LinearOperator((hessian.n, hessian.n), matvec=product, dtype=np.float32), calls  # pyright: ignore


def gradients(rounds: int) -> None:
    """Gradients of 200 single examples: one vectorised pass against a loop."""
    net, (x, y) = task()
    x, y = x[:200], y[:200]

    def loop() -> None:
        for i in range(len(x)):
            torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), list(net.parameters()))

    print(alternate(vmap=lambda: per_example_gradients(net, F.cross_entropy, (x, y)), loop=loop, repeats=rounds))


def similarity(rounds: int) -> None:
    """Linear CKA of 256 examples with 4096 and 512 features, against the definition with full matrices."""
    torch.manual_seed(0)
    x, y = torch.randn(256, 4096), torch.randn(256, 512)

    def by_definition() -> Tensor:
        h = torch.eye(256) - 1 / 256
        k, m = h @ (x @ x.T) @ h, h @ (y @ y.T) @ h
        return (k * m).sum() / (k.norm() * m.norm())

    torch.testing.assert_close(linear_cka(x, y), by_definition(), rtol=1e-4, atol=1e-6)
    print(alternate(ours=lambda: linear_cka(x, y), definition=by_definition, repeats=rounds))


def ranking(rounds: int) -> None:
    """AUROC of 100,000 scores, against scikit-learn."""
    torch.manual_seed(0)
    scores, positive = torch.randn(100_000), torch.rand(100_000) < 0.2
    print(
        alternate(
            ours=lambda: auroc(scores, positive),
            sklearn=lambda: roc_auc_score(positive.numpy(), scores.numpy()),
            repeats=rounds,
        )
    )


def moments(rounds: int) -> None:
    """Covariance of 20,000 rows of 128 features in batches, against numpy on all of them at once."""
    x = torch.randn(20_000, 128)

    def stream() -> None:
        statistics = StreamingMoments()
        for part in x.split(500):
            statistics.update(part)

    print(alternate(numpy=lambda: np.cov(x.double().numpy().T), stream=stream, repeats=rounds))


def memory(rounds: int) -> None:
    """A training step with and without its saved bytes counted."""
    net, data = task()

    def step() -> None:
        F.cross_entropy(net(data[0]), data[1]).backward()

    print(alternate(step=step, measured=lambda: saved_bytes(step, exclude=net), repeats=rounds))


PARTS: dict[str, Callable[[int], None]] = {
    part.__name__: part for part in (products, lanczos, gradients, similarity, ranking, moments, memory)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=PARTS)
    arguments = parser.parse_args()
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            print(f"\n{part.__doc__}")
            part(arguments.rounds)


if __name__ == "__main__":
    main()
