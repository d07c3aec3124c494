"""The learning rule of a training, with the objectives added to it, as the command line names them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfolio.cli._network import call_with, find_rule, parse_settings, predictor_of
from torchfolio.cli._objectives import find_objective, named_networks, renormalized, settings_by_name
from torchfolio.errors import TorchfolioError
from torchfolio.fitting import importable

if TYPE_CHECKING:
    from torch import nn

    from torchfolio.bundle import Bundle, Manifest
    from torchfolio.data import DataSplits
    from torchfolio.engine import LearningRule


@dataclass(frozen=True)
class Part:
    """A rule or an objective before there is a network to train.

    Attributes:
        name: name as it was given.
        factory: class or function that makes it.
        settings: its settings.
        bundles: bundles that settings name in place of a network: a teacher, a guide.
    """

    name: str
    factory: Callable[..., Any]
    settings: dict[str, Any]
    bundles: dict[str, Bundle]

    @classmethod
    def of(cls, name: str, factory: Callable[..., Any], pairs: Sequence[str], allow: Sequence[str]) -> Part:
        """A part of `key=value` settings; the bundles that they name are read."""
        from torchfolio.bundle import load_bundle

        settings = parse_settings(pairs)
        named = named_networks(factory, settings)
        return cls(name, factory, settings, {key: load_bundle(Path(path), allow=allow) for key, path in named.items()})

    def takes(self, name: str) -> bool:
        """Whether the factory has a parameter of this name."""
        return name in inspect.signature(self.factory).parameters

    def networks(self, manifest: Manifest, allow: Sequence[str]) -> dict[str, nn.Module]:
        """Networks of the bundles, for the data of the network that is trained."""
        ready: dict[str, nn.Module] = {}
        for key, bundle in self.bundles.items():
            own = bundle.manifest
            if tuple(own.input_shape) != tuple(manifest.input_shape):
                raise TorchfolioError(
                    f"the {key} takes inputs of shape {tuple(own.input_shape)}, "
                    f"the data have {tuple(manifest.input_shape)}"
                )
            if set(own.classes) == set(manifest.classes) and own.classes != manifest.classes:
                raise TorchfolioError(
                    f"the {key} numbers its classes {', '.join(own.classes)}, the network that is trained "
                    f"{', '.join(manifest.classes)}; expected one order"
                )
            constants = (manifest.mean, manifest.std), (own.mean, own.std)
            ready[key] = renormalized(predictor_of(bundle, allow).eval(), *constants)
        return ready


@dataclass(frozen=True)
class NamedRule:
    """A learning rule with the objectives added to it.

    Attributes:
        host: rule.
        added: objectives, in the order in which they are added.
        allow: import paths that bundles may name.
    """

    host: Part
    added: tuple[Part, ...]
    allow: Sequence[str]

    @classmethod
    def of(
        cls, rule: str, rule_set: Sequence[str], add: Sequence[str], add_set: Sequence[str], allow: Sequence[str]
    ) -> NamedRule:
        """The rule of the options `--rule`, `--rule-set`, `--add` and `--add-set`.

        Raises:
            TorchfolioError: if there is no such rule or objective, or a bundle does not load.
            typer.BadParameter: if a setting belongs to none of them.
        """
        host = Part.of(rule, find_rule(rule), rule_set, allow)
        pairs = settings_by_name(importable(list(add)), add_set)
        return cls(host, tuple(Part.of(name, find_objective(name), own, allow) for name, own in pairs.items()), allow)

    def make(self, net: nn.Module, manifest: Manifest, splits: DataSplits) -> tuple[LearningRule, LearningRule]:
        """The rule for a network and its data: with the objectives, and by itself.

        Raises:
            TorchfolioError: if settings do not fit.
        """
        part = self.host
        statistics = {k: getattr(splits, k).flatten().tolist() for k in ("mean", "std") if part.takes(k)}
        own = {**statistics, **part.settings, **part.networks(manifest, self.allow)}
        host = rule = call_with(part.factory, own, f"the rule {part.name}")
        for part in self.added:
            target = {"target": net} if part.takes("target") else {}
            own = {**target, **part.settings, **part.networks(manifest, self.allow)}
            rule = call_with(part.factory, own, f"the objective {part.name}").on(rule)
        return rule, host

    def facts(self) -> dict[str, Any]:
        """What a bundle keeps of it."""
        return {
            "rule": self.host.name,
            "rule_settings": self.host.settings,
            "added": {part.name: part.settings for part in self.added},
        }
