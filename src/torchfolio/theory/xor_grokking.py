"""Grokking and benign overfitting in a two-layer network on XOR clusters, simulated exactly at any dimension.

Zhiwei Xu, Yutong Wang, Spencer Frei, Gal Vardi, Wei Hu, "Benign Overfitting and Grokking in ReLU Networks for XOR Cluster
Data", ICLR 2024, https://arxiv.org/abs/2310.02541.

Four Gaussian clusters stand at $\\pm\\mu_1$ (label 1) and $\\pm\\mu_2$ (label -1), and a share of the training labels is
flipped. Full-batch gradient descent on the hidden weights of $f(x) = \\sum_j a_j \\phi(w_j^\\top x)$ fits every label in one
step, as a linear classifier that is at chance on new data. A few steps later the same network, which still fits every
flipped label, is nearly perfect on new data.

    data = xor_clusters(200, 20_000, mu=500**0.5, noise_rate=0.1, balanced=True)
    network = XORNetwork(20_000, 200, init_std=5e-9)
    run = DualGD(data, network, lr=5e-5).run(20, test=xor_clusters(1000, 20_000, mu=500**0.5))
    run.plot(steps=[1, 15])

The theorem asks for sizes out of reach (100 samples already need $p \\ge 10^{10}$). Settings as above keep what matters of
its conditions: $p / (n \\|\\mu\\|^2)$ not small, so that flipped labels are memorised; $n \\|\\mu\\|^4 / p$ of a thousand or
more, so that the clusters are learned; and a first step that outweighs the initial weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import finite, positive, whole
from torchfolio.shown import Shown
from torchfolio.theory.grokking import Trajectory, alignment, alignment_of, grokking_time, odd_energy, odd_energy_of
from torchfolio.theory.xor_clusters import BLOCK, XORClusters, draw_seed, normal_blocks, xor_clusters

__all__ = [
    "DualGD",
    "Trajectory",
    "XORClusters",
    "XORNetwork",
    "alignment",
    "grokking_time",
    "odd_energy",
    "xor_clusters",
]

Activation = Callable[[Tensor], Tensor]
Points = XORClusters | tuple[Tensor, Tensor]


class XORNetwork(nn.Module):
    """$f(x) = \\sum_{j=1}^m a_j \\phi(w_j^\\top x)$ with $a_j = \\pm 1/\\sqrt m$, half of each sign, frozen.

    Args:
        in_features: dimension $p$.
        width: number of neurons $m$, even.
        init_std: standard deviation $\\omega$ of the initial weights, above 0: at 0 every neuron would stand on its kink.
            The paper's regime has it far below the first step, for example `1e-4 * lr`.
        activation: elementwise function $\\phi$; ReLU by default, whose derivative at 0 is 0.
        train_output: whether $a$ is trained too, which the paper does not.
        generator: CPU generator to draw with; torch's global one by default.
        dtype: type of the weights.
        device: device of the weights. `"meta"` keeps none: `DualGD` then draws them block by block, so that any
            dimension fits.

    Shapes:
        `[N, p]` to `[N]`.

    Raises:
        ValueError: if `width` is odd, `init_std` is not above 0, or a size is below 1.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        init_std: float,
        *,
        activation: Activation = torch.relu,
        train_output: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        whole("in_features", in_features, 1)
        if whole("width", width, 2) % 2:
            raise ValueError(f"expected width to be even, half of the neurons for each class, got {width}")
        self.init_std = positive("init_std", init_std)
        self.activation = activation
        self.seed = draw_seed(generator)
        self.weight = nn.Parameter(torch.empty(width, in_features, dtype=dtype, device=device))
        self.a = nn.Parameter(torch.empty(width, dtype=dtype, device=device), requires_grad=train_output)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Put the weights where they began."""
        self.a.copy_(self.initial_output())
        if not self.weight.is_meta:
            for part, drawn in zip(self.weight.split(BLOCK, 1), self._drawn(), strict=True):
                part.copy_(drawn)

    def initial_output(self) -> Tensor:
        """$a$ as it began, `[m]`, on the CPU."""
        width = len(self.weight)
        return torch.where(torch.arange(width) < width // 2, 1.0, -1.0).double() * width**-0.5

    def _drawn(self) -> Iterator[Tensor]:
        width, in_features = self.weight.shape
        return (self.init_std * noise for noise in normal_blocks(width, in_features, self.seed, self.weight.dtype))

    def blocks(self) -> Iterator[Tensor]:
        """The hidden weights in blocks of 4,096 features; those of the beginning where none are kept."""
        return self._drawn() if self.weight.is_meta else iter(self.weight.detach().split(BLOCK, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x @ self.weight.T) @ self.a

    def extra_repr(self) -> str:
        width, in_features = self.weight.shape
        activation = getattr(self.activation, "__name__", repr(self.activation))
        return f"in_features={in_features}, width={width}, init_std={self.init_std:g}, activation={activation}"


class DualGD(Shown):
    """Full-batch gradient descent on the logistic loss, exact, in the span of the training points.

    $W^{(t)} = W^{(0)} + C^\\top X$, so that hidden activations are $H = X W^{(0)\\top} + G C$ with the Gram matrix
    $G = X X^\\top$, and a step is $C \\leftarrow C - \\alpha \\, \\partial L / \\partial H$ with
    $L = \\frac1n \\sum_i \\log(1 + e^{-y_i f(x_i)})$. This is gradient descent on the weights, for any elementwise
    activation. Points and initial weights are gone through once, in blocks of features; a step costs $O(n^2 m)$.

    Args:
        data: clusters, or any points `[n, p]` and labels -1 or 1 `[n]`, in float32 or float64.
        network: network to start from; it is not changed. Its output weights are trained if they require gradients.
        lr: learning rate $\\alpha$, above 0.

    Attributes:
        steps: number of steps taken.
        coefficients: $C$, `[n, m]`, float64.
        a: output weights, `[m]`, float64.

    Raises:
        ValueError: if labels are not -1 or 1, points are not finite, dimensions differ, or `lr` is not above 0.
        TypeError: if points or weights are neither float32 nor float64: a Gram matrix in fewer bits loses the signal.

    Reference:
        Xu et al., ICLR 2024, section 2, for gradient descent; the dual form is ours.
    """

    def __init__(self, data: Points, network: XORNetwork, lr: float) -> None:
        # A copy, since the weights are needed again later, and the caller may train on.
        self.data, self.network, self.lr = data, copy.deepcopy(network), positive("lr", lr)
        self.y = _labels(data, noisy=True)
        self.gram, self._start = _products(data, data, network)
        a = network.initial_output() if network.a.is_meta else network.a.detach()
        self.a = a.to(self.y, copy=True)
        # What the neurons' coordinates and norms need of the beginning; the means lie along the first two axes.
        self._points = next(_blocks(data))[:, :2].to(self.y)
        self._weight = next(network.blocks())[:, :2].to(self.y)
        norms = [torch.linalg.vector_norm(w, dim=1, dtype=torch.float64) for w in network.blocks()]
        self._square = torch.stack(norms).square().sum(0).to(self.y)
        self.steps = 0
        self.coefficients = torch.zeros_like(self._start)
        self.hidden = self._start

    @torch.enable_grad()
    def step(self) -> float:
        """Take one step; returns the loss before it."""
        hidden, a = self.hidden.detach().requires_grad_(), self.a.detach()
        trained = [hidden, a.requires_grad_()] if self.network.a.requires_grad else [hidden]
        loss = F.softplus(-self.y * (self.network.activation(hidden) @ a)).mean()
        gradient, *output = torch.autograd.grad(loss, trained)
        self.coefficients -= self.lr * gradient
        self.hidden = self._start + self.gram @ self.coefficients
        for slope in output:
            self.a = a.detach() - self.lr * slope
        self.steps += 1
        return float(loss.detach())

    @torch.no_grad()
    def predict(self, x: Tensor | XORClusters) -> Tensor:
        """Outputs at points `[N, p]`: `[N]`, float64."""
        return self._output(self._hidden_of(x)())

    @torch.no_grad()
    def weight(self) -> Tensor:
        """The hidden weights $W^{(0)} + C^\\top X$, `[m, p]`, in memory."""
        pairs = zip(self.network.blocks(), _blocks(self.data), strict=True)
        return torch.cat([w + (self.coefficients.T.to(x) @ x).to(w) for w, x in pairs], 1)

    @torch.no_grad()
    def run(self, steps: int, test: Points | None = None) -> Trajectory:
        """Take some steps, with diagnostics before the first and after each.

        Args:
            steps: number of steps, at least 1.
            test: data to measure on, by their clean labels; their products with the training points are formed once.

        Raises:
            ValueError: if `steps` is below 1, or outputs are not finite any more.
        """
        import pandas as pd

        whole("steps", steps, 1)
        clusters = isinstance(self.data, XORClusters)
        hidden_of_test = None if test is None else self._hidden_of(test if isinstance(test, XORClusters) else test[0])
        labels = None if test is None else _labels(test, noisy=False)
        index, rows, neurons = pd.RangeIndex(self.steps, self.steps + steps + 1, name="step"), [], []
        for t in index:
            if t > index[0]:
                self.step()
            row = self._train_row()
            if hidden_of_test is not None and labels is not None:
                row |= self._test_row(hidden_of_test(), labels)
            if clusters:
                along, norm = self._neurons()
                row |= dict(
                    zip(("aligned", "own_cosine", "other_cosine"), alignment_of(along, norm, self.a), strict=True)
                )
                neurons.append(along.cpu())
            rows.append(row)
        planes = torch.stack(neurons) if clusters else torch.empty(0, len(self.a), 2)
        return Trajectory(pd.DataFrame(rows, index=index), planes, self.a.cpu())

    def _output(self, hidden: Tensor) -> Tensor:
        return self.network.activation(hidden) @ self.a

    def _hidden_of(self, x: Tensor | XORClusters) -> Callable[[], Tensor]:
        """What gives the hidden activations of other points at the present step."""
        gram, start = _products(x if isinstance(x, XORClusters) else (x, x), self.data, self.network)
        return lambda: start + gram @ self.coefficients

    def _train_row(self) -> dict[str, float]:
        output = self._output(self.hidden)
        if not torch.isfinite(output).all():
            raise ValueError(f"the outputs are not finite after step {self.steps}, expected lr below {self.lr!r}")
        margin, clean = self.y * output, _labels(self.data, noisy=False)
        flipped = self.y != clean
        return {
            "loss": float(F.softplus(-margin).mean()),
            "train_accuracy": float((margin > 0).double().mean()),
            "train_clean_accuracy": float((clean * output > 0).double().mean()),
            "flipped_margin": float(margin[flipped].min()) if bool(flipped.any()) else math.nan,
        }

    def _test_row(self, hidden: Tensor, labels: Tensor) -> dict[str, float]:
        # There is no bias, so that the outputs at -x come from the same activations.
        plus, minus = self._output(hidden), self._output(-hidden)
        accuracy = float((labels * plus > 0).double().mean())
        rate = self.data.noise_rate if isinstance(self.data, XORClusters) else 0.0
        noisy = (1 - rate) * accuracy + rate * (1 - accuracy)
        return {"test_accuracy": accuracy, "test_noisy_accuracy": noisy, "odd_energy": odd_energy_of(plus, minus)}

    def _neurons(self) -> tuple[Tensor, Tensor]:
        """Coordinates along the means `[m, 2]` and norms `[m]`, by $\\|w\\|^2 = \\|w_0\\|^2 + c^\\top (2 h_0 + G c)$."""
        along = self._weight + self.coefficients.T @ self._points
        grown = (self.coefficients * (self._start + self.hidden)).sum(0)
        return along, (self._square + grown).clamp_min(0).sqrt()


def _blocks(data: XORClusters | tuple[Tensor, Tensor]) -> Iterator[Tensor]:
    return data.blocks() if isinstance(data, XORClusters) else iter(data[0].split(BLOCK, 1))


def _labels(data: Points, *, noisy: bool) -> Tensor:
    y = data[1] if isinstance(data, tuple) else data.y if noisy else data.clean
    if y.dim() != 1 or not (y.abs() == 1).all():
        raise ValueError(
            f"expected labels -1 or 1, [n], got shape {tuple(y.shape)} and values {y.unique().tolist()[:5]}"
        )
    return y.double()


@torch.no_grad()
def _products(left: Points, right: Points, network: XORNetwork) -> tuple[Tensor, Tensor]:
    """$X_* X^\\top$ and $X_* W_0^\\top$ in one pass; blocks are multiplied in their own type and summed in float64."""
    features = network.weight.shape[1]
    for data in (left, right):
        shape = (len(data), data.num_features) if isinstance(data, XORClusters) else tuple(data[0].shape)
        if len(shape) != 2 or not shape[0] or shape[1] != features:
            raise ValueError(f"expected points [n, {features}], as many features as the network has, got {shape}")
    gram = start = torch.zeros(())
    for x, points, weight in zip(_blocks(left), _blocks(right), network.blocks(), strict=True):
        if not {x.dtype, points.dtype, weight.dtype} <= {torch.float32, torch.float64}:
            raise TypeError(f"expected float32 or float64, got points in {x.dtype} and weights in {weight.dtype}")
        gram = gram.to(x.device) + (finite("points", x) @ points.to(x).T).double()
        start = start.to(x.device) + (x @ weight.to(x).T).double()
    return gram, start
