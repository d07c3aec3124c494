"""Reference networks: their published sizes, shapes, and that they behave as modules should."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from torchfolio.models import (
    MLP,
    VGG,
    BasicBlock,
    ConvNet,
    ResNetCIFAR,
    Transformer,
    UNet,
    ViT,
    build,
    initialize,
    names,
    parameter_count,
    spec,
)


@pytest.mark.parametrize(
    ("depth", "exact", "published"),
    [(20, 269722, 0.27), (32, 464154, 0.46), (44, 658586, 0.66), (56, 853018, 0.85), (110, 1727962, 1.7)],
)
def test_residual_networks_have_their_published_sizes(depth, exact, published):
    count = parameter_count(ResNetCIFAR(depth))
    assert count == exact
    assert count / 1e6 == pytest.approx(published, rel=0.02)


def test_projections_add_their_weights():
    extra = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert parameter_count(ResNetCIFAR(20, shortcut="B")) - parameter_count(ResNetCIFAR(20)) == extra


def test_vgg16_has_its_thirteen_convolutions():
    convolutions = [m for m in VGG("vgg16").modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 13
    assert sum(m.weight.numel() for m in convolutions) == 14_710_464


NETS = {
    "resnet": (lambda: ResNetCIFAR(8, widths=(4, 6, 8), num_classes=5, in_channels=1), (1, 12, 12), 5),
    "mlp": (lambda: MLP(12, 5, hidden=(7, 6), norm="batch", dropout=0.1), (12,), 5),
    "mlp on images": (lambda: MLP(12, 5, hidden=(), norm="layer"), (3, 2, 2), 5),
    "convnet": (lambda: ConvNet(5, 1, widths=(4, 6)), (1, 9, 9), 5),
    "vgg": (lambda: VGG("vgg11", 5, width=0.05), (3, 16, 16), 5),
    "vit": (lambda: ViT(8, 4, 5, 1, dim=8, depth=2, heads=2), (1, 8, 8), 5),
}


@pytest.mark.parametrize("name", NETS)
def test_networks_behave(name):
    factory, shape, classes = NETS[name]
    torch.manual_seed(0)
    net = factory()
    x = torch.randn(4, *shape)
    assert net(x).shape == (4, classes)
    assert isinstance(net, nn.Sequential)
    assert list(dict(net.named_children()))[-1] == "head"
    net.eval()
    again = factory().eval()
    again.load_state_dict(net.state_dict())
    for twin in (again, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))
    assert net.double()(x.double()).dtype == torch.float64


def test_compiles():
    net = ResNetCIFAR(8, widths=(4, 6, 8)).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))


def test_output_of_a_block_may_be_detached_and_read_again():
    block = BasicBlock(2, 2)
    x = torch.randn(1, 2, 4, 4)
    h = block(x)
    version = h._version
    BasicBlock(2, 2)(h.detach())
    assert h._version == version


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_is_causal_and_ignores_padding(norm_first):
    torch.manual_seed(0)
    net = Transformer(11, 13, dim=8, heads=2, layers=2, norm_first=norm_first).eval()
    source, target = torch.randint(1, 11, (2, 5)), torch.randint(1, 13, (2, 6))
    logits = net(source, target)
    assert logits.shape == (2, 6, 13)
    later = target.clone()
    later[:, 4:] = 1
    torch.testing.assert_close(net(source, later)[:, :4], logits[:, :4])
    padded = torch.cat([source, torch.zeros(2, 3, dtype=torch.long)], 1)
    torch.testing.assert_close(net(padded, target), logits, rtol=1e-4, atol=1e-5)
    assert net.greedy(source, bos=1, eos=2, max_length=7).shape[1] <= 7
    with pytest.raises(ValueError, match="at most 512"):
        net(torch.ones(1, 600, dtype=torch.long), target[:1])


def test_unet_keeps_the_image_and_takes_a_time():
    x = torch.randn(2, 3, 8, 8)
    assert UNet(3, 1, widths=(4, 8))(x).shape == (2, 1, 8, 8)
    timed = UNet(widths=(4, 8), timed=True)
    assert not torch.equal(timed(x, torch.zeros(2)), timed(x, torch.full((2,), 50.0)))
    with pytest.raises(ValueError, match="takes a time"):
        timed(x)
    with pytest.raises(ValueError, match="multiples of 2"):
        timed(torch.randn(1, 3, 7, 8), torch.zeros(1))


def test_networks_by_name():
    assert parameter_count(build("resnet20", num_classes=10)) == 269722
    assert spec("vit") == "torchfolio.models:ViT"
    assert "vgg16" in names()
    with pytest.raises(ValueError, match="did you mean resnet"):
        build("resnet21")
    with pytest.raises(ValueError, match="clases"):
        build("resnet20", clases=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNetCIFAR(21), "6n"),
        (lambda: ResNetCIFAR(20, widths=(1, 2)), "three widths"),
        (lambda: MLP(2, 2, norm="group"), "norm"),
        (lambda: MLP(2, 2, activation="relo"), "activation"),
        (lambda: VGG("vgg12"), "plan"),
        (lambda: ViT(10, 4), "multiple"),
        (lambda: initialize(nn.Linear(1, 1), "best"), "scheme"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("scheme", "variance"),
    [("he", 2 / 300), ("he_fan_out", 2 / 200), ("xavier", 2 / 500), ("lecun", 1 / 300), ("he_uniform", 2 / 300)],
)
def test_initialisations_have_their_variance(scheme, variance):
    layer = nn.Linear(300, 200)
    initialize(layer, scheme, torch.Generator().manual_seed(0))
    assert layer.weight.var().item() == pytest.approx(variance, rel=0.03)
    assert not layer.bias.any()


def test_orthogonal_rows():
    layer = nn.Linear(30, 20)
    initialize(layer, "orthogonal")
    torch.testing.assert_close(layer.weight @ layer.weight.T, 2 * torch.eye(20), atol=1e-5, rtol=0)
