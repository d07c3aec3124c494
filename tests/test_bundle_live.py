"""Bundles of live networks, without a manifest."""

from __future__ import annotations

import copy
import json
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

from torchfolio.bundle import BundleError, build, load_bundle, save_bundle
from torchfolio.models import MLP, Chain, ConvNet, UNet, ViT, replace_layers, resnet20

IMAGES = torch.rand(3, 2, 12, 12, generator=torch.Generator().manual_seed(0))


def layers():
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(2, 4, (3, 5), stride=2, padding=(1, 2), bias=False, padding_mode="reflect"),
                               nn.BatchNorm2d(4, eps=1e-3), nn.LeakyReLU(0.2), nn.MaxPool2d(2, ceil_mode=True)),
            shape=nn.Flatten(), head=nn.Sequential(nn.LazyLinear(5), nn.GELU("tanh"), nn.Hardtanh(-2.0, 3.0), nn.LayerNorm(5), nn.Dropout(0.3),
                                                   nn.Linear(5, 3)),
        )
    )  # fmt: skip


def live(make):
    torch.manual_seed(0)
    net = make()
    net(IMAGES)  # statistics of batch norms, and the width of lazy layers
    return net


NETWORKS = {
    "sequential": layers,
    "mlp": lambda: MLP(288, 3, hidden=(7, 5), norm="batch"),
    "convnet": lambda: ConvNet(4, 2, widths=(3, 5)),
    "resnet20": lambda: resnet20(num_classes=4, in_channels=2),
    "vit": lambda: ViT(12, 4, in_channels=2, num_classes=3, dim=8, depth=1, heads=2),
    "unet": lambda: UNet(2, widths=(4, 8)),
    "tied": lambda: nn.Sequential(nn.Flatten(), *[nn.Linear(288, 288)] * 2),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_live_network_is_saved_in_one_line(tmp_path, name, dtype):
    net = live(NETWORKS[name]).to(dtype)
    save_bundle(net, tmp_path / "net", example=IMAGES.to(dtype))
    bundle = load_bundle(tmp_path / "net")
    torch.testing.assert_close(bundle.model.to(dtype)(IMAGES.to(dtype)), net.eval()(IMAGES.to(dtype)))
    assert bundle.manifest.input_shape == (2, 12, 12)
    assert net(IMAGES.to(dtype)).dim() == 4 or len(bundle.manifest.classes) == net(IMAGES.to(dtype)).shape[1]


def test_generators_stay_where_they_are(tmp_path):
    """A network that is built again draws weights, which are overwritten."""
    net = MLP(288, 3, hidden=(5,))
    before = torch.get_rng_state()
    save_bundle(net, tmp_path / "net", example=IMAGES)
    bundle = load_bundle(tmp_path / "net")
    save_bundle(bundle.model, tmp_path / "again", bundle.manifest)
    assert torch.equal(torch.get_rng_state(), before)


def test_copies_know_their_arguments_too(tmp_path):
    net = MLP(288, 3, hidden=(5,))
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        save_bundle(copied, tmp_path / "net", example=IMAGES)
        torch.testing.assert_close(load_bundle(tmp_path / "net").model(IMAGES), net(IMAGES))


class Own(nn.Module):
    def forward(self, x):
        return x


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Wider(MLP):
    pass


def changed():
    net = ConvNet(4, 2, widths=(3, 5))
    return replace_layers(net, nn.ReLU, lambda old: nn.Tanh())


def grown():
    net = MLP(288, 3, hidden=(5,))
    net.append(nn.Linear(3, 2))
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Own, "it is a Own"),
        (lambda: Wider(288, 3), "it is a Wider"),
        (lambda: nn.Sequential(nn.Flatten(), Scaled(288, 2)), "'1' is a Scaled"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Sequential(Own())), "'0' is a Own"),
        (changed, "gives other outputs"),
        (grown, "it was changed"),
    ],
)
def test_what_cannot_be_built_again_is_refused_at_once(tmp_path, make, message):
    with pytest.raises(BundleError, match=f"{message}.*own factory"):
        save_bundle(make(), tmp_path / "net", example=IMAGES)
    assert not (tmp_path / "net").exists()


def test_an_example_is_asked_for(tmp_path):
    with pytest.raises(BundleError, match="expected example=x"):
        save_bundle(MLP(4, 3), tmp_path / "net")


@pytest.mark.parametrize(
    "layers",
    [
        [{"kind": "__import__"}],
        [{"kind": "Module"}],
        [{"kind": "ModuleList"}],
        [{"kind": "Linear", "in_features": "3", "out_features": 2}],
        [{"kind": "Linear", "in_features": 3, "out_features": 2, "device": "cuda"}],
        [{"kind": "Conv2d", "in_channels": 1, "out_channels": 1, "kernel_size": 1, "padding_mode": "os.system('x')"}],
        [{"kind": "ReLU", "name": "a.b"}],
        [{"kind": "ReLU", "name": "a"}, {"kind": "ReLU", "name": "a"}],
        [{"kind": "Sequential", "layers": "ReLU"}],
        [3],
        "ReLU",
        [json.loads('{"kind": "Sequential", "layers": ' * 30 + "[]" + "}" * 30)],
    ],
)
def test_layers_that_are_none_are_refused(layers):
    with pytest.raises((ValueError, BundleError)):
        build("torchfolio.models:Chain", {"layers": layers})
    with pytest.raises(ValueError, match=r"expected|cannot be built"):
        Chain(layers)
