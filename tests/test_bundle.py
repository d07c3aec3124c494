"""Bundles: what is written comes back, and nothing that could run code is read."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import nn

from torchfolio.bundle import BundleError, Manifest, build, load_bundle, save_bundle
from torchfolio.models import MLP


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight


@pytest.fixture
def bundle(tmp_path):
    torch.manual_seed(0)
    net = MLP(4, 3, hidden=(5,))
    manifest = Manifest(
        "torchfolio.models:MLP",
        {"in_features": 4, "out_features": 3, "hidden": [5]},
        (4,),
        ("a", "b", "c"),
        training={"epochs": 1},
    )
    return net, save_bundle(net, tmp_path / "net", manifest)


def test_round_trip(bundle):
    net, folder = bundle
    again = load_bundle(folder)
    x = torch.randn(2, 4)
    assert torch.equal(again.model(x), net.eval()(x))
    assert again.manifest.classes == ("a", "b", "c")
    assert again.manifest.input_shape == (4,)
    assert sorted(p.name for p in folder.iterdir()) == ["bundle.json", "model.safetensors"]
    assert not again.model.training


def test_replaces_an_earlier_bundle_and_nothing_else(bundle, tmp_path):
    net, folder = bundle
    save_bundle(net, folder, load_bundle(folder).manifest)
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(BundleError, match="no bundle"):
        save_bundle(net, tmp_path / "other", Manifest("torchfolio.models:MLP"))


def test_tied_weights(tmp_path):
    path = f"{__name__}:Tied"
    net = Tied()
    save_bundle(net, tmp_path / "tied", Manifest(path))
    again = load_bundle(tmp_path / "tied", allow=[path]).model
    assert torch.equal(again.b.weight, net.a.weight)


def test_pickle_is_refused(bundle):
    _, folder = bundle
    (folder / "extra.pkl").write_bytes(pickle.dumps({}))
    with pytest.raises(BundleError, match="pickle"):
        load_bundle(folder)


def test_pickle_in_the_place_of_the_weights_is_refused(bundle):
    net, folder = bundle
    torch.save(net.state_dict(), folder / "model.safetensors")
    with pytest.raises(BundleError, match="checksum"):
        load_bundle(folder)


@pytest.mark.parametrize(
    "path", ["os:system", "torchfolio.bundle:save_bundle", "nonsense", "a:b:c", "torchfolio.models:NoSuchNet"]
)
def test_import_paths_that_are_not_allowed(bundle, tmp_path, path):
    net, _ = bundle
    with pytest.raises(BundleError):
        load_bundle(save_bundle(net, tmp_path / "evil", Manifest(path, {})))


def test_an_allowed_path_must_still_be_a_module():
    with pytest.raises(BundleError, match=r"torch\.nn\.Module"):
        build("builtins:dict", {}, allow=["builtins:dict"])


def test_changed_manifest_is_refused(bundle):
    _, folder = bundle
    body = json.loads((folder / "bundle.json").read_text())
    body["arguments"]["hidden"] = [6]
    (folder / "bundle.json").write_text(json.dumps(body))
    with pytest.raises(BundleError, match="changed"):
        load_bundle(folder)


def test_changed_weights_are_refused(bundle):
    _, folder = bundle
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match="checksum"):
        load_bundle(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}'])
def test_malformed_manifest(bundle, text):
    _, folder = bundle
    (folder / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        load_bundle(folder)


def test_missing_files(tmp_path):
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        load_bundle(tmp_path)


def test_weights_of_another_network(bundle, tmp_path):
    net, _ = bundle
    folder = save_bundle(
        net, tmp_path / "odd", Manifest("torchfolio.models:MLP", {"in_features": 4, "out_features": 2})
    )
    with pytest.raises(BundleError, match="do not fit"):
        load_bundle(folder)


def test_manifest_that_is_no_json(bundle, tmp_path):
    net, _ = bundle
    with pytest.raises(BundleError, match="JSON"):
        save_bundle(net, tmp_path / "nan", Manifest("torchfolio.models:MLP", {"x": object()}))
    assert not (tmp_path / "nan").exists()
