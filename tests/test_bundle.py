"""Bundles: what is written comes back, and nothing that could run code is read."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from torchfolio.bundle import BundleError, Manifest, build, load_bundle, save_bundle, write_bundle
from torchfolio.efficiency.binary import pack
from torchfolio.efficiency.biper import binarize
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


OTHERS = {
    "width": Manifest("torchfolio.models:MLP", {"in_features": 4, "out_features": 2}),
    "packed": Manifest("torchfolio.efficiency.binary:pack", {"model": {"build": "torchfolio.models:MLP", "arguments": {
        "in_features": 4, "out_features": 2, "hidden": [5]}}}),
    "another": Manifest("torchfolio.models:ConvNet", {}),
    "a layer more": Manifest("torchfolio.models:MLP", {"in_features": 4, "out_features": 2, "hidden": [5, 5]}),
    "no such argument": Manifest("torchfolio.models:MLP", {"in_features": 4, "out_features": 2, "width": 5}),
}  # fmt: skip


@pytest.mark.parametrize("manifest", OTHERS.values(), ids=OTHERS)
def test_weights_of_another_network(bundle, tmp_path, manifest):
    """A bundle that could not be read back is not written; one that was is told when it is read."""
    net, _ = bundle
    before = torch.get_rng_state()
    with pytest.raises(BundleError, match=r"the manifest builds another network|cannot be built|has no argument"):
        save_bundle(net, tmp_path / "odd", manifest)
    assert not (tmp_path / "odd").exists()
    assert torch.equal(torch.get_rng_state(), before)
    folder = write_bundle(tmp_path / "odd", manifest, lambda path: save_file(net.state_dict(), path))
    with pytest.raises(BundleError, match=r"do not fit|cannot be built|has no argument"):
        load_bundle(folder)


def test_a_packed_network_needs_its_own_recipe(tmp_path):
    plain = Manifest("torchfolio.models:MLP", {"in_features": 6, "out_features": 2, "hidden": [5, 5]}, (6,))
    net = pack(binarize(MLP(6, 2, hidden=(5, 5)), where=["layer2.0"]))
    with pytest.raises(
        BundleError, match=r"by torchfolio\.models:MLP: layer2\.0\.weight is \(5, 5\) in it and not there"
    ):
        save_bundle(net, tmp_path / "small", plain)
    inner = {"build": plain.build, "arguments": plain.arguments}
    binary = {"build": "torchfolio.efficiency.biper:binarize", "arguments": {"model": inner, "where": ["layer2.0"]}}
    save_bundle(net, tmp_path / "small", Manifest("torchfolio.efficiency.binary:pack", {"model": binary}, (6,)))
    x = torch.randn(4, 6)
    assert torch.equal(load_bundle(tmp_path / "small").model(x), net.eval()(x))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda net: nn.DataParallel(torch.compile(net))])
def test_the_network_inside_its_wrappers_is_saved(bundle, tmp_path, wrap):
    net, folder = bundle
    save_bundle(wrap(net), tmp_path / "wrapped", load_bundle(folder).manifest)
    state = load_bundle(tmp_path / "wrapped").model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_manifest_that_is_no_json(bundle, tmp_path):
    net, _ = bundle
    with pytest.raises(BundleError, match="JSON"):
        save_bundle(net, tmp_path / "nan", Manifest("torchfolio.models:MLP", {"x": object()}))
    assert not (tmp_path / "nan").exists()
