r"""A diffusion model as a differentiable sampler, with gradients at a memory that does not grow with its steps.

A sample is the end of the probability flow, in exponential form with $y_t = (\alpha_T / \alpha_t) x_t$ and
$\rho_t = \alpha_T \sigma_t / \alpha_t - \sigma_T$,

$$ \frac{dy}{d\rho} = \varepsilon_\theta\big(\tfrac{\alpha_t}{\alpha_T} y,\, t(\rho),\, c\big), $$

and with $a = \partial L / \partial y$ the gradients with respect to noise, weights and condition come from going back,

$$ \frac{da}{d\rho} = -a^\top \partial_y \varepsilon, \qquad \frac{dG_\theta}{d\rho} = -a^\top \partial_\theta \varepsilon,
   \qquad \frac{dG_c}{d\rho} = -a^\top \partial_c \varepsilon. $$

The gradient with respect to the noise is ill-conditioned where trajectories part between modes; the way back then misses
the starting noise, which is reported, and `grad="symplectic"` gives the exact gradient of the steps that were made.

Reference:
    Pan, Liew, Tan, Feng, Yan, "AdjointDPM", ICLR 2024, arXiv 2307.10711, section 4 and equations 11-14. The symplectic
    gradient is that of Pan, Yan, Liew, Feng, Tan, "Towards Accurate Guided Diffusion Sampling through Symplectic
    Adjoint Method", arXiv 2312.12030.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from torchfolio.checks import finite, one_of, whole
from torchfolio.dynamics.diffusion import PREDICTIONS, as_noise
from torchfolio.dynamics.exponential_methods import METHODS, Node, make_plan
from torchfolio.dynamics.exponential_solver import Adjoint, Problem, Stats, Symplectic, integrate
from torchfolio.dynamics.noise_schedules import Schedule
from torchfolio.shown import Shown

__all__ = ["ClassifierFreeGuidance", "ClassifierGuidance", "DiffusionODE", "Solution"]

GRADIENTS = ("adjoint", "symplectic", "checkpoint", "backprop")
GRIDS = ("logsnr", "time_uniform", "time_quadratic")


class ClassifierFreeGuidance(Shown):
    r"""$\varepsilon(x, \varnothing) + w\,(\varepsilon(x, c) - \varepsilon(x, \varnothing))$, both in one batch.

    Args:
        null: condition that stands for none, of one example `[…]` or of a batch.
        scale: $w$; 1 is the conditional model, 0 the unconditional one.
    """

    def __init__(self, null: Tensor, scale: float = 3.0) -> None:
        self.null, self.scale = null, finite("scale", scale)

    def __call__(self, denoise: Callable[..., Tensor], x: Tensor, node: Node, cond: Tensor | None) -> Tensor:
        if cond is None:
            raise ValueError("classifier-free guidance needs a condition, got none")
        null = self.null.to(cond).expand_as(cond)
        plain, told = denoise(torch.cat([x, x]), torch.cat([null, cond])).chunk(2)
        return torch.lerp(plain, told, self.scale)


class ClassifierGuidance(Shown):
    r"""$\varepsilon(x) - w \sigma_t \nabla_x \log p(c \mid x)$.

    Args:
        log_prob: `(x, model_time, cond) -> [B]`, differentiable in x; model_time is `[B]`.
        scale: $w$.
        tell: whether the denoiser is told the condition too.
    """

    def __init__(self, log_prob: Callable[..., Tensor], scale: float = 1.0, tell: bool = False) -> None:
        self.log_prob, self.scale, self.tell = log_prob, finite("scale", scale), tell

    def __call__(self, denoise: Callable[..., Tensor], x: Tensor, node: Node, cond: Tensor | None) -> Tensor:
        noise = denoise(x, cond if self.tell else None)
        through = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            t = torch.full((len(x),), node.model_time, dtype=x.dtype, device=x.device)
            score = self.log_prob(leaf, t, cond).sum()
            (score,) = torch.autograd.grad(score, leaf, create_graph=through)
        return noise - self.scale * node.sigma * (score if through else score.detach())


@dataclass(frozen=True, repr=False)
class Solution(Shown):
    """What a solve gives.

    Attributes:
        x: samples `[B, …]`, differentiable.
        times: grid `[steps + 1]`.
        trajectory: x at every time of the grid `[steps + 1, B, …]`, detached, if it was asked for.
        stats: evaluations, and after a backward pass of the adjoint method its error of reconstruction.
    """

    x: Tensor
    times: Tensor
    trajectory: Tensor | None
    stats: Stats


class DiffusionODE(Shown):
    """A diffusion model as a differentiable sampler.

    Args:
        eps_model: module or function called as `model(x, t)` or `model(x, t, cond)`, where t is `schedule.model_time`
            of each example `[B]`; its output, or the `sample` of its output as in `diffusers`, has the shape of x.
        schedule: schedule that it was trained with.
        prediction: quantity that it predicts: `"noise"`, `"clean"`, `"velocity"`, `"score"`.
        guidance: `ClassifierFreeGuidance`, `ClassifierGuidance`, or a function
            `(denoise, x, node, cond) -> noise` of your own, where `denoise(x, cond)` is the predicted noise.

    Raises:
        ValueError: if the prediction is none of them.

    Example:
        >>> ode = DiffusionODE(net, DiscreteSchedule.linear(1000))
        >>> noise = torch.randn(4, 2, requires_grad=True)
        >>> ode.sample(noise, steps=5).square().mean().backward()
        >>> noise.grad.shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        eps_model: Callable[..., Any],
        schedule: Schedule,
        prediction: str = "noise",
        guidance: Callable[..., Tensor] | None = None,
    ) -> None:
        self.eps_model, self.schedule, self.guidance = eps_model, schedule, guidance
        self.prediction = one_of("prediction", prediction, PREDICTIONS)

    def sample(
        self, noise: Tensor, steps: int = 30, method: str = "heun", grid: str | Tensor = "logsnr", **kw: Any
    ) -> Tensor:
        """The samples of `solve` alone."""
        return self.solve(noise, steps, method, grid, **kw).x

    def solve(
        self,
        noise: Tensor,
        steps: int = 30,
        method: str = "heun",
        grid: str | Tensor = "logsnr",
        *,
        cond: Tensor | None = None,
        grad: str = "adjoint",
        backward_method: str | None = None,
        params: Sequence[Tensor] | None = None,
        trajectory: bool = False,
    ) -> Solution:
        r"""Go from noise to samples. Gradients reach `noise`, `cond` and `params`.

        Args:
            noise: start, $x_T$ `[B, …]` in floating point. States are kept in 32 bits or more.
            steps: number of steps of the grid, 1 or more.
            method: `"euler"`, `"midpoint"`, `"heun"`, `"rk4"` or `"ab2"` (explicit Adams).
            grid: `"logsnr"` and `"time_uniform"`, evenly spaced in $\lambda$ and in t; `"time_quadratic"`, in the root
                of t; or falling times of your own `[steps + 1]`, the first of which is the noise's.
            cond: condition that the model is handed: labels or embeddings `[B, …]`.
            grad: `"adjoint"` stores the ends alone; `"symplectic"` the states, and is exact; `"checkpoint"` and
                `"backprop"` are autograd's own, for comparison.
            backward_method: method of the adjoint equation; that of the way to the sample by default.
            params: tensors that want gradients; by default the model's parameters that require them.
            trajectory: whether to give the states on the way.

        Raises:
            ValueError: on unknown names, a grid that does not fall, a model in training mode that is random or counts
                statistics, or one that depends on tensors that want gradients and were not handed over.
            TypeError: if the noise is no tensor in floating point.
        """
        self._check(noise, cond)
        one_of("grad", grad, GRADIENTS)
        one_of("method", method, METHODS)
        back = one_of("backward_method", backward_method or method, METHODS)
        times = self._times(steps, grid)
        everything, autograd = params is None, grad in ("checkpoint", "backprop")
        params = self._params(params)
        problem = Problem(
            self._drift(noise.dtype, params if autograd else None),
            make_plan(self.schedule, times, METHODS[method], times[0]),
            make_plan(self.schedule, times.flip(0), METHODS[back], times[0]),
            params,
            Stats(),
        )
        if torch.is_grad_enabled() and not autograd:
            self._check_graph(problem, noise, cond, whole_model=everything)
        y = noise.to(torch.promote_types(noise.dtype, torch.float32))
        states = [y.detach()]
        problem.see = (lambda state: states.append(state[0].detach())) if trajectory else None
        if autograd:
            end = _by_autograd(problem, y, cond, grad == "checkpoint")
        else:
            end = (Adjoint if grad == "adjoint" else Symplectic).apply(problem, y, cond, *params)
        scale = (self.schedule.alpha(times) / self.schedule.alpha(times[0])).tolist()
        path = torch.stack([c * state for c, state in zip(scale, states, strict=True)]) if trajectory else None
        return Solution((scale[-1] * end).to(noise.dtype), times, path, problem.stats)

    @torch.no_grad()
    def reconstruction_error(
        self,
        noise: Tensor,
        steps: int = 30,
        method: str = "heun",
        grid: str | Tensor = "logsnr",
        *,
        cond: Tensor | None = None,
        backward_method: str | None = None,
    ) -> Tensor:
        """How far from the noise the way back ends, over its norm, for each example `[B]`: the adjoint's health.

        Arguments are those of `solve`. Above some percent the adjoint's gradient is not to be trusted.
        """
        end = self.solve(noise, steps, method, grid, cond=cond)
        back = make_plan(self.schedule, end.times.flip(0), METHODS[backward_method or method], end.times[0])
        problem = Problem(self._drift(noise.dtype, None), back, back, [], Stats())
        y = end.x / float(self.schedule.alpha(end.times[-1]) / self.schedule.alpha(end.times[0]))
        (start,) = integrate(back, problem.slope(cond), (y,))
        return (start - noise).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)

    def _drift(self, dtype: torch.dtype, only: Sequence[Tensor] | None) -> Callable[..., Tensor]:
        """The predicted noise at a node; with `only`, the model's other parameters get no gradient."""
        model = self.eps_model
        if only is not None and isinstance(model, nn.Module):
            chosen = {id(p) for p in only}
            if frozen := {
                n: p.detach() for n, p in model.named_parameters() if p.requires_grad and id(p) not in chosen
            }:
                module = model
                model = lambda *inputs: functional_call(module, frozen, inputs)  # noqa: E731

        def drift(node: Node, y: Tensor, cond: Tensor | None) -> Tensor:
            def denoise(x: Tensor, cond: Tensor | None) -> Tensor:
                t = torch.full((len(x),), node.model_time, dtype=dtype, device=x.device)
                output = model(x, t) if cond is None else model(x, t, cond)
                output = output if isinstance(output, Tensor) else output.sample
                if output.shape != x.shape:
                    raise ValueError(
                        f"expected the model's output of shape {tuple(x.shape)}, got {tuple(output.shape)}"
                    )
                alpha, sigma = (torch.tensor(v, dtype=x.dtype) for v in (node.alpha, node.sigma))
                return output if prediction == "noise" else as_noise(output, x, alpha, sigma, prediction)

            x = (node.scale * y).to(dtype)
            noise = denoise(x, cond) if self.guidance is None else self.guidance(denoise, x, node, cond)
            return noise.to(y.dtype)

        prediction = self.prediction
        return drift

    def _times(self, steps: int, grid: str | Tensor) -> Tensor:
        if isinstance(grid, Tensor):
            times = grid.detach().double().cpu()
            low, high = self.schedule.t_min, self.schedule.t_max
            if times.dim() != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
                raise ValueError(f"expected a grid of two or more falling times, got {grid!r:.80}")
            if times[-1] < low - 1e-12 or times[0] > high + 1e-12:
                raise ValueError(f"expected times from {high} to {low}, got {float(times[0])} to {float(times[-1])}")
            return times
        one_of("grid", grid, GRIDS)
        ends = torch.tensor([self.schedule.t_max, self.schedule.t_min], dtype=torch.float64)
        share = torch.linspace(0, 1, whole("steps", steps, 1) + 1, dtype=torch.float64)
        if grid == "logsnr":
            first, last = self.schedule.log_snr(ends)
            times = self.schedule.time(torch.lerp(first, last, share))
        else:
            power = 2 if grid == "time_quadratic" else 1
            first, last = ends ** (1 / power)
            times = torch.lerp(first, last, share) ** power
        times[0], times[-1] = ends
        return times

    def _params(self, params: Sequence[Tensor] | None) -> list[Tensor]:
        if params is not None:
            params = list(params)
            for p in params:
                if not isinstance(p, Tensor) or not p.requires_grad:
                    raise ValueError("expected params to be tensors that require gradients")
            return params
        parts = [m for m in (self.eps_model, self.guidance) if isinstance(m, nn.Module)]
        return list({id(p): p for part in parts for p in part.parameters() if p.requires_grad}.values())

    def _check(self, noise: Tensor, cond: Tensor | None) -> None:
        if not isinstance(noise, Tensor) or not noise.is_floating_point():
            raise TypeError(f"expected the noise to be a tensor in floating point, got {type(noise).__name__}")
        if noise.dim() < 2 or not noise.numel():
            raise ValueError(f"expected the noise of one example or more [B, …], got shape {tuple(noise.shape)}")
        finite("noise", noise)
        if cond is not None:
            finite("cond", cond)
        for part in (self.eps_model, self.guidance):
            for name, module in part.named_modules() if isinstance(part, nn.Module) else ():
                random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
                if module.training and (random or isinstance(module, nn.modules.batchnorm._BatchNorm)):
                    raise ValueError(
                        f"{name or type(module).__name__} is in training mode, so the way back would be another than the "
                        "way to the sample; call model.eval() first"
                    )

    def _check_graph(self, problem: Problem, noise: Tensor, cond: Tensor | None, whole_model: bool) -> None:
        """Refuse a model that depends on what wants a gradient and would silently get none.

        Parameters that were left out of a list that the caller gave are left out on purpose.
        """
        with torch.enable_grad():
            y = noise.detach().to(torch.promote_types(noise.dtype, torch.float32), copy=True).requires_grad_()
            output = problem.drift(problem.forward.nodes[0][0], y, None if cond is None else cond.detach())
        known = {id(p) for p in (y, *problem.params, *self._params(None))}
        for leaf in _leaves(output):
            if id(leaf) in known or (isinstance(leaf, nn.Parameter) and not whole_model):
                continue
            kind = "a parameter" if isinstance(leaf, nn.Parameter) else "a tensor"
            raise ValueError(
                f"the model depends on {kind} of shape {tuple(leaf.shape)} that requires a gradient and would get none: "
                "hand it over as cond= or in params=, or turn requires_grad off"
            )


def _leaves(output: Tensor) -> list[Tensor]:
    """Leaves of a graph that gradients would be accumulated in."""
    leaves, seen, stack = [], set(), [output.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack += [parent for parent, _ in node.next_functions]
    return leaves


def _by_autograd(problem: Problem, y: Tensor, cond: Tensor | None, recompute: bool) -> Tensor:
    """Autograd through all steps, storing the states alone or everything."""
    plan, slope, before = problem.forward, problem.slope(cond), None
    state = (y,)
    for nodes, length, ratio in zip(plan.nodes, plan.lengths, plan.ratios, strict=True):
        arguments = (slope, nodes, length, ratio, state, before)
        if recompute:
            state, before = checkpoint(plan.method.step, *arguments, use_reentrant=False)  # pyright: ignore[reportGeneralTypeIssues]
        else:
            state, before = plan.method.step(*arguments)
        if problem.see is not None:
            problem.see(state)
    return state[0]
