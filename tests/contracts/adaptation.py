"""What every way to merge and every way to adapt keeps to, in one call each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contracts.detectors import Left, broken
from torchfolio.adaptation.adapter import Adapted, Adapter
from torchfolio.adaptation.merge import Merge, MergeResult
from torchfolio.bundle import Manifest, load_bundle, save_bundle


def check_merge(
    make: Callable[[], Merge], base: nn.Module, tuned: Sequence[nn.Module], inputs: Sequence[Tensor], **others: Any
) -> MergeResult:
    """The contract of `Merge`: inputs are left alone, what is tied stays tied and frozen frozen, seeds reproduce."""
    left = [Left(net) for net in (base, *tuned)]
    result = make().fit(base, tuned, inputs, **others)
    for one in left:
        one.check()
    assert not result.model.training
    assert list(result.model.state_dict()) == list(base.state_dict())
    ties = [{id(p) for p in net.parameters()} for net in (result.model, base)]
    assert len(ties[0]) == len(ties[1])
    flags = [[p.requires_grad for p in net.parameters()] for net in (result.model, base)]
    assert flags[0] == flags[1]
    state = result.model.state_dict()
    fresh = copy.deepcopy(base)
    fresh.load_state_dict(state)  # as a bundle is read: every name of a tied tensor is written, in order
    assert all(torch.equal(v, state[k]) for k, v in fresh.state_dict().items())
    for name, buffer in base.named_buffers():
        if not buffer.is_floating_point():
            assert torch.equal(state[name], buffer)
    again = make().fit(base, tuned, inputs, **others).model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.items())
    bad = copy.deepcopy(tuned[-1])
    name, first = next((n, p) for n, p in bad.named_parameters() if p.requires_grad)
    with torch.no_grad():
        first.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=f"checkpoint {len(tuned) - 1} holds NaN or infinity in {name}"):
        make().fit(base, [*tuned[:-1], bad], inputs, **others)
    return result


def check_adapter(
    make: Callable[[], Adapter],
    model: nn.Module,
    data: Any,
    network: dict[str, Any],
    folder: Path,
    x: Tensor,
    *,
    num_classes: int = 0,
    allow: Sequence[str] = (),
) -> Adapted:
    """The contract of `Adapter`: the network is left alone, seeds reproduce, and on disk it is the one in memory.

    Args:
        make: a new adapter.
        model: a trained network.
        data: what it is adapted to.
        network: `build` and `arguments` of the model.
        folder: an empty one.
        x: inputs to compare networks on.
        num_classes: of the data.
        allow: import paths that are not the library's.
    """
    left = Left(model)
    adapter = make()
    done = adapter.adapt(model, data, num_classes=num_classes, seed=1, device="cpu")
    left.check()
    assert not done.model.training
    assert all(isinstance(v, int | float) for v in done.report.values())
    again = make().adapt(model, data, num_classes=num_classes, seed=1, device="cpu").model.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in done.model.state_dict().items())
    with pytest.raises(ValueError, match="the network holds NaN or infinity in "):
        make().adapt(broken(model), data, num_classes=num_classes)
    recipe = adapter.recipe(dict(network))
    save_bundle(done.model, folder / "net", Manifest(recipe["build"], recipe["arguments"], tuple(x.shape[1:])))
    read = load_bundle(folder / "net", allow=list(allow)).model
    with torch.no_grad():
        assert torch.equal(read(x), done.model(x))
    return done
