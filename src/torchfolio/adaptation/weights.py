"""Arithmetic on the weights of networks, one tensor at a time: task vectors, their sum, the mean.

A task vector is what finetuning changed, $\\tau_i = \\theta_i - \\theta_0$, and all here is

$$\\theta(\\lambda, M) = \\theta_0 + \\sum_i \\lambda_i\\,(\\tau_i \\odot M).$$

Every entry of a state dict gets what its role asks: trainable parameters are merged, and so is every other name of the same
tensor (tied weights, one module registered twice); buffers and frozen parameters stay those of $\\theta_0$.

Reference: G. Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, https://arxiv.org/abs/2212.04089.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from torchfolio.models.wrappers import own_names, unwrapped

__all__ = ["average", "merge", "task_arithmetic", "task_vectors"]

State = Mapping[str, Tensor]
Checkpoint = nn.Module | State
Weights = float | Sequence[float] | Tensor
CHUNK = 1 << 18  # elements that stay in the cache while the checkpoints are added up
NOTHING = "there is nothing to merge: no trainable floating-point parameter"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def task_vectors(pretrained: Checkpoint, finetuned: Sequence[Checkpoint]) -> list[dict[str, Tensor]]:
    """Task vectors $\\tau_i = \\theta_i - \\theta_0$, one dictionary per checkpoint; a tensor of several names by its first.

    Args:
        pretrained: common starting point. Of a module, only parameters that require a gradient count; of a
            state dict, every floating-point or complex entry but running statistics.
        finetuned: its finetuned checkpoints, at least one.

    Raises:
        ValueError: if a checkpoint lacks or adds entries, shapes differ, one holds NaN, changed a frozen parameter or
            untied tied weights (all named); or nothing can be merged.
    """
    base, states = checked(pretrained, finetuned)
    return [{name: s[name].detach().to(value) - value.detach() for name, value in base.items()} for s in states]


def merge(
    base: Checkpoint, vectors: Sequence[State], weights: Weights = 0.3, mask: State | None = None
) -> dict[str, Tensor]:
    """The state dict $\\theta_0 + \\sum_i \\lambda_i (\\tau_i \\odot M)$; what no task vector holds stays as in `base`.

    Args:
        base: $\\theta_0$.
        vectors: task vectors of `task_vectors`.
        weights: $\\lambda$: one number, one per task `[T]`, or one per task and tensor `[T, n_tensors]`, the tensors
            in the order of the task vectors.
        mask: $M$, by name; `None` is 1.

    Raises:
        ValueError: if `weights` has another shape, or a mask is missing.
    """
    if not vectors:
        raise ValueError("expected at least one task vector, got none")
    factors = coefficients(weights, len(vectors), len(vectors[0]))
    missing = [name for name in vectors[0] if mask is not None and name not in mask]
    if missing:
        raise ValueError(f"the mask has no entry for {', '.join(missing[:3])}")
    whole = state_of(base)
    merged: dict[str, Tensor] = {}
    for name, terms, column in _columns(vectors[0], vectors, factors):
        value = whole[name].detach()
        merged[name], _ = added(value, terms, column, subtract=False, mask=None if mask is None else mask[name])
    return _complete(base, merged)


def task_arithmetic(
    pretrained: Checkpoint, finetuned: Sequence[Checkpoint], weight: Weights = 0.3
) -> dict[str, Tensor]:
    """Task arithmetic: all task vectors added with fixed coefficients, 0.3 each unless given.

    Beside the merged state dict this holds nothing: checkpoints are added up in place, piece by piece.
    """
    base, states = checked(pretrained, finetuned, look=False)
    factors = coefficients(weight, len(states), len(base))
    merged: dict[str, Tensor] = {}
    for name, terms, column in _columns(base, states, factors):
        merged[name], finite = added(base[name].detach(), terms, column, subtract=True)
        if not finite:
            check_sum(merged[name], name, {"the pretrained network": base[name]}, terms)
    return _complete(pretrained, merged)


def average(finetuned: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """The plain mean of checkpoints, buffers of floating point included. Needs no pretrained network.

    Buffers of a module may hold infinity, as masks of attention do, where all checkpoints hold the same.

    Raises:
        ValueError: if there are fewer than two, or they do not match; see `task_vectors`.
    """
    if len(finetuned) < 2:
        raise ValueError(f"expected at least 2 checkpoints, got {len(finetuned)}")
    states = [state_of(checkpoint) for checkpoint in finetuned]
    wanted = {names[0]: states[0][names[0]] for names in tied_names(finetuned[0]) if real(states[0][names[0]])}
    states = [_matched(wanted, finetuned[0], state, i) if i else state for i, state in enumerate(states)]
    buffers = buffer_names(finetuned[0])
    merged: dict[str, Tensor] = {}
    for name in wanted:
        terms = [state[name].detach() for state in states]
        merged[name] = average_of(name, terms, buffers)
    return _complete(finetuned[0], merged)


def average_of(name: str, terms: Sequence[Tensor], buffers: Collection[str]) -> Tensor:
    """The mean of one tensor of every checkpoint; a buffer that is the same in all of them stays what it is."""
    value, finite = mean(terms)
    if not finite and name in buffers and all(torch.equal(term, terms[0]) for term in terms):  # NaN equals nothing
        return terms[0].clone()
    if not finite:
        check_sum(value, name, {}, terms)
    return value


def buffer_names(checkpoint: Checkpoint | None) -> set[str]:
    """Names of the buffers of a module; a bare state dict does not tell."""
    if not isinstance(checkpoint, nn.Module):
        return set()
    return {name for name, _ in checkpoint.named_buffers(remove_duplicate=False)}


# What is merged


def real(value: Tensor) -> bool:
    """Whether a tensor's entries are numbers that can be added up: floating point or complex."""
    return value.is_floating_point() or value.is_complex()


def state_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All entries by name."""
    return dict(unwrapped(checkpoint).state_dict() if isinstance(checkpoint, nn.Module) else checkpoint)


def tied_names(checkpoint: Checkpoint) -> list[list[str]]:
    """The names of a state dict, those of one and the same tensor together."""
    groups: dict[object, list[str]] = {}
    for name, value in state_of(checkpoint).items():
        place = (value.data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
        groups.setdefault(place if value.numel() and value.data_ptr() else name, []).append(name)
    return list(groups.values())


def checked(
    pretrained: Checkpoint, finetuned: Sequence[Checkpoint], look: bool = True
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What is merged of the pretrained network, by the first name of every tensor, and the checkpoints' entries.

    Args:
        pretrained: common starting point.
        finetuned: its checkpoints.
        look: look for NaN now; otherwise whoever adds them up does.
    """
    whole, frozen = state_of(pretrained), frozen_names(pretrained)
    firsts = [names[0] for names in tied_names(pretrained)]
    base = {n: whole[n] for n in firsts if real(whole[n]) and n not in frozen and _is_weight(n, pretrained)}
    if not base:
        raise ValueError(NOTHING)
    if not finetuned:
        raise ValueError("expected at least one finetuned checkpoint, got none")
    states = [_matched(base, pretrained, state_of(c), i) for i, c in enumerate(finetuned)]
    for name in sorted(frozen):
        check_frozen(name, whole[name], [state.get(name) for state in states])
    if look:
        for name, value in base.items():
            check_sum(value, name, {"the pretrained network": value}, [])
            for state in states:
                check_sum(state[name], name, {}, [s[name] for s in states])
    return base, states


def _is_weight(name: str, checkpoint: Checkpoint) -> bool:
    """Whether an entry is a parameter; running statistics of a bare state dict are told by their names."""
    if isinstance(checkpoint, nn.Module):
        return name in dict(unwrapped(checkpoint).named_parameters(remove_duplicate=False))
    return name.rpartition(".")[2] not in STATISTICS


def frozen_names(checkpoint: Checkpoint) -> set[str]:
    """Names of frozen parameters."""
    if not isinstance(checkpoint, nn.Module):
        return set()
    return {n for n, p in unwrapped(checkpoint).named_parameters(remove_duplicate=False) if not p.requires_grad}


def check_frozen(name: str, value: Tensor, others: Sequence[Tensor | None]) -> None:
    """That no checkpoint changed a parameter which is not merged."""
    for i, other in enumerate(others):
        if other is not None and not torch.equal(other.to(value), value):
            raise ValueError(
                f"checkpoint {i} changed {name}, which is frozen in the pretrained network and so not merged: unfreeze "
                "it there, or give the checkpoint its value back"
            )


def _matched(wanted: State, like: Checkpoint, state: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """A checkpoint's entries by the names that are wanted; of tied ones it may hold any one."""
    whole = state_of(like)
    state = own_names(state, whole)
    entries = dict(state)
    for first, *others in tied_names(like):
        there = [name for name in (first, *others) if name in state]
        for name in there[1:]:
            if not _same(state[name], state[there[0]]):
                raise ValueError(f"checkpoint {index} holds two values for one tensor, named {there[0]} and {name}")
        if there and first not in state:
            entries[first] = state[there[0]]
    missing = [name for name in wanted if name not in entries]
    strange = [name for name in state if name not in whole]
    if missing or strange:
        parts = [f"lacks {', '.join(missing[:3])}"] * bool(missing) + [f"adds {', '.join(strange[:3])}"] * bool(strange)
        raise ValueError(f"checkpoint {index} is not of the same network: it {' and '.join(parts)}")
    for name, value in wanted.items():
        if value.shape != entries[name].shape:
            got, expected = list(entries[name].shape), list(value.shape)
            raise ValueError(f"checkpoint {index} has {name} of shape {got}, expected {expected}")
        if entries[name].is_complex() and not value.is_complex():
            raise ValueError(f"checkpoint {index} has complex values in {name}, expected {value.dtype}")
    return entries


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one or hold the same, NaN too."""
    one = a.data_ptr() == b.data_ptr() and a.shape == b.shape
    return one or torch.equal(a, b) or (a.shape == b.shape and torch.equal(a.nan_to_num(), b.to(a).nan_to_num()))


def _complete(base: Checkpoint, merged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict: merged tensors under every name they have, and copies of all others."""
    whole = state_of(base)
    state = {}
    for names in tied_names(base):
        value = merged[names[0]] if names[0] in merged else whole[names[0]].detach().clone()
        state |= dict.fromkeys(names, value)
    return {name: state[name] for name in whole}


def coefficients(weights: Weights, tasks: int, tensors: int) -> Tensor:
    """Coefficients `[T, 1]` or `[T, n_tensors]`."""
    values = torch.as_tensor(weights, dtype=torch.float64)
    if values.dim() == 0:
        values = values.expand(tasks)
    if values.dim() == 1:
        values = values[:, None]
    if tuple(values.shape) not in ((tasks, 1), (tasks, tensors)):
        raise ValueError(f"expected weights of shape [], [{tasks}] or [{tasks}, {tensors}], got {list(values.shape)}")
    if not torch.isfinite(values).all():
        raise ValueError("expected finite weights, got NaN or infinity")
    return values


# Sums


def _columns(
    names: Iterable[str], states: Sequence[State], factors: Tensor
) -> Iterable[tuple[str, list[Tensor], list[float]]]:
    for j, name in enumerate(names):
        yield name, [s[name].detach() for s in states], factors[:, j if factors.shape[1] > 1 else 0].tolist()


def added(
    base: Tensor, terms: Sequence[Tensor], factors: Sequence[float], *, subtract: bool, mask: Tensor | None = None
) -> tuple[Tensor, bool]:
    """$b + m \\odot \\sum_i \\lambda_i t_i$, or $b + m \\odot \\sum_i \\lambda_i (t_i - b)$, in the base's type.

    Returns:
        The sum, and whether it is finite by a first look.
    """
    # The largest coefficient multiplies the whole sum at the end: where all are equal, terms are added as they are.
    order = sorted(range(len(terms)), key=lambda i: -abs(factors[i]))
    largest = factors[order[0]]
    shares = [factors[i] / largest if largest else 0.0 for i in order]
    held = [] if mask is None else [mask.to(base).expand_as(base)]
    merged, finite = torch.empty_like(base), True
    for out, b, *parts in _pieces(merged, base, *(terms[i] for i in order), *held):
        for k, (part, share) in enumerate(zip(parts, shares, strict=False)):
            if k:
                out.add_(part.to(b) - b if subtract else part.to(b), alpha=share)
            elif subtract:
                torch.sub(part.to(b), b, out=out)
            else:
                out.copy_(part)
        torch.add(b, out if mask is None else out.mul_(parts[-1]), alpha=largest, out=out)
        finite = finite and _quickly_finite(out)
    return merged, finite


def mean(terms: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """The mean, of numbers of 16 bits in float32; and whether it is finite by a first look."""
    short = terms[0].dtype in (torch.float16, torch.bfloat16)
    merged, finite = torch.empty_like(terms[0]), True
    for out, first, *parts in _pieces(merged, *terms):
        total = first.float() if short else first
        # Of k numbers the mean is that of k - 1, moved towards the last by 1 / k: one pass for each.
        for k, part in enumerate(parts, 2):
            total = torch.lerp(total, part.to(total), 1 / k, out=None if short else out)
        if short:
            out.copy_(total)
        finite = finite and _quickly_finite(out)
    if not finite:  # a difference of the largest numbers may overflow where their mean does not
        parts = [t.to(torch.float32 if short else terms[0].dtype) / len(terms) for t in terms]
        finite = _quickly_finite(merged.copy_(sum(parts[1:], parts[0])))
    return merged, finite


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape piece by piece, so that what is added up stays in the cache; whole where they are no plain memory."""
    if tensors[0].device.type != "cpu" or not all(t.is_contiguous() for t in tensors):
        yield tensors
    else:
        yield from zip(*(t.view(-1).split(CHUNK) for t in tensors), strict=True)


def _quickly_finite(value: Tensor) -> bool:
    # One pass: NaN and infinity survive a sum. One of finite numbers may overflow, so that this only raises doubt.
    return math.isfinite(abs(value.sum().item()))


def _finite(value: Tensor) -> bool:
    return _quickly_finite(value) or bool(value.isfinite().all())


def check_sum(total: Tensor, name: str, named: Mapping[str, Tensor], terms: Sequence[Tensor]) -> None:
    """Look for NaN in a sum, and if there is some, say where it came from."""
    if _finite(total):
        return
    for source, value in {**named, **{f"checkpoint {i}": term for i, term in enumerate(terms)}}.items():
        if not _finite(value):
            raise ValueError(f"{source} holds NaN or infinity in {name}")
    if named or terms:
        raise ValueError(f"the sum of {name} is too large for {total.dtype}")
