"""The module that a bundle names: built from a list of known factories alone, its size bounded before it takes memory."""

from __future__ import annotations

import importlib
import inspect
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.utils._python_dispatch import TorchDispatchMode

from torchfolio import catalog, models
from torchfolio.bundle.manifest import BundleError, is_path, shown
from torchfolio.errors import TorchfolioError

DEEPEST = 8  # networks around networks
MOST_MODULES = 10_000


def build(path: str, arguments: Mapping[str, Any], *, allow: Sequence[str] = (), limit: int | None = None) -> nn.Module:
    """Build a module from an import path and keyword arguments.

    Args:
        path: `"package.module:name"`, one of `builders()` or of `allow`.
        arguments: keyword arguments; `{"build": ..., "arguments": {...}}` among them stands for a network.
        allow: further paths that may be imported.
        limit: maximum number of elements that the module's tensors may have together; by default as many as it asks
            for.

    Raises:
        BundleError: if the path is not allowed, cannot be imported, or does not give an `nn.Module`, or a larger one.
    """
    if limit is None:
        return _build(path, arguments, allow)
    outline(path, arguments, allow=allow, limit=limit)
    with _bounded_registration(limit):
        return _build(path, arguments, allow)


def outline(path: str, arguments: Mapping[str, Any], *, allow: Sequence[str] = (), limit: int) -> nn.Module | None:
    """The module of `build` on the meta device, where nothing is allocated; `None` where its builder reads values.

    Raises:
        BundleError: as `build` does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _Bounded(limit), torch.device("meta"):
                return _build(path, arguments, allow)
        except BundleError as error:
            if isinstance(error.__cause__, _TooLarge) or error.__cause__ is None:
                raise
    return None


def _build(path: str, arguments: Mapping[str, Any], allow: Sequence[str], depth: int = 1) -> nn.Module:
    if depth > DEEPEST:
        raise BundleError(f"the network is made of more than {DEEPEST} networks around one another")
    factory = resolve(path, allow=allow)
    inner = {
        name: _build(value["build"], value["arguments"], allow, depth + 1)
        for name, value in arguments.items()
        if isinstance(value, Mapping) and set(value) == {"build", "arguments"}
    }
    if path not in allow:
        _check_arguments(path, factory, {**arguments, **inner})
    try:
        model = factory(**{**arguments, **inner})
    except TorchfolioError:
        raise
    except Exception as error:  # of arguments that nobody foresaw, in as many ways as there are builders
        kind = "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: "
        described = shown(dict(arguments))
        raise BundleError(f"{path} cannot be built with the arguments {described}: {kind}{error}") from error
    if not isinstance(model, nn.Module):
        raise BundleError(f"{path} gives a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _check_arguments(path: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check arguments against the annotations of a builder: text where it counts, say, could do anything there."""
    known = parameters_of(factory)
    for name, value in arguments.items():
        if name not in known:
            raise BundleError(f"{path} has no argument {shown(name)}")
        if not is_a(value, known[name].annotation):
            expected = str(known[name].annotation).replace("typing.", "").replace("collections.abc.", "")
            raise BundleError(f"{path} cannot be built with {name}={shown(value)}, expected {expected}")


@cache
def parameters_of(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a builder takes by name; one that passes `**kwargs` on takes what the class takes that it returns."""
    signature = inspect.signature(factory, eval_str=True)
    known = dict(signature.parameters)
    if any(p.kind is p.VAR_KEYWORD for p in known.values()) and inspect.isclass(signature.return_annotation):
        known |= inspect.signature(signature.return_annotation, eval_str=True).parameters
    return {name: p for name, p in known.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def is_a(value: Any, annotation: Any) -> bool:
    """Whether a JSON value, or a network, is of an annotated type. Of types that JSON does not have nothing is."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(is_a(value, part) for part in parts)
    if origin is typing.Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence):
        many = isinstance(value, list | tuple) and len(value) <= MOST_MODULES
        return many and all(is_a(part, parts[0]) for part in value)
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    if annotation in (str, bool) or (inspect.isclass(annotation) and issubclass(annotation, nn.Module)):
        return isinstance(value, annotation)
    return False


class _TooLarge(ValueError):
    """A module is larger than its weights can be."""


class _Count:
    """Elements and modules of what is being built, against their limits."""

    def __init__(self, limit: int) -> None:
        self.limit, self.elements, self.modules, self.operations = limit, 0, 0, 0

    def tensor(self, module: nn.Module, name: str, value: Tensor | None) -> None:
        self.elements += 0 if value is None else value.numel()
        self.check(self.elements)

    def module(self, parent: nn.Module, name: str, value: nn.Module | None) -> None:
        self.modules += 1
        if self.modules > MOST_MODULES:
            raise _TooLarge(f"it has more than {MOST_MODULES} modules")

    def operation(self) -> None:
        self.operations += 1
        if self.operations > 3 * MOST_MODULES:
            raise _TooLarge(f"its construction takes more than {3 * MOST_MODULES} operations")

    def check(self, elements: int) -> None:
        if elements > self.limit:
            raise _TooLarge(f"it needs at least {elements} numbers, more than its file of weights can hold")


@contextmanager
def _bounded_registration(limit: int) -> Iterator[None]:
    """Raise `_TooLarge` as soon as modules have registered more than they may."""
    count = _Count(limit)
    handles = [
        registration.register_module_parameter_registration_hook(count.tensor),  # pyright: ignore[reportArgumentType]
        registration.register_module_buffer_registration_hook(count.tensor),  # pyright: ignore[reportArgumentType]
        registration.register_module_module_registration_hook(count.module),  # pyright: ignore[reportArgumentType]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Bounded(TorchDispatchMode):
    """`_bounded_registration`, no tensor larger than the limit, and an end to building."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.count, self.registration = _Count(limit), _bounded_registration(limit)

    def __enter__(self) -> _Bounded:
        self.registration.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.registration.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count.operation()
        if isinstance(result, Tensor):
            self.count.check(result.numel())
        return result


@cache
def builders() -> frozenset[str]:
    """The import paths that a bundle may name: the reference networks, and what papers offer as `builders`."""
    own = [f"torchfolio.models:{name}" for name in models.BUILDERS]
    ready = [paper for paper in catalog.papers().values() if paper.is_in]
    offered = [(paper.module, name) for paper in ready for name in paper.offers.get("builders", ())]
    return frozenset([*own, *(name if ":" in name else f"{module}:{name}" for module, name in offered)])


def resolve(path: str, *, allow: Sequence[str] = ()) -> Any:
    """The class or factory behind an import path, if it may be imported. See `build`."""
    if not is_path(path):
        raise BundleError(f"expected an import path of the form package.module:name, got {shown(path)}")
    if path not in allow and path not in builders():
        ours = path.startswith(("torchfolio.", "torchfolio:"))
        what = "is not a network that a bundle may name" if ours else "is not part of torchfolio"
        raise BundleError(f"{path} {what}; if you trust it, allow it by name: --allow {path}")
    module_name, _, name = path.partition(":")
    try:
        target = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise BundleError(f"cannot import {path}: {error}") from error
    if not callable(target):
        raise BundleError(f"{path} is a {type(target).__name__}, expected a class or factory of a torch.nn.Module")
    return target


def check_finite(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse NaN anywhere, and infinity in parameters; a buffer may hold it, as masks of attention do."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in state.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if bool(tensor.isnan().any()) or (name in parameters and not bool(tensor.isfinite().all())):
            raise BundleError(f"the weights hold numbers that are not finite, first in {name}")
