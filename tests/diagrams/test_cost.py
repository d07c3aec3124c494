"""Time and memory read off drawings, against torch's counter."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import nn

from torchfolio.diagrams import draw, ncd, op
from torchfolio.measure import count_flops
from torchfolio.models import MLP, ConvNet, ResNetCIFAR, UNet, ViT


class CrossAttention(nn.Module):
    def __init__(self, m=32, k=8, h=4):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(m, m) for _ in range(4))
        self.shape = (k, h)

    def forward(self, y, x):
        q, k, v = (layer(t).unflatten(-1, self.shape) for layer, t in ((self.q, y), (self.k, x), (self.v, x)))
        score = torch.einsum("ykh,xkh->yxh", q, k) / self.shape[0] ** 0.5
        return self.o(torch.einsum("yxh,xkh->ykh", score.softmax(1), v).flatten(-2))


def symbol(name):
    return sympy.Symbol(name, positive=True, integer=True)


def test_cross_attention_costs_what_the_counter_says():
    net, args = CrossAttention(), (torch.rand(5, 32), torch.rand(7, 32))
    cost = draw(net, args, names=["y m", "x n"]).cost()
    assert cost.total() == 53_632 == count_flops(net, *args)
    y, x = symbol("y"), symbol("x")
    crossed = [term for term in cost.polynomial().as_ordered_terms() if {y, x} <= term.free_symbols]
    assert crossed
    assert all(len(term.free_symbols) == 4 for term in crossed)  # y x k h
    assert cost.total(y=10) == count_flops(net, torch.rand(10, 32), args[1])
    with pytest.raises(ValueError, match="no axis 'q'"):
        cost.total(q=3)


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (MLP(12, 3, (8, 6)), torch.rand(4, 12)),
        (ConvNet(5, 3, (4, 6)), torch.rand(2, 3, 8, 8)),
        (ResNetCIFAR(8, (4, 6, 8)).eval(), torch.rand(2, 3, 8, 8)),
        (ViT(8, 4, 4, dim=16, depth=1, heads=2).eval(), torch.rand(2, 3, 8, 8)),
        (
            nn.Sequential(
                nn.Conv2d(4, 8, 3, 2, 1, groups=2),
                nn.ConvTranspose2d(8, 6, 2, 2),
                nn.Conv2d(6, 6, 3, dilation=2, groups=6),
            ),
            torch.rand(2, 4, 10, 10),
        ),
    ],
    ids=["mlp", "conv", "resnet", "vit", "convolutions"],
)
def test_networks_cost_what_the_counter_says(net, x):
    cost = draw(net, x, level="full").cost()
    assert cost.total() == count_flops(net, x)
    assert len(cost.to_frame()) == len(cost.flops)
    assert cost.depth > 0


def test_memory_of_a_chain():
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    cost = draw(net, torch.rand(4, 6), names=["b m"]).cost()
    assert [cost._value(m, {}) for m in cost.memory] == [24, 40, 40, 12]
    assert cost.peak() == 40
    assert cost.peak(b=8) == 80


def test_an_unet_is_read_too():
    net = UNet(1, widths=(4, 8))
    args = (torch.rand(2, 1, 8, 8),)
    assert draw(net.eval(), args, level="full").cost().total() == count_flops(net, *args)


def test_attention_without_softmax_is_linear_in_the_other_order():
    both = (ncd("y k, x k -> y x") @ op.scale(0.5)) * op.identity("x l") @ ncd("y x, x l -> y l")
    (found,) = both.drawing(y=50, x=60, k=3, l=4).contraction_orders()
    y, x, k, l = sympy.symbols("y x k l", positive=True, integer=True)
    assert sympy.expand(found.now - 2 * (y * x * k + y * x * l)) == 0
    assert sympy.expand(found.best - 2 * (x * k * l + y * k * l)) == 0
    assert found.signature == "y k, x k, x l -> y l"
    assert found.order == ("k x, l x -> k l", "k y, k l -> l y")
    assert found.saving == pytest.approx(2 * 50 * 60 * 7 / (2 * 12 * 110))
    softened = (ncd("y k, x k -> y x") @ op.softmax("x")) * op.identity("x l") @ ncd("y x, x l -> y l")
    assert not softened.drawing(y=5, x=6, k=3, l=4).contraction_orders()


def test_what_is_saved_for_the_backward_pass():
    x = torch.rand(32, 64)
    saved = draw(nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 10)), x, names=["b m"]).saved_for_backward()
    assert int(saved.subs({s: {"b": 32, "m": 64}.get(str(s), 96) for s in saved.free_symbols})) == 32 * (64 + 96 + 96)
    assert draw(nn.Linear(3, 3), torch.rand(2, 3)).saved_for_backward() is not None


class Applied(nn.Module):
    """A function of a linear layer's parameters and the inputs."""

    def __init__(self, function):
        super().__init__()
        self.function, self.layer = function, nn.Linear(6, 6)

    def forward(self, *inputs):
        return self.function(self.layer, *inputs)


OTHERS = {
    "einsum with a weight": (Applied(lambda m, x: torch.einsum("bti,io->bto", x, m.weight)), [(3, 4, 6)]),
    "addmm": (Applied(lambda m, x: torch.addmm(m.bias, x, m.weight)), [(4, 6)]),
    "baddbmm": (Applied(lambda m, x: torch.baddbmm(x[:, :, :4], x, x.mT)), [(3, 4, 6)]),
    "tensordot": (Applied(lambda m, x: torch.tensordot(x, m.weight, ([2], [0]))), [(3, 4, 6)]),
    "bilinear": (nn.Bilinear(6, 5, 4), [(3, 6), (3, 5)]),
    "gru": (nn.GRU(6, 8, batch_first=True), [(3, 4, 6)]),
    "tokens into a gru": (
        nn.Sequential(nn.Embedding(9, 6), nn.GRU(6, 8, batch_first=True)),
        [torch.tensor([[1, 2, 8]])],
    ),
    "lstm": (nn.LSTM(6, 8), [(3, 4, 6)]),
    "a matrix and a vector": (Applied(lambda m, x: x @ m.bias), [(4, 6)]),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:drawn as plain boxes")
def test_operations_without_axes_of_their_own_are_counted_by_torch(name):
    module, shapes = OTHERS[name]
    inputs = tuple(s if isinstance(s, torch.Tensor) else torch.randn(s) for s in shapes)
    cost = draw(module, inputs).cost()
    assert cost.total() == count_flops(module, *inputs) > 0
    assert not cost.uncounted


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.filterwarnings("ignore:drawn as plain boxes")
def test_a_language_model_costs_what_its_products_do(attention):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": 40,
        "n_positions": 8,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(attn_implementation=attention, **sizes)).eval()
    tokens = torch.arange(12).view(2, 6)
    cost = draw(Applied(lambda m, x: net(x, use_cache=False).logits).eval(), tokens).cost()
    rows, pairs = 2 * 6, 2 * 6 * 6  # of tokens, and of two tokens of one text
    assert cost.total() == 2 * (2 * (rows * 12 * 16 * 16 + 2 * pairs * 16) + rows * 16 * 40)
    assert not cost.uncounted


@pytest.mark.filterwarnings("ignore:drawn as plain boxes")
def test_counts_of_the_example_are_named_at_other_sizes():
    cost = draw(nn.GRU(6, 8, batch_first=True), torch.randn(3, 4, 6)).cost()
    assert cost.fixed == ("gru",)
    with pytest.warns(UserWarning, match="counted at the sizes of the example: gru"):
        cost.total(b=5)


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (lambda m, x: x.movedim(0, 1), "b x m -> x b m"),
        (lambda m, x: x.swapaxes(0, 2), "b x m -> m x b"),
        (lambda m, x: x.mT, "b x m -> b m x"),
        (lambda m, x: torch.stack([x, x.sin()]), "b x m -> a b x m"),
        (lambda m, x: torch.stack([x, x.sin()], -1), "b x m -> b x m a"),
        (lambda m, x: x.std(-1), "b x m -> b x"),
        (lambda m, x: x.max(1)[0], "b x m -> b m"),
        (lambda m, x: x.logsumexp(0), "b x m -> x m"),
        (lambda m, x: torch.maximum(x, x.sin()), "b x m -> b x m"),
    ],
)
@pytest.mark.filterwarnings("ignore:drawn as plain boxes")
def test_axes_keep_their_names(function, signature):
    module, x = Applied(function), torch.randn(3, 4, 6)
    drawing = draw(module, x)
    assert drawing.signature() == signature
    torch.testing.assert_close(drawing.to_module()(x), module(x))
