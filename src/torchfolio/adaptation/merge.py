"""What a method says to merge networks: `Merge`, which `torchfolio adapt` calls, and the two ways that learn nothing."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchfolio.adaptation.merge_files import average_files, task_arithmetic_files
from torchfolio.adaptation.weights import Checkpoint, Weights, average, task_arithmetic
from torchfolio.checks import one_of
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ORDINARY", "Average", "Merge", "MergeResult", "Merging", "TaskArithmetic"]

Buffers = Literal["pretrained", "average"]
ModelFn = Callable[[Tensor], Tensor]
Forward = Callable[[ModelFn, Tensor, int], Tensor]
Inputs = Tensor | Dataset | Iterable[Any]

ORDINARY = {
    "average": "torchfolio.adaptation.merge:Average",
    "task_arithmetic": "torchfolio.adaptation.merge:TaskArithmetic",
    "adamerging": "torchfolio.adaptation.merging:AdaMerging",
    "concrete": "torchfolio.adaptation.dam:ConcreteMerging",
}
"""Import paths of ways to merge that no paper of the catalogue is about, by the name that the command line gives them."""


@dataclass(frozen=True, repr=False)
class MergeResult(Shown):
    """A merged network and how it came about.

    Attributes:
        model: an ordinary module, in evaluation mode.
        weights: coefficients $\\lambda$, `[T, 1]` or `[T, n_tensors]`.
        masks: mask $M$ by name; empty where there is none.
        perturbations: universal perturbation of every task; empty where there is none.
        history: a row of scalars per step.
    """

    model: nn.Module
    weights: Tensor
    masks: dict[str, Tensor] = field(default_factory=dict)
    perturbations: tuple[Tensor, ...] = ()
    history: tuple[dict[str, float], ...] = ()

    @property
    def report(self) -> Mapping[str, float]:
        """Figures by name: the last row of the history."""
        return self.history[-1] if self.history else {}

    def to_frame(self) -> pd.DataFrame:
        """The history as a table."""
        import pandas as pd

        return pd.DataFrame(self.history)


@dataclass(frozen=True, repr=False)
class Merging(Shown):
    """What a merge is made of: the arguments of `Merge.fit`."""

    pretrained: nn.Module
    finetuned: Sequence[Checkpoint]
    batches: Sequence[Inputs]
    heads: nn.Module | Sequence[nn.Module] | None
    forward: Forward | None
    buffers: Buffers


class Merge(Shown, ABC):
    """A way to merge networks that were finetuned from one. Settings are the keyword arguments of its class.

    A method fills `_merge`; `fit` is the one door.
    """

    needs_base: ClassVar[bool] = True
    """Whether the network that they were finetuned from is added to, or only says what the merged one looks like."""
    needs_inputs: ClassVar[bool] = False
    """Whether it learns from unlabelled inputs of every task."""
    streams: ClassVar[bool] = False
    """Whether `fit_files` merges networks that stay on disk, one tensor at a time."""

    @abstractmethod
    def _merge(self, run: Merging) -> MergeResult:
        """Merge; nothing that is handed over may be changed."""

    def fit(
        self,
        pretrained: nn.Module,
        finetuned: Sequence[Checkpoint],
        batches: Sequence[Inputs] = (),
        *,
        heads: nn.Module | Sequence[nn.Module] | None = None,
        forward: Forward | None = None,
        buffers: Buffers = "pretrained",
    ) -> MergeResult:
        """Merge; the networks that are given are left as they are.

        Args:
            pretrained: common starting point. Its frozen parameters are not merged, and stay frozen.
            finetuned: two or more checkpoints of it, modules or state dicts.
            batches: unlabelled inputs of every task, where the method needs them: a tensor `[N, ...]`, a data set or a
                loader each. Labels that come with them are ignored.
            heads: modules that turn the network's outputs into logits, one module per task or one for all; `None` takes
                the outputs as they are.
            forward: instead of heads, `(model_fn, x, task) -> logits`.
            buffers: source of BatchNorm's statistics when they differ; `Average` always takes their mean.

        Raises:
            ValueError: if checkpoints do not match, there are fewer than two, inputs are missing or not finite, or there
                are both heads and forward.
            FloatingPointError: if a loss is no longer finite.
        """
        one_of("buffers", buffers, ("pretrained", "average"))
        if len(finetuned) < 2:
            raise ValueError(f"expected at least 2 finetuned checkpoints, got {len(finetuned)}")
        if forward is not None and heads is not None:
            raise ValueError("expected heads or forward, got both")
        return self._merge(Merging(pretrained, finetuned, batches, heads, forward, buffers))

    def fit_files(self, like: nn.Module, base: Path | None, finetuned: Sequence[Path], output: Path) -> Path:
        """Merge files of weights into one, where the method can: the weights that `fit` gives, to the bit.

        Args:
            like: network without its weights, on any device: it says what is a parameter, and what is frozen.
            base: safetensors file of the pretrained network, where the method needs it.
            finetuned: files of its checkpoints, each with the same entries.
            output: file to write.
        """
        raise NotImplementedError(f"{type(self).__name__} needs the networks in memory")


def with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network with other values, in evaluation mode; what is tied or frozen stays so.

    Tensors of `state` become those of the copy where types agree: nobody else may hold them.
    """
    taken: dict[int, Any] = {}
    for name, old in model.state_dict(keep_vars=True).items():
        new = state.get(name)
        if new is not None and type(old) in (Tensor, nn.Parameter) and _alike(new, old):
            taken[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    net = copy.deepcopy(model, taken)
    net.load_state_dict(dict(state))
    return net.eval()


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())


class Average(Merge):
    """The plain mean of all weights, see `torchfolio.adaptation.weights.average`."""

    needs_base = False
    streams = True

    def fit_files(self, like: nn.Module, base: Path | None, finetuned: Sequence[Path], output: Path) -> Path:
        return average_files(finetuned, output, like=like)

    def _merge(self, run: Merging) -> MergeResult:
        count = len(run.finetuned)
        return MergeResult(with_state(run.pretrained, average(run.finetuned)), torch.full((count, 1), 1 / count))


class TaskArithmetic(Merge):
    """All task vectors added with fixed coefficients, see `torchfolio.adaptation.weights.task_arithmetic`.

    Args:
        weight: coefficient $\\lambda$ of every task vector, or one for each.
    """

    streams = True

    def __init__(self, weight: Weights = 0.3) -> None:
        self.weight = weight

    def fit_files(self, like: nn.Module, base: Path | None, finetuned: Sequence[Path], output: Path) -> Path:
        assert base is not None
        return task_arithmetic_files(base, finetuned, output, self.weight, like=like)

    def _merge(self, run: Merging) -> MergeResult:
        state = task_arithmetic(run.pretrained, run.finetuned, self.weight)
        if run.buffers == "average":
            means = average(run.finetuned)
            state |= {name: means[name] for name, _ in run.pretrained.named_buffers() if name in means}
        weights = torch.as_tensor(self.weight, dtype=torch.float32).reshape(-1, 1).expand(len(run.finetuned), -1)
        return MergeResult(with_state(run.pretrained, state), weights.clone())
