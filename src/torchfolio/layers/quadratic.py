"""Layers of quadratic neurons, and the ReLinear strategy by which networks of them can be trained.

A quadratic neuron multiplies two inner products of its input and adds an inner product with its squares,

$$q(x) = (w_r \\cdot x + b_r)(w_g \\cdot x + b_g) + w_b \\cdot (x \\odot x) + b_b,$$

in place of $w_r \\cdot x + b_r$. ReLinear starts with $w_g = 0, b_g = 1, w_b = 0, b_b = 0$, so that $q$ is the ordinary
neuron, and lets the quadratic terms grow slowly: by a smaller learning rate (`relinear_param_groups`) or by shrinking
them after every step (`ReLinearShrink`).

Reference:
    Fan et al., On Expressivity and Trainability of Quadratic Networks, arXiv 2110.06081. Shrinking of weights and the
    factor of the learning rate beyond the authors' two settings are our reading of Section III.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import at_least, between, finite
from torchfolio.layers.quadratic_layers import (
    QuadraticConv1d,
    QuadraticConv2d,
    QuadraticLayer,
    QuadraticLinear,
    to_quadratic,
)
from torchfolio.measure import untouched

__all__ = [
    "QuadraticConv1d",
    "QuadraticConv2d",
    "QuadraticLinear",
    "ReLinearShrink",
    "functional_dimension",
    "quadratic_strength",
    "relinear_param_groups",
    "to_quadratic",
]


def _terms(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained quadratic parameters by role, each once."""
    terms: dict[str, dict[int, nn.Parameter]] = {name: {} for name in ("weight_g", "bias_g", "weight_b", "bias_b")}
    layers = [m for m in model.modules() if isinstance(m, QuadraticLayer)]
    if not layers:
        raise ValueError("expected a network with quadratic layers, got one without; see to_quadratic")
    for layer in layers:
        for name, members in terms.items():
            parameter: Any = getattr(layer, name)
            if parameter is not None and parameter.requires_grad:
                members[id(parameter)] = parameter
    return {name: list(members.values()) for name, members in terms.items()}


def _pair(name: str, value: Any) -> tuple[float, float]:
    """One number for the g-terms and one for the b-terms."""
    if not isinstance(value, tuple | list):
        return value, value
    if len(value) != 2:
        raise ValueError(f"expected {name} to be a number, or one for each of the g- and b-terms, got {len(value)}")
    return value[0], value[1]


def relinear_param_groups(
    model: nn.Module, lr: float, *, gamma: float | tuple[float, float] = 0.01, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer, by which the quadratic terms learn more slowly (ReLinear by shrinking gradients).

    Args:
        model: a network with quadratic layers; frozen parameters are left out.
        lr: learning rate $\\eta$ of everything else.
        gamma: $(\\gamma_g, \\gamma_b)$, factors of the rate of $w_g, b_g$ and of $w_b, b_b$; one number for both. At 0
            the network stays an ordinary one. Wide or unnormalised inputs need small ones: 0.1 is good in small
            convolutional networks and diverges in deep perceptrons without normalisation.
        weight_decay: weight decay of all parameters but $b_g$, whose ordinary value is 1.

    Raises:
        ValueError: if a factor is negative, or there is no quadratic layer.

    Example:
        >>> optimizer = torch.optim.SGD(relinear_param_groups(net, 0.1, gamma=0.1), lr=0.1, momentum=0.9)
    """
    gamma_g, gamma_b = (at_least("gamma", value, 0) for value in _pair("gamma", gamma))
    at_least("lr", lr, 0)
    at_least("weight_decay", weight_decay, 0)
    terms = _terms(model)
    quadratic = {id(p) for members in terms.values() for p in members}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in quadratic]
    groups = [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": terms["weight_g"], "lr": gamma_g * lr, "weight_decay": weight_decay},
        {"params": terms["bias_g"], "lr": gamma_g * lr, "weight_decay": 0.0},
        {"params": terms["weight_b"] + terms["bias_b"], "lr": gamma_b * lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


class ReLinearShrink:
    """Shrinks or bounds the quadratic terms after every step of the optimizer; a callback of `fit`, too.

    With $\\theta \\in \\{w_g, b_g - 1\\}$ and $\\{w_b, b_b\\}$: $\\theta \\leftarrow \\alpha\\theta$, then
    $\\theta \\leftarrow \\min(\\max(\\theta, -\\beta), \\beta)$. At 0 the network is an ordinary one.

    Args:
        model: a network with quadratic layers.
        alpha: $(\\alpha_g, \\alpha_b)$ in [0, 1], or one number for both; `None` does not shrink.
        beta: $(\\beta_g, \\beta_b)$, at least 0, or one number for both; `None` does not bound.

    Raises:
        ValueError: if a factor is out of range, both are `None`, or there is no quadratic layer.

    Example:
        >>> shrink = ReLinearShrink(net, alpha=0.99)
        >>> optimizer.step(); shrink.step()
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float | tuple[float, float] | None = None,
        beta: float | tuple[float, float] | None = None,
    ) -> None:
        if alpha is None and beta is None:
            raise ValueError("expected alpha or beta, got neither: nothing would be shrunk")
        self.alpha = None if alpha is None else _pair("alpha", alpha)
        self.beta = None if beta is None else _pair("beta", beta)
        for value in self.alpha or ():
            between("alpha", value, 0, 1)
        for value in self.beta or ():
            at_least("beta", value, 0)
        _terms(model)
        self.model = model

    @torch.no_grad()
    def step(self) -> None:
        """Shrink once."""
        terms = _terms(self.model)
        for k, names in enumerate((("weight_g", "bias_g"), ("weight_b", "bias_b"))):
            for name in names:
                ordinary = 1.0 if name == "bias_g" else 0.0
                for parameter in terms[name]:
                    deviation = parameter - ordinary
                    if self.alpha is not None:
                        deviation *= self.alpha[k]
                    if self.beta is not None:
                        deviation.clamp_(-self.beta[k], self.beta[k])
                    parameter.copy_(deviation + ordinary)

    def __call__(self, state: Any) -> None:
        """Shrink once; as a callback."""
        self.step()

    def __repr__(self) -> str:
        return f"ReLinearShrink(alpha={self.alpha}, beta={self.beta})"


def quadratic_strength(model: nn.Module, x: Tensor | Mapping[str, Tensor]) -> dict[str, float]:
    """How much of every quadratic layer's output its quadratic part is: $\\lVert q - (w_r x + b_r) \\rVert / \\lVert q \\rVert$.

    Args:
        model: a network with quadratic layers; it is left as it was.
        x: inputs of the network; a dictionary is handed over by name, as to a `transformers` model.

    Returns:
        A share for each layer by name: 0 for an ordinary one; NaN where a layer gives nothing but zeros.

    Raises:
        ValueError: if there is no quadratic layer, or inputs are not finite or empty.
    """
    for name, value in (x if isinstance(x, Mapping) else {"x": x}).items():
        if not finite(name, value).numel():
            raise ValueError(f"expected at least one input, got {name} of shape {list(value.shape)}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuadraticLayer)}
    if not layers:
        raise ValueError("expected a network with quadratic layers, got one without; see to_quadratic")
    strengths: dict[str, float] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            rest = (output - module.linear_part(args[0])).double().norm()
            strengths[name] = float(rest / output.double().norm())

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), untouched(model, training=False):
            model(**x) if isinstance(x, Mapping) else model(x)
    finally:
        for handle in handles:
            handle.remove()
    return strengths


def functional_dimension(
    function: Callable[[Mapping[str, Tensor], Tensor], Tensor], params: Mapping[str, Tensor], inputs: Tensor
) -> int:
    """Dimension of the set of functions that parameters reach: the rank of the Jacobian of values by parameters.

    It is taken in float64, relative to the largest singular value at 1e-9. At random parameters it is the dimension of
    the variety of functions (for polynomial networks).

    Args:
        function: `(params, inputs) -> outputs`, such as `lambda p, x: torch.func.functional_call(net, p, x)`.
        params: parameters by name, at generic (random) values.
        inputs: `[N, ...]` generic points, whose values are at least as many as there are parameters.

    Raises:
        ValueError: if there are fewer values than parameters, which bounds the rank from above, or inputs or values
            are not finite.
    """
    finite("inputs", inputs)
    double = {name: p.detach().double() for name, p in params.items()}
    jacobian = torch.func.jacrev(lambda p: function(p, inputs.double()).flatten())(double)
    matrix = torch.cat([block.flatten(1) for block in jacobian.values()], 1)
    if matrix.shape[0] < matrix.shape[1]:
        raise ValueError(f"expected at least {matrix.shape[1]} values, as many as parameters, got {matrix.shape[0]}")
    singular = torch.linalg.svdvals(finite("the Jacobian", matrix))
    return int((singular > 1e-9 * singular[0]).sum())
