r"""Annealed Gaussian noise on gradients.

Just before every step of an optimizer, every number of every gradient gets its own draw,

$$ g_t \leftarrow g_t + \varepsilon_t, \qquad \varepsilon_t \sim N(0, \sigma_t^2), \qquad
   \sigma_t^2 = \frac{\eta}{(1 + t)^\gamma}, $$

where $t = 0, 1, \dots$ counts optimizer steps: neither epochs nor the batches of an accumulated gradient. Clip before,
so that the variance is $\sigma_t^2$ exactly.

Under plain SGD with learning rate $\lambda$ the noise alone moves every weight by a random walk of variance
$\lambda^2 \eta\, t^{1-\gamma} / (1 - \gamma)$. A ReLU network of width $n$ whose weights are all zero begins to pass
signals on when that reaches about $2 / n$, which says what $\lambda$ and $\eta$ have to be for the steps at hand; far
above it the weights are too large before learning begins. Adam and its like divide by the size of gradients: where
those are zero, noise of any size becomes steps of the learning rate's size, so that $\eta$ has to be chosen anew.

Reference:
    Neelakantan, Vilnis, Le, Sutskever, Kaiser, Kurach, Martens, "Adding Gradient Noise Improves Learning for Very Deep
    Networks", arXiv 1511.06807, equation 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import LBFGS, Optimizer

from torchfolio.checks import at_least, whole
from torchfolio.engine import Added, Batch, LearningRule, Objective
from torchfolio.training.flat_noise import add_normal_

__all__ = ["GradientNoise", "NoisyGradients", "add_gradient_noise_", "gradient_noise_std"]

Parameters = Tensor | Iterable[Tensor] | Iterable[Mapping[str, Any]]
KEY = "gradient_noise"  # of its state in an optimizer's


def gradient_noise_std(step: int, eta: float = 0.01, gamma: float = 0.55) -> float:
    r"""The standard deviation $\sigma_t = \sqrt\eta\, (1 + t)^{-\gamma / 2}$ of the noise.

    Args:
        step: optimizer steps already made, 0 or more.
        eta: variance at the first step, 0 or more; the paper chooses from 0.01, 0.3 and 1.
        gamma: exponent of the decay, 0 or more; 0 is constant noise.

    Raises:
        ValueError: if one is negative or not finite.
        TypeError: if one is no number.
    """
    whole("step", step, 0)
    for name, value in (("eta", eta), ("gamma", gamma)):
        at_least(name, value, 0)
    return math.sqrt(eta) * (1 + step) ** (-gamma / 2)


def add_gradient_noise_(
    parameters: Parameters,
    step: int,
    *,
    eta: float = 0.01,
    gamma: float = 0.55,
    generator: torch.Generator | None = None,
) -> float:
    """Add the noise of one step to gradients in place; call it once before `optimizer.step()`, after clipping.

    Parameters without a gradient are left alone; gradients that are zero get noise. One draw serves all gradients of a
    device and dtype, in 32 bits for those of 16. Of complex gradients real and imaginary part have half the variance.

    Args:
        parameters: a parameter, several, or an optimizer's groups; one that is given twice counts once.
        step: optimizer steps already made.
        eta: variance at the first step; 0 does nothing and draws nothing.
        gamma: exponent of the decay.
        generator: source of the draws, of any device; the global one by default. With several processes it must be in
            the same state on all, or their weights drift apart.

    Returns:
        The standard deviation of the noise.

    Raises:
        ValueError: if a number is negative or not finite.
        NotImplementedError: if a gradient is sparse or sharded.

    Example:
        >>> loss.backward()
        >>> torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        >>> add_gradient_noise_(net.parameters(), step, eta=0.3)
        >>> optimizer.step()
    """
    std = gradient_noise_std(step, eta, gamma)
    add_normal_(parameters, std, generator, {})
    return std


class GradientNoise:
    """Adds the noise at every step of an optimizer, from inside `optimizer.step()`.

    The optimizer stays what it is: schedulers, clipping, accumulation and `GradScaler` work as before. Steps that a
    scaler skips are not counted. The number of steps, and the state of the generator if there is one, are part of the
    optimizer's state dict, so that a training that goes on from a checkpoint of `torchfolio.engine.fit` draws what it
    would have drawn. With several processes and no generator, the first process seeds one for all, so that all add the
    same noise.

    Args:
        optimizer: any optimizer whose `step` is called without a closure.
        eta: variance at the first step, 0 or more; 0 does nothing and draws nothing.
        gamma: exponent of the decay, 0 or more.
        generator: source of the draws; the global one by default.

    Attributes:
        step: optimizer steps made.

    Raises:
        ValueError: if a number is out of range, or the optimizer has gradient noise already.
        TypeError: if the optimizer evaluates closures, as LBFGS does: gradients would come after the noise; or if the
            generator is none.

    Note:
        Copies of an optimizer, by `copy.deepcopy` or pickle, lose all hooks, and so the noise. Copy the `GradientNoise`
        instead: it comes with a copy of its optimizer, and the noise is on that one.

    Example:
        >>> noise = GradientNoise(torch.optim.SGD(net.parameters(), lr=0.03), eta=0.3)
        >>> fit(net, train, optimizer=lambda p: GradientNoise(torch.optim.SGD(p, lr=0.03), eta=0.3).optimizer)
    """

    def __init__(
        self, optimizer: Optimizer, eta: float = 0.01, gamma: float = 0.55, generator: torch.Generator | None = None
    ) -> None:
        gradient_noise_std(0, eta, gamma)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected a torch optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, LBFGS):
            raise TypeError("LBFGS computes gradients inside its step, after the noise; expected another optimizer")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"expected a torch.Generator, got {type(generator).__name__}")
        if getattr(optimizer, "_has_gradient_noise", False):
            raise ValueError("the optimizer has gradient noise already; remove() that first")
        self.optimizer, self.eta, self.gamma, self.generator = optimizer, eta, gamma, generator
        self.step = 0
        self._attach()

    def _attach(self) -> None:
        """Put the hooks on the optimizer."""
        optimizer = self.optimizer
        self._buffers: dict[Any, Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]
        optimizer._has_gradient_noise = True  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def std(self) -> float:
        """Standard deviation of the noise at the next step."""
        return gradient_noise_std(self.step, self.eta, self.gamma)

    def remove(self) -> None:
        """Take the noise off the optimizer."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            del self.optimizer._has_gradient_noise  # pyright: ignore[reportAttributeAccessIssue]
        self._handles, self._buffers = [], {}

    def state_dict(self) -> dict[str, Any]:
        """Steps made, and the state of the generator if there is one."""
        generator = {} if self.generator is None else {"generator": self.generator.get_state()}
        return {"step": self.step, **generator}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: if it holds no step.
        """
        if "step" not in state:
            raise ValueError(f"expected a state with 'step', got {', '.join(state) or 'nothing'}")
        self.step = whole("step", state["step"], 0)
        if "generator" in state:
            if self.generator is None:
                self.generator = torch.Generator(self._device())
            self.generator.set_state(state["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        state = {
            name: value for name, value in self.__dict__.items() if name not in ("_handles", "_buffers", "generator")
        }
        generator = None if self.generator is None else (str(self.generator.device), self.generator.get_state())
        return {**state, "generator": generator, "attached": bool(self._handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        given, attached = state.pop("generator"), state.pop("attached")
        self.__dict__.update(state, generator=None, _handles=[], _buffers={})
        if given is not None:
            self.generator = torch.Generator(given[0])
            self.generator.set_state(given[1])
        if attached:
            self._attach()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            raise RuntimeError("a closure computes gradients inside the step, after the noise; call step() without one")
        # Fused optimizers get scaled gradients and are told by attributes; the others never see them.
        overflow, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if overflow is not None and bool(overflow):
            return
        if self.eta:
            if self.generator is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                self.generator = self._common_generator()
            std = self.std * (float(scale) if scale is not None else 1.0)
            add_normal_(optimizer.param_groups, std, self.generator, self._buffers)
        self.step += 1

    def _common_generator(self) -> torch.Generator:
        """One in the same state on all processes."""
        device = self._device()
        seed = torch.randint(2**62, (1,)).to(device)
        dist.broadcast(seed, 0)
        return torch.Generator(device).manual_seed(int(seed))

    def _device(self) -> torch.device:
        return self.optimizer.param_groups[0]["params"][0].device

    def _save(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, KEY: self.state_dict()}

    def _load(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if KEY in state:
            self.load_state_dict(state[KEY])
        else:
            warnings.warn("the optimizer's state is from a training without gradient noise", stacklevel=4)
        return {name: value for name, value in state.items() if name != KEY}

    def __repr__(self) -> str:
        kind = type(self.optimizer).__name__
        return f"GradientNoise({kind}, eta={self.eta}, gamma={self.gamma}, step={self.step})"


class NoisyGradients(Objective):
    """The noise beside any learning rule: on its optimizer while `fit` trains, and off it afterwards.

    Args:
        eta: size of the noise, see `GradientNoise`.
        gamma: decay of the noise, see `GradientNoise`.

    Raises:
        ValueError: if a number is negative or not finite.

    Example:
        >>> fit(net, train, rule=NoisyGradients(eta=0.3).on(AugLocal()), optimizer=sgd(0.03))

        On the command line: `torchfolio train … --add gradient_noise --add-set eta=0.3`.
    """

    def __init__(self, eta: float = 0.01, gamma: float = 0.55) -> None:
        gradient_noise_std(0, eta, gamma)
        self.eta, self.gamma = eta, gamma

    def term(self, model: nn.Module, batch: Batch) -> Tensor:
        """Zero: the noise joins gradients, no loss."""
        return torch.zeros((), device=batch[0].device)

    def on(self, rule: LearningRule | None = None) -> LearningRule:
        """A rule whose optimizer has the noise."""
        return _Noisy(self, rule)


class _Noisy(Added):
    noise: GradientNoise | None = None

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        return self.rule.step(batch, backward)

    def configure(self, optimizer: Optimizer, total_steps: int | None) -> None:
        super().configure(optimizer, total_steps)
        own: Any = self.objective
        self.noise = GradientNoise(optimizer, own.eta, own.gamma)

    def release(self) -> None:
        if self.noise is not None:
            self.noise.remove()
        super().release()
