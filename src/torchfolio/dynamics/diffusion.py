r"""Diffusion models: training by predicted noise, sampling, a small denoiser.

Clean examples $x_0$ are mixed with noise, $x_t = \alpha_t x_0 + \sigma_t \varepsilon$ with
$\alpha_t^2 + \sigma_t^2 = 1$, and a network called as `model(x, t)` or `model(x, t, cond)` predicts $\varepsilon$ from
$x_t$. What it is told of the time is `schedule.model_time(t)`. Examples should be scaled to about [-1, 1].
Schedules are in `torchfolio.dynamics.noise_schedules`.

Reference:
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv 2006.11239, algorithms 1 and 2.
    Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, arXiv 2010.02502, equations 12 and 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import between, one_of, whole
from torchfolio.data.examples import Examples
from torchfolio.dynamics.noise_schedules import DiscreteSchedule, Schedule
from torchfolio.engine import Batch, FitResult, LearningRule, evaluating, fit, seeded
from torchfolio.engine.recipes import adamw, cosine
from torchfolio.models.device import device_of

__all__ = [
    "MLPDenoiser",
    "NoisePrediction",
    "ancestral",
    "as_noise",
    "ddim",
    "noise_prediction_loss",
    "train_diffusion",
]

PREDICTIONS = ("noise", "clean", "velocity", "score")


def _device(generator: torch.Generator | None) -> torch.device | None:
    return generator.device if generator is not None else None


def as_noise(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, prediction: str = "noise") -> Tensor:
    r"""The predicted noise, whatever it is that a network predicts.

    Args:
        output: output of the network at `x`.
        x: noisy examples.
        alpha: $\alpha_t$, broadcastable to `x`.
        sigma: $\sigma_t$, broadcastable to `x`.
        prediction: `"noise"`; `"clean"`, $(x - \alpha\hat x_0)/\sigma$; `"velocity"`, $\alpha v + \sigma x$; or
            `"score"`, $-\sigma s$.

    Raises:
        ValueError: if it is none of them.
    """
    if one_of("prediction", prediction, PREDICTIONS) == "noise":
        return output
    if prediction == "clean":
        return (x - alpha * output) / sigma
    return alpha * output + sigma * x if prediction == "velocity" else -sigma * output


def noise_prediction_loss(
    model: Callable[..., Tensor],
    schedule: Schedule,
    x: Tensor,
    *cond: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""$\lVert \varepsilon_\theta(\alpha_t x + \sigma_t\varepsilon, t) - \varepsilon \rVert^2$ per number, at random times and noise.

    Args:
        model: network called as `model(x_t, model_time, *cond)`.
        schedule: schedule of the noise.
        x: clean examples `[B, …]`.
        *cond: further inputs of the network, one an example.
        generator: source of times and noise, on any device; the global one by default.

    Returns:
        Loss of each example `[B]`.
    """
    t = schedule.draw(len(x), generator).to(x.device)
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=_device(generator) or x.device).to(x.device)
    alpha, sigma = (_like(value(t), x) for value in (schedule.alpha, schedule.sigma))
    predicted = model(alpha * x + sigma * noise, schedule.model_time(t).to(x.dtype), *cond)
    if predicted.shape != x.shape:
        raise ValueError(f"expected predicted noise of shape {tuple(x.shape)}, got {tuple(predicted.shape)}")
    return (predicted - noise).square().flatten(1).mean(1)


def _like(value: Tensor, x: Tensor) -> Tensor:
    """A value for each example, to be multiplied with `x`."""
    return value.to(x).reshape(-1, *[1] * (x.dim() - 1))


class NoisePrediction(LearningRule):
    """Trains a network to predict the noise in noisy examples; for `torchfolio.engine.fit`.

    Args:
        schedule: schedule of the noise.
        conditional: whether the network is told what comes after the first tensor of a batch (labels, embeddings);
            left aside by default.

    Note:
        To validate, hand `evaluate=rule.evaluate` to `fit`: the plain forward says nothing here.

    Example:
        >>> rule = NoisePrediction(DiscreteSchedule.linear(200, 1e-4, 0.05))
        >>> fit(MLPDenoiser((1, 8, 8)), (x, y), rule=rule, max_steps=2, val=(x, y), evaluate=rule.evaluate).steps
        2
    """

    needs_targets = False

    def __init__(self, schedule: Schedule, conditional: bool = False) -> None:
        self.schedule, self.conditional = schedule, conditional
        self.model: nn.Module | None = None

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        self.model = model
        return model

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        if self.model is None:
            raise RuntimeError("call prepare(model, example) before step")
        x, *cond = batch
        loss = noise_prediction_loss(self.model, self.schedule, x, *(cond if self.conditional else ())).mean()
        backward(loss)
        return {"loss": loss.detach()}

    def evaluate(
        self, model: nn.Module, data: Any, *, repeats: int = 8, batch_size: int = 512, seed: int = 0
    ) -> dict[str, float]:
        """Mean loss over data at times and noise that depend on the seed alone.

        Args:
            model: network, evaluated in evaluation mode.
            data: examples, as `Examples` takes them.
            repeats: draws of time and noise for each example.
            batch_size: examples of a batch.
            seed: seed of times and noise.
        """
        total, count = 0.0, 0
        with seeded(seed), evaluating(model), torch.no_grad():
            device = device_of(model)
            for x, *cond in Examples(data).batches(batch_size):
                x, *cond = (value.to(device) for value in (x, *cond))
                for _ in range(whole("repeats", repeats, 1)):
                    losses = noise_prediction_loss(model, self.schedule, x, *(cond if self.conditional else ()))
                    total, count = total + float(losses.sum()), count + len(x)
        return {"loss": total / count}


def train_diffusion(
    model: nn.Module,
    x: Tensor,
    cond: Tensor | None = None,
    *,
    schedule: Schedule,
    steps: int,
    batch_size: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
    **arguments: Any,
) -> FitResult:
    """Train a network to predict noise, in place: AdamW with half a cosine.

    Args:
        model: network called as `model(x, t)`, or `model(x, t, cond)` where there is a condition.
        x: clean examples `[N, …]`, scaled to about [-1, 1].
        cond: labels or embeddings `[N, …]`, if there are any.
        schedule: schedule of the noise.
        steps: number of steps of the optimizer.
        batch_size: examples of a batch.
        lr: first learning rate.
        seed: seed of order, times and noise.
        **arguments: arguments of `torchfolio.engine.fit`, before which the above give way.
    """
    rule = NoisePrediction(schedule, conditional=cond is not None)
    # Without a condition the second tensor is there for the form alone.
    data = (x, cond if cond is not None else torch.zeros(len(x)))
    own: dict[str, Any] = {
        "rule": rule,
        "max_steps": steps,
        "batch_size": batch_size,
        "optimizer": adamw(lr),
        "scheduler": cosine(),
        "seed": seed,
        "evaluate": rule.evaluate if "val" in arguments else None,
    }
    return fit(model, data, **{**own, **arguments})


@torch.no_grad()
def ddim(
    model: Callable[..., Tensor],
    schedule: Schedule,
    noise: Tensor,
    *cond: Tensor,
    steps: int = 50,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw examples in few steps,

    $$ x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - \tilde\sigma^2}\, \varepsilon_\theta(x_t, t) + \tilde\sigma z, \qquad
       \tilde\sigma = \eta \frac{\sigma_s}{\sigma_t} \sqrt{1 - \frac{\alpha_t^2}{\alpha_s^2}}, $$

    and at the end $\hat x_0 = (x_t - \sigma_t \varepsilon_\theta) / \alpha_t$. The model's mode is the caller's business.

    Args:
        model: network that predicts noise.
        schedule: schedule that it was trained with.
        noise: start, standard normal `[B, …]`.
        *cond: further inputs of the network.
        steps: evaluations of the network.
        eta: noise that is added on the way: 0 none, 1 as much as ancestral sampling adds.
        generator: source of that noise; the global one by default.

    Returns:
        Examples `[B, …]`.
    """
    between("eta", eta, 0, 1)
    times = schedule.times(steps)
    alphas, sigmas = schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
    x = noise
    for k, t in enumerate(schedule.model_time(times).tolist()):
        predicted = model(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), *cond)
        alpha, sigma = alphas[k], sigmas[k]
        clean = (x - sigma * predicted) / alpha
        if k + 1 == len(times):
            return clean
        alpha_next, sigma_next = alphas[k + 1], sigmas[k + 1]
        added = eta * sigma_next / sigma * math.sqrt(1 - (alpha / alpha_next) ** 2)
        x = alpha_next * clean + math.sqrt(max(sigma_next**2 - added**2, 0.0)) * predicted
        if added:
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=_device(generator) or x.device)
            x = x + added * z.to(x.device)
    return x


def ancestral(
    model: Callable[..., Tensor],
    schedule: Schedule,
    noise: Tensor,
    *cond: Tensor,
    steps: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw examples by the reverse chain, with the variance of its posterior; `ddim` with `eta` 1.

    Args:
        model: network that predicts noise.
        schedule: schedule that it was trained with.
        noise: start, standard normal `[B, …]`.
        *cond: further inputs of the network.
        steps: evaluations of the network; all of a discrete schedule by default, else 1,000.
        generator: source of the noise on the way; the global one by default.
    """
    steps = steps or (schedule.steps if isinstance(schedule, DiscreteSchedule) else 1000)
    return ddim(model, schedule, noise, *cond, steps=steps, eta=1.0, generator=generator)


class MLPDenoiser(nn.Module):
    """A residual multilayer perceptron that predicts noise, for small images and points.

    Args:
        shape: shape of one example.
        hidden: width of the hidden layers.
        depth: number of residual layers.
        time_dim: sinusoidal features of the time, an even number.
        num_classes: classes that the network can be told; none by default.
        cond_dim: width of the class embedding.

    Shapes:
        `x` `[B, *shape]`, `t` `[B]` in about 0 to 1,000, and with classes `cond`: labels `[B]` or embeddings
        `[B, cond_dim]`, which `embed` gives; to `[B, *shape]`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        hidden: int = 192,
        depth: int = 4,
        time_dim: int = 32,
        num_classes: int = 0,
        cond_dim: int = 16,
    ) -> None:
        super().__init__()
        for name, value in (("hidden", hidden), ("depth", depth), ("cond_dim", cond_dim), ("time_dim", time_dim)):
            whole(name, value, 1)
        if time_dim % 2:
            raise ValueError(f"expected time_dim to be even, got {time_dim}")
        self.shape = tuple(shape)
        size = math.prod(self.shape)
        self.register_buffer("rates", torch.exp(torch.arange(time_dim // 2) * (-math.log(1e4) / (time_dim // 2))))
        self.embed = nn.Embedding(num_classes, cond_dim) if whole("num_classes", num_classes, 0) else None
        self.first = nn.Linear(size, hidden)
        self.time = nn.Linear(time_dim, hidden)
        self.cond = nn.Linear(cond_dim, hidden, bias=False) if num_classes else None
        self.layers = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(depth)])
        self.last = nn.Linear(hidden, size)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        if (cond is None) != (self.embed is None):
            raise ValueError(
                "this network takes labels or embeddings as its third input"
                if cond is None
                else "this network takes no condition"
            )
        rates = self.get_buffer("rates").to(x.dtype)
        angle = t[:, None].to(x.dtype) * rates
        h = self.first(x.flatten(1)) + self.time(torch.cat([angle.sin(), angle.cos()], 1))
        if cond is not None and self.embed is not None and self.cond is not None:
            h = h + self.cond(cond if cond.is_floating_point() else self.embed(cond))
        for layer in self.layers:
            h = h + F.silu(layer(h))
        return self.last(h).reshape(x.shape)
