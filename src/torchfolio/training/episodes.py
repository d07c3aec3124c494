"""Several trainings of one network from other seeds: one after another, or in one vectorised pass; on disk as bundles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from torchfolio.bundle import Manifest, load_bundle, save_bundle
from torchfolio.checks import positive, whole
from torchfolio.engine import fit_many, seeded

__all__ = ["fit_episodes", "load_episodes", "save_episodes", "train_episodes"]

PRIME = 7919  # between the seeds of one episode's phases
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def train_episodes(
    build: Callable[[], nn.Module], train: Callable[[nn.Module, int], object], seeds: Sequence[int]
) -> list[nn.Module]:
    """Train one network for each seed, one after another; initialisation and order of the data differ.

    Args:
        build: makes a fresh network. It is called with the global generators at the episode's seed.
        train: trains a network in place: `lambda net, seed: fit(net, data, seed=seed, epochs=20)`.
        seeds: one for each episode.

    Returns:
        The trained networks, in evaluation mode.

    Raises:
        ValueError: on no seed, equal seeds, or a builder that returns the same parameters twice.
    """
    models = []
    for seed, model in zip(seeds, _built(build, seeds), strict=True):
        with seeded(seed):
            train(model, seed)
        models.append(model.eval())
    return models


def fit_episodes(
    build: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    seeds: Sequence[int],
    *,
    phases: Sequence[tuple[float, int]] = ((0.1, 20), (0.01, 10)),
    batch_size: int = 128,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> list[nn.Module]:
    """Train small networks for all seeds in one vectorised pass of SGD, each in an order of its own.

    Batch norms normalise by the batch while they train; their running statistics are the mean over one pass through
    the data at the end.

    Args:
        build: factory of the network, as in `train_episodes`.
        x: inputs `[N, ...]`.
        y: targets `[N, ...]`.
        seeds: one for each episode.
        phases: learning rates with their epochs, one after another; momentum starts afresh with each.
        batch_size: examples of a step.
        momentum: momentum of SGD.
        weight_decay: L2 penalty of all parameters.

    Returns:
        The trained networks, in evaluation mode.

    Raises:
        ValueError: as `train_episodes` and `torchfolio.engine.fit_many`, or on no phase.

    Note:
        Worth it where a step of one network leaves the device idle: multilayer perceptrons and small convolutions on
        an accelerator. Several convolutions at once gain little on a CPU; use `train_episodes` there.
    """
    if not phases:
        raise ValueError("expected at least one phase (learning rate, epochs), got none")
    for rate, epochs in phases:
        positive("a learning rate", rate)
        whole("epochs of a phase", epochs, 1)
    models = _built(build, seeds)
    steps = -(-len(x) // batch_size)
    with _without_statistics(models) as norms:
        for k, (rate, epochs) in enumerate(phases):
            orders = [seed + PRIME * k for seed in seeds]
            fit_many(models, x, y, steps=epochs * steps, lr=rate, momentum=momentum, weight_decay=weight_decay,
                     batch_size=batch_size, seed=orders)  # fmt: skip
    if norms:
        for model in models:
            torch.optim.swa_utils.update_bn(x.split(batch_size), model)
    return [model.eval() for model in models]


def save_episodes(models: Sequence[nn.Module], folder: str | Path, manifest: Manifest) -> list[Path]:
    """Write networks of one manifest as bundles `episode-0`, `episode-1`, … in a folder."""
    return [save_bundle(model, Path(folder) / f"episode-{k}", manifest) for k, model in enumerate(models)]


def load_episodes(folder: str | Path, *, allow: Sequence[str] = ()) -> list[nn.Module]:
    """Read what `save_episodes` wrote, in its order.

    Args:
        folder: folder of the bundles.
        allow: import paths that they may name; see `torchfolio.bundle.load_bundle`.

    Raises:
        ValueError: if there is none.
    """
    folders = sorted(Path(folder).glob("episode-*"), key=lambda path: int(path.name.split("-")[1]))
    if not folders:
        raise ValueError(f"expected bundles episode-0, episode-1, … in {folder}, got none")
    return [load_bundle(path, allow=allow).model for path in folders]


def _built(build: Callable[[], nn.Module], seeds: Sequence[int]) -> list[nn.Module]:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"expected seeds that differ, at least one, got {list(seeds)}")
    models = []
    for seed in seeds:
        with seeded(seed):
            models.append(build().train())
    owned = [id(p) for model in models for p in model.parameters()]
    if len(set(owned)) < len(owned):
        raise ValueError("expected build() to make a fresh network each time, got shared parameters")
    return models


@contextmanager
def _without_statistics(models: Sequence[nn.Module]) -> Iterator[list[_NormBase]]:
    """Batch norms without running statistics, which a vectorised pass cannot keep; put back on leaving."""
    norms = [m for model in models for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    statistics = [{name: getattr(norm, name) for name in STATISTICS} for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = False
            for name in STATISTICS:
                setattr(norm, name, None)
        yield norms
    finally:
        for norm, buffers in zip(norms, statistics, strict=True):
            norm.track_running_stats = True
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
