"""Operations and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(model: nn.Module | Callable[..., object], *inputs: Tensor, backward: bool = False) -> int:
    """Floating-point operations of a forward pass (two for a multiply-add), by torch's counter.

    Matrix products, convolutions and attention count; element-wise work does not.

    Args:
        model: a module or callable.
        *inputs: its inputs.
        backward: also run the backward pass of the summed output.
    """
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = model(*inputs)
        if backward:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"expected the model to return a tensor to go backward from, got {type(output).__name__}"
                )
            output.sum().backward()
    return counter.get_total_flops()


def flops_by_module(model: nn.Module, *inputs: Tensor) -> pd.DataFrame:
    """Operations, parameters and output shape of every module that has no children.

    Returns:
        A row for each call, in running order: name, type, parameters, flops, output shape.
    """
    rows: list[dict[str, object]] = []
    starts: dict[str, int] = {}
    counter = FlopCounterMode(display=False)
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is not None:
            continue

        def before(m: nn.Module, args: object, name: str = name) -> None:
            starts[name] = counter.get_total_flops()

        def after(m: nn.Module, args: object, out: object, name: str = name) -> None:
            rows.append(
                {
                    "name": name,
                    "type": type(m).__name__,
                    "parameters": sum(p.numel() for p in m.parameters(recurse=False)),
                    "flops": counter.get_total_flops() - starts[name],
                    "shape": tuple(out.shape) if isinstance(out, Tensor) else None,
                }
            )

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with counter, torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return pd.DataFrame(rows, columns=["name", "type", "parameters", "flops", "shape"])


@dataclass(frozen=True)
class Alternation:
    """Seconds of several callables that ran in turn.

    Attributes:
        seconds: for every name the time of each round.
    """

    seconds: Mapping[str, Sequence[float]]

    @property
    def reference(self) -> str:
        """The first callable, which ratios are relative to."""
        return next(iter(self.seconds))

    def ratio(self, name: str) -> float:
        """Median over rounds of this callable's time over the reference's in the same round."""
        return float(median(self._ratios(name)))

    def spread(self, name: str) -> tuple[float, float]:
        """Quartiles of the ratios over rounds."""
        low, high = np.quantile(self._ratios(name), [0.25, 0.75])
        return float(low), float(high)

    def _ratios(self, name: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[name], self.seconds[self.reference], strict=True)]

    def to_frame(self) -> pd.DataFrame:
        """Median seconds, ratio to the reference and its quartiles, a row for each callable."""
        rows = [
            {
                "name": n,
                "seconds": median(s),
                "ratio": self.ratio(n),
                "low": self.spread(n)[0],
                "high": self.spread(n)[1],
            }
            for n, s in self.seconds.items()
        ]
        return pd.DataFrame(rows).set_index("name")

    def __str__(self) -> str:
        return self.to_frame().to_string(float_format="%.4g")


def alternate(
    *callables: Callable[[], object], repeats: int = 9, warmup: int = 1, **named: Callable[[], object]
) -> Alternation:
    """Time callables in turn, so that whatever else the machine does falls on all of them alike.

    Args:
        *callables: named after their `__name__`.
        repeats: rounds; in each every callable runs once, in an order that turns by one each round.
        warmup: untimed rounds first.
        **named: further callables by name. The first of all is the reference.

    Raises:
        ValueError: if there are fewer than two callables or no rounds.
    """
    candidates = {getattr(c, "__name__", str(k)): c for k, c in enumerate(callables)} | named
    if len(candidates) < 2:
        raise ValueError(f"expected at least two callables of different names, got {len(candidates)}")
    if repeats < 1:
        raise ValueError(f"expected at least one round, got {repeats}")
    for _ in range(warmup):
        for call in candidates.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for round_ in range(repeats):
        turn = round_ % len(order)
        for name in order[turn:] + order[:turn]:
            _synchronize()
            start = time.perf_counter()
            candidates[name]()
            _synchronize()
            seconds[name].append(time.perf_counter() - start)
    return Alternation(seconds)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
