"""What every layer keeps to: `check_layer(make_layer, x)` in one line of its test."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn


def check_layer(
    make_layer: Callable[[], nn.Module],
    x: Tensor,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.bfloat16),
    gradient: bool = True,
    meta: bool = True,
) -> None:
    """The contract of a layer: copies, pickles, dtypes, its state, its gradient, the meta device.

    Args:
        make_layer: makes a layer with random weights; called several times.
        x: inputs in float32, few and small: the gradient is compared with finite differences.
        dtypes: floating dtypes that it runs in.
        gradient: whether to compare gradients with finite differences, in evaluation mode (not for steps and signs).
        meta: whether it can be made on the meta device.
    """
    torch.manual_seed(0)
    layer = make_layer().eval()
    expected = layer(x)
    assert isinstance(expected, Tensor)
    assert repr(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), expected)
        assert other.training is False
    own = {id(t) for t in (*layer.parameters(), *layer.buffers())}
    assert not own & {id(t) for t in copy.deepcopy(layer).parameters()}, "a copy shares weights"
    fresh = make_layer().eval()
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), expected)
    given = x.clone()
    layer.train()(x)
    assert torch.equal(x, given), "the input is changed in place"
    for dtype in dtypes:
        low = copy.deepcopy(fresh).to(dtype)
        y = low(x.to(dtype))
        assert y.dtype == dtype, f"{dtype} in, {y.dtype} out"
        tolerance = 1e-5 if dtype == torch.float64 else 0.1
        torch.testing.assert_close(y.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)
    if gradient:
        exact = copy.deepcopy(fresh).double()
        names = [name for name, p in exact.named_parameters() if p.requires_grad]
        weights = [p.detach().clone().requires_grad_() for p in exact.parameters() if p.requires_grad]

        def call(x: Tensor, *weights: Tensor) -> Tensor:
            return torch.func.functional_call(exact, dict(zip(names, weights, strict=True)), (x,))

        assert torch.autograd.gradcheck(call, (x.double().requires_grad_(), *weights))
    if meta:
        with torch.device("meta"):
            ghost = make_layer()
        assert all(p.is_meta for p in ghost.parameters())
        assert ghost.eval()(x.to("meta")).shape == expected.shape
