"""Which detectors of backdoors a command was asked for, with their settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchfolio import catalog
from torchfolio.cli._network import call_with, parse_settings
from torchfolio.cli._objectives import settings_by_name
from torchfolio.errors import TorchfolioError

__all__ = ["chosen_detectors", "default_detector", "needs_no_data", "offered"]

KINDS = ("input_detector", "model_detector")


def _detectors(slug: str, settings: dict[str, Any], own: dict[str, Any]) -> tuple[Any, Any]:
    """The method's detector of inputs and its detector of networks; `None` for what it has not.

    One that judges inputs judges the network too only where it is given references.
    """
    factories = [offered(slug, kind) for kind in KINDS]
    if factories == [None, None]:
        known = sorted({*catalog.offering("input_detector"), *catalog.offering("model_detector")})
        raise TorchfolioError(f"{slug} is not a detector of backdoors; these are: {', '.join(known)}")
    compares = factories[1] is not None and "references" in _parameters(factories[1])
    if own["references"] and not compares:
        raise TorchfolioError(f"{slug} compares no networks: leave --reference out")
    if compares and not own["references"]:
        if factories[0] is None:
            raise TorchfolioError(f"{slug} compares a network with clean ones: name some with --reference")
        factories[1] = None
    elif factories[0] is not None and not compares:
        factories[1] = None
    taken = {name for factory in factories if factory is not None for name in _parameters(factory)}
    strangers = {k: v for k, v in settings.items() if k not in taken}
    detectors = []
    for factory in factories:
        known = {} if factory is None else _parameters(factory)
        chosen = {k: v for k, v in {**own, **settings}.items() if k in known}
        detectors.append(factory and call_with(factory, {**chosen, **strangers}, f"the method {slug}"))
    return detectors[0], detectors[1]


def chosen_detectors(slugs: Sequence[str], pairs: Sequence[str], own: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Every method with its detector of inputs and its detector of networks.

    A setting goes to all that take it, one that is given as `slug.key=value` to that method alone.
    """
    if len(set(slugs)) < len(slugs):
        raise TorchfolioError(f"expected every method once in --detector, got {', '.join(slugs)}")
    single = [pair for pair in pairs if pair.startswith(tuple(f"{slug}." for slug in slugs))]
    settings = parse_settings([pair for pair in pairs if pair not in single])
    singly = {slug: parse_settings(texts) for slug, texts in settings_by_name(slugs, single).items()}
    if len(slugs) == 1:
        return [(slugs[0], *_detectors(slugs[0], {**settings, **singly[slugs[0]]}, own))]
    taken = {slug: {name for kind in KINDS if (f := offered(slug, kind)) is not None for name in _parameters(f)}
             for slug in slugs}  # fmt: skip
    for name in settings:
        if not any(name in names for names in taken.values()):
            raise TorchfolioError(f"none of the methods {', '.join(slugs)} has a setting {name!r}")
    compares = [slug for slug in slugs if "references" in taken[slug]]
    if own["references"] and not compares:
        raise TorchfolioError(f"none of the methods {', '.join(slugs)} compares networks: leave --reference out")
    methods = []
    for slug in slugs:
        chosen = {**{k: v for k, v in settings.items() if k in taken[slug]}, **singly[slug]}
        context = own if slug in compares else {**own, "references": []}
        methods.append((slug, *_detectors(slug, chosen, context)))
    if sum(by is not None for _, by, _ in methods) > 1:
        raise TorchfolioError(
            "only one method that filters inputs can be fitted at a time: the folder holds one filter"
        )
    return methods


def needs_no_data(detector: str | None) -> bool:
    """Whether all methods judge networks, and without examples."""

    def alone(slug: str) -> bool:
        return offered(slug, "input_detector") is None and not getattr(
            offered(slug, "model_detector"), "needs_clean", True
        )

    return detector is not None and all(alone(slug.strip()) for slug in detector.split(","))


def offered(slug: str, kind: str) -> Any:
    """What a method offers of a kind, or `None`."""
    if not catalog.paper(slug).is_in:
        raise TorchfolioError(f"{slug} is in the catalogue but its method is not in yet")
    return catalog.offered(slug, kind) if slug in catalog.offering(kind) else None


def default_detector() -> str:
    """The method that filters inputs, where there is one alone."""
    known = list(catalog.offering("input_detector"))
    if len(known) != 1:
        raise TorchfolioError(f"name a method with --detector: {', '.join(known)}")
    return known[0]


def _parameters(factory: Any) -> Any:
    import inspect

    return inspect.signature(factory).parameters
