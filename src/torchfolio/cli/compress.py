"""The command that makes a trained network smaller."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchfolio import catalog
from torchfolio.cli._network import (
    augmentation,
    call_with,
    each_by_itself,
    find_rule,
    normalized_splits,
    open_network,
    own_rule,
    parse_settings,
    predictor_of,
    say,
    seen_so_far,
    show_result,
)
from torchfolio.cli._options import (
    MOST,
    MOST_SEED,
    Allow,
    AsJson,
    BatchSize,
    Data,
    Device,
    Force,
    ImageSize,
    ModelSet,
    Output,
    Precision,
    TestSize,
    TrainSize,
    alone,
    at_least_zero,
    check_outputs,
)
from torchfolio.fitting import importable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from torchfolio.bundle import Bundle, Manifest
    from torchfolio.data import DataSplits
    from torchfolio.efficiency.compression import Compression


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(compress)


def compress(
    data: Data,
    output: Output,
    bundle: Annotated[Path | None, typer.Argument(help="Folder of the bundle; or name --model and --weights.")] = None,
    method: Annotated[
        str, typer.Option(help="Slug of a method that compresses networks, or several to compare: a,b.")
    ] = "biper",
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Setting of the method, key=value; of several, slug.key=value.")
    ] = None,
    rule: Annotated[
        str, typer.Option(help="Learning rule of the fine-tuning: backprop, a method's slug, or package.module:Class.")
    ] = "backprop",
    rule_set: Annotated[list[str] | None, typer.Option(help="Setting of the rule, key=value; may be repeated.")] = None,
    model: Annotated[str | None, typer.Option(help="Reference network or package.module:factory.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Its weights, a safetensors file.")] = None,
    model_set: ModelSet = None,
    allow: Allow = None,
    epochs: Annotated[
        int, typer.Option(min=1, max=MOST, help="Passes over the training data, of all phases together.")
    ] = 9,
    batch_size: BatchSize = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of the first phase.", callback=at_least_zero)] = 0.02,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.", callback=at_least_zero)] = 5e-4,
    augment: Annotated[bool, typer.Option(help="Random crops and flips of colour images.")] = True,
    image_size: ImageSize = None,
    train_size: TrainSize = None,
    test_size: TestSize = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of subsets and order.")] = 0,
    device: Device = "auto",
    precision: Precision = "32-true",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make a trained network smaller, fine-tune it, and write it as a bundle that eval reads.

    Shows bytes of all tensors, operations for one example and scores on the test split, before and after; those
    after are of the bundle as it is read back.

    Several methods are compared: each writes a bundle into the output folder, with one table and figure beside them.

    Example: torchfolio compress net/ --method biper --data cifar10 --epochs 9 -o small/

    Example: torchfolio compress net/ --method biper,double_rounding,ftwt --data cifar10 -o smaller/

    Example: torchfolio compress net/ --method biper --rule auglocal --rule-set aux_depth=2 --data cifar10 -o small/
    """
    from torchfolio.cli._objectives import settings_by_name

    methods = [name.strip() for name in method.split(",")]
    own = settings_by_name(methods, setting or [], ("--method", "--set", "method"))
    places = {name: output / name if len(methods) > 1 else output for name in methods}
    ready: dict[str, tuple[Compression, dict[str, Any]]] = {}
    for name in places:
        settings = parse_settings(own[name])
        ready[name] = call_with(catalog.offered(name, "compression"), settings, f"the method {name}"), settings
    with alone(output, lambda: check_outputs(places.values(), force)):
        make_rule, rule_settings = find_rule(rule), parse_settings(rule_set)
        learning_rule = None if rule == "backprop" else call_with(make_rule, rule_settings, f"the rule {rule}")
        allow = importable([*(allow or []), *([model] if model and ":" in model else [])])
        sizes = {"seed": seed, "train_size": train_size, "test_size": test_size}
        source, splits = open_network(bundle, model, weights, model_set, allow, data, image_size, sizes)
        splits = normalized_splits(splits, source.manifest.mean, source.manifest.std)
        if learning_rule is None and (learning_rule := own_rule(source, allow)) is not None:
            trained = source.manifest.training
            rule, rule_settings = trained["rule"], trained.get("rule_settings") or {}
        example = splits.train.tensors[0][:2].clone()
        before = {**_measure(source, splits, device, allow), **_flops(source.model, example)}
        training = {"epochs": epochs, "lr": lr, "weight_decay": weight_decay, "batch_size": batch_size, "seed": seed}
        named = {} if learning_rule is None else {"rule": rule, "rule_settings": rule_settings}
        fitting = {
            "augment": augmentation(splits) if augment else None, "device": device, "precision": precision, "rule": learning_rule,
        }  # fmt: skip

        def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
            compression, settings = ready[name]
            record = {"method": name, "settings": settings, "data": data, **named, **training, "before": before}
            return _compressed(source, compression, splits, example, places[name], allow, record, training, fitting)

        results, failed = each_by_itself(ready, made, "make this network smaller")
        networks = {"before": source.model, **{name: net for name, (net, _) in results.items()}}
        after = {name: scores for name, (_, scores) in results.items()}
        for name, time in _milliseconds(networks, splits).items():  # no part of the record: they differ from run to run
            {"before": before, **after}[name]["ms_per_example"] = time
        if len(methods) == 1:
            _show(str(output), methods[0], before, after[methods[0]], as_json)
            return
        _compare(output, {"before": before, **after}, failed, as_json)


def _compressed(
    source: Bundle,
    compression: Compression,
    splits: DataSplits,
    example: Tensor,
    output: Path,
    allow: list[str],
    record: dict[str, Any],
    training: dict[str, Any],
    fitting: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any]]:
    """Compress, write, read back and measure; the network as it is read back, and its figures."""
    from torchfolio.bundle import load_bundle, save_bundle
    from torchfolio.efficiency.compression import compress as compress_network

    compressed = compress_network(
        source.model, compression, splits.train, val=splits.val, example=example,
        say=say, **training, **fitting,
    )  # fmt: skip
    record = {**record, "epochs": compressed.epochs}
    save_bundle(compressed.model, output, _manifest(source.manifest, compression, splits, record))
    written = load_bundle(output, allow=allow)
    figures = _measure(written, splits, str(fitting["device"]), allow)
    return written.model, figures | compression.operations(written.model.cpu(), example[:1])


def _compare(output: Path, rows: dict[str, dict[str, Any]], failed: dict[str, str], as_json: bool) -> None:
    """One table of all methods, on the screen, as CSV and with a figure on a page."""
    import matplotlib.pyplot as plt
    import pandas as pd
    from matplotlib.ticker import LogLocator

    from torchfolio.report.sheet import Picture, Sheet, Table, write_sheet

    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    frame.to_csv(output / "compared.csv")
    score = "accuracy" if "accuracy" in frame else "loss"
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for k, (name, row) in enumerate(frame.iterrows()):
        ax.plot(row["bytes"] / 1024, row[score], "o", color=f"C{k}")
        ax.annotate(str(name), (row["bytes"] / 1024, row[score]), (6, 4), textcoords="offset points")
    ax.set(xscale="log", xlabel="kB", ylabel=f"test {score}")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.margins(0.2)
    page = write_sheet(output / "compared.html", "networks made smaller", [Sheet(
        "What each method gives", sentences=["Each network is a bundle of its own, measured as it is read back."],
        notes=[f"{name} could not convert the network: {why}" for name, why in failed.items()],
        tables=[Table.of(frame)], pictures=[Picture(figure, f"Bytes of all tensors, and {score} on the test split.")],
    )])  # fmt: skip
    if as_json:
        show_result({"bundles": str(output), "networks": rows, "failed": failed, "page": str(page)}, True)
        return
    typer.echo(frame.to_string(float_format=lambda v: f"{v:.4f}"))
    typer.echo(f"page: {page}")


def _manifest(source: Manifest, compression: Compression, splits: DataSplits, record: dict[str, Any]) -> Manifest:
    from dataclasses import replace

    recipe = compression.recipe({"build": source.build, "arguments": source.arguments})
    training = {**source.training, "seen": seen_so_far(source, splits), "compressed": record}
    return replace(source, **recipe, training=training, tied={})


def _measure(bundle: Bundle, splits: DataSplits, device: str, allow: list[str]) -> dict[str, float]:
    from torchfolio import engine
    from torchfolio.efficiency.compression import tensor_bytes

    scores = engine.evaluate(predictor_of(bundle, allow), splits.test, device=device)
    return {"bytes": tensor_bytes(bundle.model), **scores}


def _milliseconds(networks: dict[str, nn.Module], splits: DataSplits) -> dict[str, float]:
    """Time for an example in a batch of 64 on the CPU, of all networks in turn: the shortest of nine passes."""
    import torch

    from torchfolio.measure import alternate

    x = splits.test.tensors[0][:64]
    calls: dict[str, Any] = {name: partial(net.cpu().eval(), x) for name, net in networks.items()}
    with torch.no_grad():
        timed = alternate(**calls)
    return {name: 1000 * min(seconds) / len(x) for name, seconds in timed.seconds.items()}


def _flops(model: nn.Module, example: Tensor) -> dict[str, int]:
    from torchfolio.measure import count_flops

    return {"flops": count_flops(model.cpu(), example[:1])}


def _show(bundle: str, method: str, before: dict[str, Any], after: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_result({"bundle": bundle, "method": method, "before": before, "after": after}, True)
        return
    typer.echo(f"{'bundle':>18}  {bundle}")
    for key in dict.fromkeys([*before, *after]):
        values = [f"{v:.4f}" if isinstance(v, float) else f"{v:,}" for v in (before.get(key, 0), after.get(key, 0))]
        typer.echo(f"{key.replace('_', ' '):>18}  {values[0]} -> {values[1]}")
