"""What is wrong with an input, said before training starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.checks import network
from torchfolio.data.examples import Examples
from torchfolio.engine.counting import IGNORED, Counting
from torchfolio.engine.loader import Batches, Data, TensorBatches, tensors_of
from torchfolio.engine.modes import evaluating, undisturbed
from torchfolio.engine.rules import Batch, LearningRule, default_loss
from torchfolio.engine.state import EarlyStopping
from torchfolio.models.stateful import reset_state


def check_data(data: Any, name: str, targets: bool = True) -> None:
    """Refuse data without examples, of unequal lengths, or with NaN.

    Args:
        data: tensors or a `TensorDataset`, which are looked through; another data set or a loader.
        name: name in messages.
        targets: whether it must hold targets beside the inputs.

    Raises:
        ValueError: saying which.
        TypeError: if it is no data set at all.
    """
    tensors = Examples(data, name).tensors
    if tensors is None:
        return
    if targets:
        check_row(tensors, name)
    for tensor in tensors:
        _check_finite(tensor, name)


def check_row(row: Any, name: str) -> None:
    """Refuse a batch of inputs alone where targets are needed; batches of other things than tensors are let through.

    Raises:
        ValueError: if there is no target.
    """
    row = [row] if isinstance(row, Tensor) else row
    if isinstance(row, list | tuple) and len(row) < 2:
        raise ValueError(f"expected {name} to hold inputs and targets, got {len(row)} tensor(s)")


def _check_finite(tensor: Tensor, name: str) -> None:
    # The sum is one fast pass; only where it is not finite is a closer look worth its memory.
    if not tensor.is_floating_point() or torch.isfinite(tensor.sum()):
        return
    bad = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{name} has NaN or infinite values in {len(bad)} of {len(tensor)} examples, first in example {int(bad[0])}"
        )


def check_model(model: nn.Module, example: Batch, data: Data, rule: LearningRule) -> None:
    """Run the model on an example and compare its output with the targets.

    Rules other than backprop may train networks without an ordinary forward pass: where it fails, they are
    left to judge for themselves.

    Raises:
        ValueError: if the model cannot take the inputs, or labels are outside the model's classes.
        TypeError: if labels have another type than int64.
    """
    *inputs, target = example
    reset_state(model)
    try:
        with torch.no_grad(), undisturbed(), evaluating(model):
            output = rule.predictor(model)(*inputs)
    except Exception as error:
        if not hasattr(rule, "loss"):
            return
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
        weights = next((f" (its weights are {p.dtype})" for p in model.parameters()), "")
        hint = "; pictures of bytes are converted by x.float() / 255" if inputs[0].dtype == torch.uint8 else ""
        raise ValueError(
            f"the model cannot take a batch of {shapes}{weights}: {type(error).__name__}: {error}{hint}"
        ) from error
    finally:
        reset_state(model)
    check_output(model, output, rule)
    check_targets(output, target, data, getattr(rule, "loss", None))


def check_output(model: nn.Module, output: Any, rule: LearningRule) -> None:
    """Refuse a record in place of a tensor, where the rule's loss has no use for it.

    Raises:
        TypeError: saying how to get at what it holds.
    """
    if isinstance(output, Tensor) or getattr(rule, "loss", None) not in (default_loss, F.cross_entropy):
        return
    wrapped = (
        "torchfolio.models.Logits(model)" if hasattr(output, "logits") else "a module that returns one of its parts"
    )
    raise TypeError(
        f"expected {type(model).__name__} to return a tensor, got {type(output).__name__}; wrap it: {wrapped}"
    )


def check_targets(output: Any, target: Tensor, data: Data, criterion: Any, name: str = "") -> None:
    """Compare targets with outputs, for a criterion that is cross-entropy where targets are labels.

    Args:
        output: output of the model on an example.
        target: target of the example.
        data: data that the example is from; its labels are all looked at where they are in memory.
        criterion: criterion of training; others than cross-entropy judge for themselves.
        name: word for the data in messages.

    Raises:
        ValueError: if they do not fit.
        TypeError: if labels have another type than int64.
    """
    cross_entropy = criterion in (default_loss, F.cross_entropy) or isinstance(criterion, nn.CrossEntropyLoss)
    if not (isinstance(output, Tensor) and cross_entropy):
        return
    labels_of = f"labels of {name}" if name else "labels"
    if target.is_floating_point():
        if criterion is default_loss:
            default_loss(output.float(), target.float())
        elif output.dim() > 1 and output.shape[1] == 1:
            raise ValueError(
                "the cross-entropy of a single output is 0 whatever the target; expected a loss to regress by"
            )
        return
    if target.dtype != torch.int64:
        raise TypeError(f"expected {labels_of} of type int64 (torch.long), got {target.dtype}; y.long() converts them")
    if output.dim() < 2:
        return
    if target.shape != (output.shape[0], *output.shape[2:]):
        outputs, expected = (", ".join(["N", *map(str, shape)]) for shape in (output.shape[1:], output.shape[2:]))
        raise ValueError(
            f"expected {labels_of} of shape [{expected}] for outputs [{outputs}], got {tuple(target.shape)}; "
            "float targets are regressed"
        )
    tensors = tensors_of(data)
    labels = target if tensors is None else tensors[-1]
    allowed = labels[labels != getattr(criterion, "ignore_index", IGNORED)]
    if not len(allowed):
        if tensors is None:
            return
        raise ValueError(f"every label of the {len(labels)} examples is one that the loss ignores")
    low, high, classes = int(allowed.min()), int(allowed.max()), output.shape[1]
    if low < 0 or high >= classes:
        raise ValueError(
            f"expected {labels_of} from 0 to {classes - 1}, the model's {classes} outputs, got {low} to {high}"
        )


def may_be_uneven(rule: LearningRule, data: Data) -> bool:
    """Whether equally large batches may count differently in the rule's loss, by ignored targets or weights of classes.

    Data that cannot be looked through may, if their batches are tensors and the loss ignores a target.
    """
    counting = Counting.of(getattr(rule, "loss", None))
    if counting.ignored is None and counting.weight is None:
        return False
    tensors = tensors_of(data)
    if tensors is not None:
        return counting.uneven(tensors[-1])
    return True


def check_last_batch(batches: Batches, module: nn.Module) -> None:
    """Refuse a last batch of one example where a `BatchNorm1d` would have no variance to divide by.

    Raises:
        ValueError: saying how to get rid of it.
    """
    if not isinstance(batches, TensorBatches) or not any(isinstance(m, nn.BatchNorm1d) for m in module.modules()):
        return
    n, size, world = len(batches.tensors[0]), batches.batch_size, batches.world
    last = n - (batches.count - 1) * size
    if min(last, size) // world < 2:
        raise ValueError(
            f"{n} examples in batches of {size} for {world} process(es) leave one of them with fewer "
            "than two examples of the last batch, which batch norm cannot train on; pass "
            "drop_last=True or another batch_size"
        )


def check_settings(schedule: str, clip_norm: float | None, **numbers: int | None) -> None:
    """Refuse settings out of range.

    Raises:
        ValueError: naming the argument.
    """
    check_positive(**numbers)
    if schedule not in ("step", "epoch"):
        raise ValueError(f"expected schedule to be 'step' or 'epoch', got {schedule!r}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"expected clip_norm above 0, got {clip_norm!r}")


def check_positive(**values: int | None) -> None:
    """Refuse numbers below 1.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")


def check_optional(seed: int | None, augment: Any, evaluate: Any, early_stopping: Any) -> None:
    """Refuse a seed that is no whole number, functions that cannot be called, and what is no rule to stop by.

    Raises:
        TypeError: naming the argument.
        ValueError: on a seed out of range.
    """
    if seed is not None:
        checks.whole("seed", seed, -(2**63), 2**64 - 1)
    for name, function in (("augment", augment), ("evaluate", evaluate)):
        if function is not None and not callable(function):
            raise TypeError(f"expected {name} to be a function, got {_kind(function)}")
    if isinstance(early_stopping, bool) or not isinstance(early_stopping, EarlyStopping | int | None):
        raise TypeError(
            f"expected early_stopping to be a number of epochs or EarlyStopping(...), got {_kind(early_stopping)}"
        )


def check_monitor(stopper: EarlyStopping | None, validated: bool) -> None:
    """Refuse to stop early by a validation score that nobody computes.

    Raises:
        ValueError: naming it.
    """
    if stopper is not None and stopper.monitor.startswith("val_") and not validated:
        raise ValueError(f"early stopping monitors {stopper.monitor!r}; expected val or evaluate to be given")


def check_kinds(model: Any, rule: Any) -> None:
    """Refuse what is no network, or one that holds NaN, and what is no learning rule but its name or its class.

    Raises:
        TypeError: saying which.
        ValueError: naming the tensor that holds NaN.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a network, an nn.Module, got {_kind(model)}")
    network(model)
    if isinstance(rule, type) or not all(callable(getattr(rule, name, None)) for name in ("prepare", "step")):
        example = rule.__name__ if isinstance(rule, type) else "Backprop"
        raise TypeError(f"expected a learning rule such as {example}(), got {_kind(rule)}")


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value!r}"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def check_callables(callbacks: Sequence[Callable[..., Any]]) -> None:
    """Refuse callbacks that cannot be called.

    Raises:
        TypeError: naming the first one.
    """
    if not isinstance(callbacks, Iterable):
        raise TypeError(f"expected callbacks to be a list of callables, got {_kind(callbacks)}")
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(f"expected callbacks to be callables that take a FitState, got {type(callback).__name__}")
