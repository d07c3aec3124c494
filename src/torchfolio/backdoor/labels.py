"""Which labels an attacker gives to which classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["X2X", "AllToAll", "AllToOne", "CleanLabel", "LabelMap"]


@dataclass(frozen=True)
class LabelMap:
    """A map from source classes to the labels that triggered samples get. Immutable.

    Attributes:
        mapping: `((source, target), ...)`; a dictionary may be given.
        num_classes: number of classes; if known, classes are checked against it.
        clean: whether the label is kept (source and target are one class): the attack poisons images of its target.

    Raises:
        ValueError: on no pair, a source that is its own target (unless `clean`), a source given twice, or a class
            out of range.
    """

    mapping: tuple[tuple[int, int], ...] | Mapping[int, int]
    num_classes: int | None = None
    clean: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        items = self.mapping.items() if isinstance(self.mapping, Mapping) else self.mapping
        pairs = tuple(sorted((int(s), int(t)) for s, t in items))
        object.__setattr__(self, "mapping", pairs)
        sources = [s for s, _ in pairs]
        if not pairs:
            raise ValueError("expected at least one pair of classes, got none")
        if len(set(sources)) < len(sources):
            raise ValueError(f"expected every source class once, got {sources}")
        own = [s for s, t in pairs if (s == t) != self.clean]
        if own:
            what = "other than its source" if not self.clean else "equal to its source"
            raise ValueError(f"expected a target {what}, got {dict(pairs)[own[0]]} for class {own[0]}")
        upper = self.num_classes
        for c in {c for pair in pairs for c in pair}:
            if c < 0 or (upper is not None and c >= upper):
                raise ValueError(f"expected classes from 0 to {'' if upper is None else upper - 1}, got {c}")

    def pairs(self) -> dict[int, int]:
        """Targets by source."""
        return dict(self.mapping)  # pyright: ignore[reportArgumentType]

    @property
    def sources(self) -> tuple[int, ...]:
        """Classes that are attacked."""
        return tuple(self.pairs())

    @property
    def targets(self) -> tuple[int, ...]:
        """Labels that the attacker wants, each once."""
        return tuple(sorted(set(self.pairs().values())))

    def __call__(self, y: Tensor | np.ndarray | Sequence[int]) -> Tensor:
        """The adversarial label of every label `[N]`, -1 where the class is no source."""
        y = torch.as_tensor(y)
        adversarial = torch.full_like(y, -1)
        for source, target in self.pairs().items():
            adversarial[y == source] = target
        return adversarial

    def spec(self) -> dict[str, object]:
        """JSON values, which `from_spec` takes."""
        return {
            "mapping": [list(p) for p in self.pairs().items()],
            "num_classes": self.num_classes,
            "clean": self.clean,
        }

    @staticmethod
    def from_spec(spec: Mapping[str, object]) -> LabelMap:
        """A map from what `spec` gave."""
        pairs = tuple((int(s), int(t)) for s, t in spec["mapping"])  # pyright: ignore[reportGeneralTypeIssues]
        return LabelMap(pairs, spec["num_classes"], clean=bool(spec["clean"]))  # pyright: ignore[reportArgumentType]


def AllToOne(target: int, num_classes: int) -> LabelMap:
    """All other classes to one."""
    return LabelMap({c: target for c in range(num_classes) if c != target}, num_classes)


def AllToAll(num_classes: int, shift: int = 1) -> LabelMap:
    """Every class to the one `shift` further, around the end."""
    return LabelMap({c: (c + shift) % num_classes for c in range(num_classes)}, num_classes)


class X2X(LabelMap):
    """Any pairs of source and target, such as `X2X({0: 3, 5: 1})`."""

    @staticmethod
    def random(num_classes: int, n_sources: int, seed: int) -> LabelMap:
        """Random sources with targets that are all different: a permutation without fixed points, restricted.

        Raises:
            ValueError: if there are fewer than two classes or more sources than classes.
        """
        if not 1 <= n_sources <= num_classes or num_classes < 2:
            raise ValueError(f"expected 1 to {num_classes} sources among at least 2 classes, got {n_sources}")
        generator = np.random.default_rng(seed)
        classes = np.arange(num_classes)
        permuted = generator.permutation(num_classes)
        while (permuted == classes).any():
            permuted = generator.permutation(num_classes)
        sources = sorted(generator.choice(num_classes, n_sources, replace=False).tolist())
        return X2X({s: int(permuted[s]) for s in sources}, num_classes)


def CleanLabel(target: int, num_classes: int | None = None) -> LabelMap:
    """Samples of the target class are poisoned and keep their label."""
    return LabelMap({target: target}, num_classes, clean=True)
