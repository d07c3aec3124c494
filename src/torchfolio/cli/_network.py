"""What every command on networks needs: the network, its data, settings given as text, results shown."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from torchfolio.cli._objectives import class_at
from torchfolio.errors import TorchfolioError
from torchfolio.fitting import importable, network_recipe

if TYPE_CHECKING:
    from torch import nn

    from torchfolio.bundle import Bundle, Manifest
    from torchfolio.data import DataSplits
    from torchfolio.engine import LearningRule

T = TypeVar("T")


def predictor_of(bundle: Bundle, allow: Sequence[str] = ()) -> nn.Module:
    """How the network of a bundle answers: by the rule that trained it, where that says so (spiking networks).

    Args:
        bundle: a network and the record of its training.
        allow: import paths that the bundle may use.

    Raises:
        TorchfolioError: if the rule is no method of the catalogue and not allowed.
    """
    rule = own_rule(bundle, allow)
    return bundle.model if rule is None else rule.predictor(bundle.model)


def own_rule(bundle: Bundle, allow: Sequence[str] = ()) -> LearningRule | None:
    """The learning rule that the network of a bundle answers by, and `None` where its plain outputs are its answers.

    See `predictor_of`.
    """
    training = bundle.manifest.training
    if not training.get("predictor"):
        return None
    rule = str(training.get("rule"))
    if ":" in rule and not rule.startswith("torchfolio.") and rule not in allow:
        raise TorchfolioError(f"the network answers by its learning rule {rule}; pass --allow {rule} if you trust it")
    return call_with(find_rule(rule), training.get("rule_settings") or {}, f"the rule {rule}")


def fitting_splits(
    manifest: Manifest, name: str, data: str, *, image_size: int | None = None, scored: bool = True, **options: Any
) -> DataSplits:
    """The data for a bundle, not normalised yet, with a sentence where they do not fit it.

    Args:
        manifest: manifest of the bundle.
        name: name of the bundle, for messages.
        data: name of the data set.
        image_size: side of the images; as in training by default.
        scored: whether the bundle is scored on what is held out; else held-out examples that it was trained on are no
            error but worth a word.
        **options: options of `torchfolio.data.load`.
    """
    from torchfolio.data import load

    size = image_size or manifest.training.get("image_size")
    splits = load(data, image_size=size, normalize=False, **options)
    sentence = _seen(manifest, name, data, splits)
    if sentence and scored:
        raise TorchfolioError(sentence)
    if sentence:
        typer.echo(f"torchfolio: {sentence}", err=True)
    if splits.shape != manifest.input_shape:
        raise TorchfolioError(f"{name} takes inputs of shape {manifest.input_shape}, {data} has {splits.shape}")
    return numbered_alike(manifest, name, data, splits)


def numbered_alike(manifest: Manifest, name: str, data: str, splits: DataSplits) -> DataSplits:
    """The data with their labels in the order of the network's classes, which go by their names."""
    from dataclasses import replace

    import torch
    from torch.utils.data import TensorDataset

    own, there = manifest.classes, splits.classes
    if own == there or not own:
        return splits
    if not there:
        raise TorchfolioError(f"{name} tells {len(own)} classes apart, {data} has numbers to predict")
    if len(own) != len(there):
        raise TorchfolioError(f"{name} tells {len(own)} classes apart, {data} has {len(there)}")
    odd = sorted(set(there) - set(own))
    if len(odd) == len(there):
        typer.echo(
            f"torchfolio: the classes of {data} have other names than those of {name}; the first, {there[0]}, is taken "
            f"for {own[0]}, and so on",
            err=True,
        )
        return splits
    if odd:
        raise TorchfolioError(f"{data} has the class {odd[0]}, which {name} does not know; it knows {', '.join(own)}")
    number = torch.tensor([own.index(label) for label in there])
    pairs = {part: getattr(splits, part).tensors for part in ("train", "val", "test")}
    return replace(splits, classes=own, **{part: TensorDataset(x, number[y]) for part, (x, y) in pairs.items()})


def _seen(manifest: Manifest, name: str, data: str, splits: DataSplits) -> str | None:
    """What to say where a network may have been trained on what is held out of the data now."""
    from torchfolio.data.seen import are_seen

    trained = manifest.training
    now, then, same = splits.split_digest, trained.get("split", ""), trained.get("data") == data
    if now == then and (now or same):
        return None  # the cut of the training
    if same and now and then:
        return (
            f"{name} was trained when {data} held other examples, so that those held out now may be among those it was "
            "trained on; put back what was there, or give the new examples a folder test/ beside train/"
        )
    for part, marks in zip(("validation", "test"), splits.marks[1:], strict=False):
        if are_seen(trained.get("seen", ""), marks):
            return (
                f"{name} was trained on {part} examples of {data}, which stood under other names then; name the data as "
                "in training, or others"
            )
    return None


def seen_so_far(manifest: Manifest, splits: DataSplits) -> str:
    """What the training examples are known by, with those that the network was trained on before."""
    from torchfolio.data.seen import kept_in, sketch

    return sketch([*kept_in(manifest.training.get("seen", "")), *splits.marks[0].tolist()])


def normalized_splits(splits: DataSplits, mean: Sequence[float], std: Sequence[float]) -> DataSplits:
    """Data whose three splits are normalised by the constants of a bundle."""
    from dataclasses import replace

    parts = {part: normalized(getattr(splits, part), mean, std) for part in ("train", "val", "test")}
    return replace(splits, **parts, normalized=bool(mean))


def normalized(examples: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    """A tensor data set with its inputs normalised by the constants of a bundle."""
    import torch
    from torch.utils.data import TensorDataset

    x, *rest = examples.tensors
    if not mean:
        return examples
    shape = (1, -1, *[1] * (x.dim() - 2))
    return TensorDataset((x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape), *rest)


def parse_settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`key=value` pairs; values are Python literals, or strings where they are none.

    Raises:
        typer.BadParameter: if a pair has no `=`.
    """
    settings: dict[str, Any] = {}
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise typer.BadParameter(f"expected key=value, got {pair!r}")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    return settings


def call_with(factory: Callable[..., Any], settings: Mapping[str, Any], what: str) -> Any:
    """Call a factory with settings, with a sentence about those that it does not take, by name or by kind."""
    import inspect

    from torchfolio.bundle.building import is_a, parameters_of

    parameters = inspect.signature(factory).parameters
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [key for key in settings if key not in parameters]
    if unknown and not open_ended:
        known = ", ".join(n for n, p in parameters.items() if p.kind not in variable)
        raise TorchfolioError(f"{what} has no setting {unknown[0]!r}; it has: {known or 'none'}")
    missing = [
        n for n, p in parameters.items() if p.default is p.empty and n not in settings and p.kind not in variable
    ]
    if missing:
        raise TorchfolioError(f"{what} needs the setting {missing[0]!r}")
    try:
        kinds = {name: parameter.annotation for name, parameter in parameters_of(factory).items()}
    except Exception:  # annotations of a user's own class may name what is not imported
        kinds = {}
    for name, annotation in kinds.items():
        value = settings.get(name)
        said = annotation is not inspect.Parameter.empty and "Any" not in str(annotation)
        if said and isinstance(value, str | int | float | list | tuple | dict) and not is_a(value, annotation):
            raise TorchfolioError(f"{what} cannot be made with {name}={value!r}, expected {_words(annotation)}")
    try:
        return factory(**settings)
    except (TorchfolioError, ValueError):
        raise
    except Exception as error:
        if not settings:
            raise
        raise TorchfolioError(f"{what} cannot be made with {dict(settings)}: {error}") from error


def _words(annotation: Any) -> str:
    """A type as a reader of the documentation knows it."""
    import re

    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    return re.sub(r"\b[a-z_]+(\.\w+)*\.(?=[A-Za-z]\w*)", "", text)


def find_rule(name: str) -> Callable[..., LearningRule]:
    """The learning rule behind a name: backprop, the slug of a method, or an import path.

    Raises:
        TorchfolioError: if there is no such rule.
    """
    from torchfolio import catalog
    from torchfolio.engine import Backprop, LearningRule

    if name == "backprop":
        return Backprop
    if ":" in name:
        importable([name])
        return class_at(name, LearningRule, "rule")
    return catalog.offered(name, "rule")


def open_network(
    bundle: Path | None,
    model: str | None,
    weights: Path | None,
    model_set: Sequence[str] | None,
    allow: list[str],
    data: str,
    image_size: int | None,
    sizes: dict[str, Any],
    *,
    scored: bool = True,
) -> tuple[Bundle, DataSplits]:
    """The network that a command is given, as a bundle or by `--model` and `--weights`; its data, not normalised yet.

    Args:
        bundle: its folder.
        model: reference network or import path.
        weights: a safetensors file.
        model_set: arguments of the network, `key=value`.
        allow: import paths that the bundle may use.
        data: name of the data set.
        image_size: side of the images.
        sizes: seed and sizes, of `torchfolio.data.load`.
        scored: whether the data will be scored on, as in `fitting_splits`.
    """
    from torchfolio.bundle import load_bundle

    if bundle is not None and model is None and weights is None:
        source = load_bundle(bundle, allow=allow)
        options = {**sizes, "image_size": image_size, "scored": scored}
        return source, fitting_splits(source.manifest, str(bundle), data, **options)
    if bundle is None and model is not None and weights is not None:
        return _from_weights(model, weights, parse_settings(model_set), data, image_size, sizes)
    raise TorchfolioError("expected either the folder of a bundle, or --model with --weights")


def _from_weights(
    model: str, weights: Path, arguments: dict[str, Any], data: str, image_size: int | None, sizes: dict[str, Any]
) -> tuple[Bundle, DataSplits]:
    """A network from a factory and a safetensors file, as if it came from a bundle; and its data."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from torchfolio.bundle import Bundle, Manifest, build
    from torchfolio.data import load

    if not weights.is_file():
        raise FileNotFoundError(f"there is no file {weights}")
    splits = load(data, image_size=image_size, normalize=False, **sizes)
    path, arguments = network_recipe(model, arguments, splits)
    net = build(path, arguments, allow=[path])
    try:
        net.load_state_dict(_named_as(net, load_file(weights)))
    except SafetensorError as error:
        raise TorchfolioError(f"{weights} is not a readable safetensors file: {error}") from error
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise TorchfolioError(f"the weights in {weights} do not fit {model}: {detail}") from error
    mean, std = (tuple(t.flatten().tolist()) for t in (splits.mean, splits.std))
    shape, classes = tuple(splits.shape), tuple(splits.classes)
    return Bundle(net.eval(), Manifest(path, arguments, shape, classes, mean, std, {"image_size": image_size})), splits


def _named_as(net: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Weights by all names that a network has for them.

    Wrappers for several devices and compiled networks put their own name before every other, and safetensors'
    `save_model` keeps one name of a tensor that has several.
    """
    from torchfolio.models.wrappers import own_names

    own = net.state_dict(keep_vars=True)
    state = own_names(state, own)
    stored = {id(value): state[name] for name, value in own.items() if name in state}
    return {**{name: stored[id(value)] for name, value in own.items() if id(value) in stored}, **state}


def augmentation(splits: DataSplits) -> Any:
    """Random crops and flips for colour images; none for other data."""
    from torchfolio.data.augment import CropFlip

    colour_images = len(splits.shape) == 3 and splits.shape[0] == 3
    return CropFlip(padding=max(1, splits.shape[-1] // 8), flip=True) if colour_images else None


def say(text: str) -> None:
    """Print a line of progress, beside the result."""
    typer.echo(text, err=True)


def each_by_itself(methods: Iterable[str], do: Callable[[str], T], what: str) -> tuple[dict[str, T], dict[str, str]]:
    """What every method gives, and why others cannot: one that refuses costs its own part alone.

    Args:
        methods: slugs. The error of one that is alone is raised as it is.
        do: work of one method.
        what: words for the work, after "can".

    Returns:
        Results, and reasons of those that refused, by slug.

    Raises:
        TorchfolioError: if every one of several refuses.
    """
    slugs = list(methods)
    results: dict[str, T] = {}
    failed: dict[str, str] = {}
    for slug in slugs:
        try:
            results[slug] = do(slug)
        except (TorchfolioError, ValueError, TypeError) as error:
            if len(slugs) == 1:
                raise
            failed[slug] = str(error)
            say(f"{slug} cannot do it: {error}")
    if not results:
        raise TorchfolioError(f"none of {', '.join(slugs)} can {what}")
    return results, failed


def show_result(result: Mapping[str, Any], as_json: bool) -> None:
    from torchfolio.json_text import to_json

    if as_json:
        typer.echo(to_json(result))
        return
    for key, value in result.items():
        typer.echo(f"{key:>10}  {f'{value:.4f}' if isinstance(value, float) else value}")
