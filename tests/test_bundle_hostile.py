"""Bundles of a stranger: nothing that they hold runs, and the worst that happens is one sentence."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from torchfolio import bundle
from torchfolio.bundle import (
    BundleError,
    Manifest,
    build,
    builders,
    check_folder,
    load_bundle,
    resolve,
    save_bundle,
)
from torchfolio.bundle.building import _check_arguments
from torchfolio.models import MLP

NET = Manifest("torchfolio.models:MLP", {"in_features": 4, "out_features": 3, "hidden": [5]}, (4,), ("a", "b", "c"))


@pytest.fixture
def folder(tmp_path):
    return save_bundle(MLP(4, 3, hidden=(5,)), tmp_path / "net", NET)


def rewrite(folder, body):
    """Write a manifest as an enemy does: with its digest."""
    text = json.dumps({k: v for k, v in body.items() if k != "digest"}, sort_keys=True)
    body["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(body))


def read(folder):
    return json.loads((folder / "bundle.json").read_text())


# What may be built


def test_a_module_that_compiles_its_source_is_not_built(folder, tmp_path):
    mark = tmp_path / "ran"
    body = read(folder)
    body["build"] = "torchfolio.diagrams.compile:CircuitModule"
    source = f"open({str(mark)!r}, 'w').close()\ndef f(*a): return a"
    body["arguments"] = {"source": source, "name": "f", "weights": {}, "saved": []}
    rewrite(folder, body)
    with pytest.raises(BundleError, match="may name"):
        load_bundle(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "path",
    ["torchfolio.models:importlib", "torchfolio.models.registry:build", "torchfolio.models:take_features",
     "torchfolio.models.mlp:torch", "torchfolio.models:MLP.__init__", "torchfolio.bundle:load_bundle",
     "torch.nn:Linear", "builtins:eval", "torchfolio.models:BUILDERS"],
)  # fmt: skip
def test_only_listed_builders(path):
    with pytest.raises(BundleError):
        build(path, {})


def test_every_builder_says_what_it_takes():
    """Arguments are checked by annotations, so all of them can be read and none of them says `Any`."""
    assert "torchfolio.models:resnet20" in builders()
    for path in builders():
        factory = resolve(path)
        assert inspect.signature(factory, eval_str=True)
        _check_arguments(path, factory, {})


def test_no_builder_runs_what_it_is_handed(tmp_path):
    """Every builder, every argument, every hostile value: refused or built, and an audit hook sees nothing run."""
    command = [sys.executable, str(Path(__file__).with_name("hostile_builders.py")), str(tmp_path / "mark")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "refused" in done.stdout


@pytest.mark.parametrize(
    ("path", "arguments"),
    [("torchfolio.models:MLP", {"in_features": 10**9, "out_features": 10**9}),
     ("torchfolio.models:ViT", {"depth": 10**9}),
     ("torchfolio.models:Transformer", {"vocab_src": 2, "vocab_tgt": 2, "max_length": 2**30})],
)  # fmt: skip
def test_no_larger_network_than_its_weights(path, arguments):
    with pytest.raises(BundleError, match=r"more than|at least"):
        build(path, arguments, limit=10**6)


def test_networks_around_networks_end():
    network = {"build": "torchfolio.models:ConvNet", "arguments": {}}
    for _ in range(20):
        network = {"build": "torchfolio.efficiency.binary:pack", "arguments": {"model": network}}
    with pytest.raises(BundleError, match="around one another"):
        build(network["build"], network["arguments"])


# The manifest

WRONG = [None, True, 5, -1, 1.5, "x", "", [], {}, [[]], [None], [True], [-1], [0], [1.5], ["x"], {"a": 1}, {"1": 1},
         [float("nan")], [float("inf")], {"image_size": "x"}, {"image_size": -1}, {"a": float("nan")}, 10**400,
         "a:b:c", [1] * 9, [10**400], {"model": {"build": 5, "arguments": {}}}]  # fmt: skip
RIGHT = {
    "arguments": [{}, {"a": 1}, {"image_size": "x"}, {"image_size": -1}],  # whose right types the builder knows
    "input_shape": [[]],
    "classes": [[], ["x"]],
    "mean": [[]],
    "std": [[]],
    "training": [{}, {"a": 1}, {"1": 1}, {"model": {"build": 5, "arguments": {}}}],
    "tied": [{}],
    "version": ["x", "a:b:c"],
}


def test_manifests_of_wrong_types(folder):
    """Each field with each wrong value, its digest right: one sentence, and the file and field are named."""
    good, refused = read(folder), 0
    fields = [name for name in good if name != "digest"]
    for name in fields:
        for value in WRONG:
            if value in RIGHT.get(name, []) and not isinstance(value, bool):
                continue
            rewrite(folder, {**good, name: value})
            with pytest.raises(BundleError) as caught:
                load_bundle(folder)
            assert "\n" not in str(caught.value)
            refused += 1
    assert refused >= 214
    rewrite(folder, good)
    load_bundle(folder)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "NaN", "\ufeff{}", '"' + "a" * 20_000_000 + '"', "\x00", "null"],
)  # fmt: skip
def test_manifests_that_are_none(folder, text):
    (folder / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        load_bundle(folder)


def test_constants_of_another_number(folder):
    rewrite(folder, {**read(folder), "mean": [0.0, 1.0], "std": [1.0]})
    with pytest.raises(BundleError, match="as many"):
        load_bundle(folder)
    rewrite(folder, {**read(folder), "mean": [0.0, 1.0], "std": [1.0, 1.0]})
    with pytest.raises(BundleError, match="shape"):
        load_bundle(folder)


def test_the_version_is_written_down(folder):
    from torchfolio import __version__

    assert read(folder)["version"] == __version__
    assert read(folder)["format"] == 2


def test_a_record_stays_json(tmp_path):
    manifest = Manifest(NET.build, NET.arguments, training={"loss": float("nan"), "rows": [{"x": float("inf")}]})
    saved = save_bundle(MLP(4, 3, hidden=(5,)), tmp_path / "net", manifest)
    assert load_bundle(saved).manifest.training == {"loss": None, "rows": [{"x": None}]}


# Weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    net = MLP(4, 3, hidden=(5,))
    with torch.no_grad():
        net.head.bias[1] = value
    with pytest.raises(BundleError, match=r"head\.bias"):
        save_bundle(net, tmp_path / "net", NET)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_read(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state["layer1.1.weight"][2, 1] = float("nan")
    save_file(state, folder / "model.safetensors")
    sum_of = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    rewrite(folder, {**read(folder), "weights_sha256": sum_of})
    with pytest.raises(BundleError, match=r"layer1\.1\.weight"):
        load_bundle(folder)


def test_a_mask_may_be_infinite(tmp_path):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -float("inf")]))

    save_bundle(Masked(), tmp_path / "net", Manifest("some.module:Masked"))


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}"])
def test_weights_that_are_none(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    rewrite(folder, {**read(folder), "weights_sha256": hashlib.sha256(content).hexdigest()})
    with pytest.raises(BundleError, match="safetensors"):
        load_bundle(folder)


# The folder


def test_modes_are_ordinary(folder):
    mask = os.umask(0)
    os.umask(mask)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


def killed_while_saving(folder, at):
    """Replace a bundle twice in a process that dies at its `at`-th step; false if it ends before."""
    process = os.fork()
    if process == 0:
        calls = itertools.count(1)

        def dying(function):
            return lambda *args, **kwargs: os._exit(9) if next(calls) == at else function(*args, **kwargs)

        try:
            for module, name in (
                (os, "replace"),
                (shutil, "rmtree"),
                (bundle.writing, "save_file"),
                (bundle.writing, "write"),
                (bundle.folder, "sync"),
            ):
                setattr(module, name, dying(getattr(module, name)))
            for _ in range(2):
                save_bundle(MLP(4, 3, hidden=(5,)), folder, NET)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


def test_a_killed_replacement_leaves_one_of_the_two(folder, tmp_path):
    deaths = 0
    while killed_while_saving(folder, deaths + 1):
        deaths += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_bundle(folder)
    assert deaths >= 20
    save_bundle(MLP(4, 3, hidden=(5,)), folder, NET)
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_an_earlier_bundle_is_found_where_its_replacement_died(folder, tmp_path):
    folder.rename(tmp_path / ".net.old")
    with pytest.warns(UserWarning, match="being replaced"):
        load_bundle(folder)
    save_bundle(MLP(4, 3, hidden=(5,)), folder, NET)
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_places_where_no_bundle_can_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="no folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(BundleError, match="cannot be written"):
        check_folder(tmp_path / "file" / "net")
    check_folder(folder)
    check_folder(tmp_path / "a" / "b" / "net")
