"""Diagrams from expressions: they run, are priced, written out, compared and drawn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from torchfolio.diagrams import check_svg, ncd, op
from torchfolio.diagrams.algebra import SignatureError
from torchfolio.errors import TorchfolioError

SIZES = {"y": 5, "x": 7, "m": 32, "k": 8, "h": 4, "n": 32}


def attention():
    """Softmax attention on queries, keys and values."""
    scores = ncd("y k h, x k h -> y x h") @ op.scale(8**-0.5) @ op.softmax("x")
    return scores * op.identity("x k h") @ ncd("y x h, x k h -> y k h")


def cross_attention():
    torch.manual_seed(0)
    own = {"m": 32, "k": 8, "h": 4}
    query = op.identity("y m") @ op.linear("m -> k h", name="Q", **own)
    context = (
        op.identity("x m")
        @ op.copy()
        @ (op.linear("m -> k h", name="K", **own) * op.linear("m -> k h", name="V", **own))
    )
    return query * context @ attention() @ op.linear("k h -> n", bias=True, name="O", k=8, h=4, n=32)


def tensors(*shapes):
    return [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)]


def test_attention_is_attention():
    q, k, v = tensors((5, 8, 4), (7, 8, 4), (7, 8, 4))
    net = attention()
    assert net.signature() == "y k h, x k h, x k h -> y k h"
    wanted = F.scaled_dot_product_attention(*(t.permute(2, 0, 1) for t in (q, k, v))).permute(1, 2, 0)
    torch.testing.assert_close(net(q, k, v), wanted)
    batched = net >> "b"
    assert batched.signature() == "b y k h, b x k h, b x k h -> b y k h"
    many = tensors((3, 5, 8, 4), (3, 7, 8, 4), (3, 7, 8, 4))
    torch.testing.assert_close(batched(*many), torch.stack([net(*one) for one in zip(*many, strict=True)]))


def test_operations_are_woven_over_what_they_are_not_about():
    (x,) = tensors((2, 3, 4))
    linear = op.linear("b -> c d", b=3, c=5, d=6)
    whole = ncd("a b e -> a b e") @ linear
    assert whole.signature() == "a b e -> a c d e"
    torch.testing.assert_close(whole(x), torch.einsum("abe,bcd->acde", x, linear.weight))
    torch.testing.assert_close((ncd("a b e -> a b e") @ op.softmax("b"))(x), x.softmax(1))
    assert (ncd("a b e -> a b e") @ op.elementwise("tanh")).signature() == "a b e -> a b e"
    torch.testing.assert_close(ncd("a b e -> e a")(x), x.sum(1).T)


def test_own_functions_run_and_are_differentiated():
    def bent(x):
        return x.abs().sqrt()

    (x,) = tensors((2, 3))
    net = op.identity("a b") @ op.elementwise(bent, sign="√") @ op.elementwise(bent)
    torch.testing.assert_close(net(x), bent(bent(x)))
    with pytest.raises(TorchfolioError, match="written out, got f0"):
        net.drawing(a=2, b=3).to_source()
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(bent(bent(leaf)).sum(), leaf)
    (found,), _ = net.backward(a=2, b=3).gradients([x], [torch.ones(2, 3)])
    torch.testing.assert_close(found, wanted)


def test_inner_broadcasting_and_residuals():
    x, b = tensors((2, 3, 4), (4, 2))
    summed = (ncd("a b e -> a b e") * ncd("e a -> e a")) @ op.add()
    assert summed.signature() == "a b e, e a -> a b e"
    torch.testing.assert_close(summed(x, b), x + b.T[:, None])
    residual = (
        ncd("a b -> a b")
        @ op.copy()
        @ (op.linear("b -> c", b=3, c=3) @ ncd("c -> c") * op.identity("b"))
        @ op.multiply()
    )
    assert residual.signature() == "a b -> a c b"


@pytest.mark.parametrize("make", [attention, lambda: attention() >> "b", cross_attention])
def test_source_does_the_same(make):
    net = make()
    sizes = {**SIZES, "b": 2}
    inputs = tensors(*[[sizes[a] for a in axes] for axes in net.inputs])
    space: dict = {}
    exec(net.to_source("f"), space)
    torch.testing.assert_close(
        space["f"](*inputs, **({"weights": net.state_dict()} if net.state_dict() else {})), net(*inputs)
    )
    assert net.signature() in net.to_source()


def residual():
    inner = op.linear("b -> c", b=3, c=3) @ op.elementwise("tanh")
    scaled = ncd("a b -> a b") @ op.copy(3) @ (inner * op.identity("b") * op.softmax("b"))
    return scaled @ (op.multiply() * op.identity("b")) @ op.add() @ ncd("a c b -> c a") @ op.scale(0.5)


def convolutional():
    """Two branches of convolutions, joined along the channels, for frames t of examples b."""
    down = op.conv("c h w -> n p q", kernel=3, stride=2, padding=1, bias=True, c=2, n=4)
    same = op.conv("c h w -> d h w", kernel=(3, 1), padding=(1, 0), c=2, d=2)
    back = op.conv("n p q -> e h w", kernel=4, stride=2, padding=1, groups=2, bias=True, transposed=True, n=4, e=2)
    both = ((op.identity("c h w") @ down @ back) * (op.identity("c h w") @ same)) >> "b t"
    return op.identity("b t c h w") @ op.copy() @ both @ op.concat("e, d -> k") @ op.elementwise("tanh")


@pytest.mark.parametrize("make", [attention, lambda: attention() >> "b", cross_attention, residual, convolutional])
def test_the_backward_pass_is_that_of_autograd(make):
    net = make().double()
    sizes = {residual: {"a": 2, "b": 3, "c": 3}, convolutional: {"b": 2, "t": 3, "c": 2, "h": 6, "w": 8}}.get(
        make, {**SIZES, "b": 2}
    )
    inputs = [t.double().requires_grad_() for t in tensors(*[[sizes[a] for a in axes] for axes in net.inputs])]
    output = net(*inputs)
    cotangent = torch.randn_like(output)
    weights = dict(net.named_parameters())
    wanted = torch.autograd.grad(output, [*inputs, *weights.values()], cotangent)
    found, own = net.backward(**sizes).gradients([t.detach() for t in inputs], [cotangent])
    for got, expected in zip([*found, *(own[k] for k in weights)], wanted, strict=True):
        assert got is not None
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-8)


def test_drawings_of_expressions_are_counted_and_priced():
    net = cross_attention()
    drawing = net.drawing(**SIZES)
    cost = drawing.cost()
    assert cost.total() == 53_632
    assert str(2 * 5 * 7 * 8 * 4) in map(str, cost.to_frame()["flops"])
    found = check_svg(drawing.svg())
    assert found.counts_agree
    assert drawing.svg() == net.drawing(**SIZES).svg()
    assert drawing.signature() == "y m, x m -> y n"
    with pytest.raises(SignatureError, match="no size"):
        net.drawing(y=5)


def test_equality_does_not_see_brackets_but_letters():
    a, b, c = ncd("i j, j k -> i k"), op.softmax("k"), op.elementwise("tanh")
    assert ((a @ b) @ c).equals(a @ (b @ c))
    assert not (a @ b @ c).equals(a @ c @ b)
    swapped = ncd("y k h, x k h -> x y h")
    assert not ncd("y k h, x k h -> y x h").equals(swapped)
    sizes = {"y": 5, "x": 5, "k": 8, "h": 4}
    assert swapped.drawing(**sizes).svg() != ncd("y k h, x k h -> y x h").drawing(**sizes).svg()


def test_equality_does_not_see_the_order_of_independent_operations():
    f, g = op.elementwise("tanh"), op.elementwise("exp")
    two = op.identity("a b") * op.identity("c")
    assert (two @ (f * op.identity("c")) @ (op.identity("a b") * g)).equals(two @ (f * g))
    assert not (two @ (f * g)).equals(two @ (g * f))
    assert (ncd("i j -> i j") @ f).equals(ncd("x y -> x y") @ f)
    twice = op.identity("a") @ op.copy()
    assert (twice @ (f * g) @ op.add()).equals(twice @ (g * f) @ op.add())
    shared, own = op.linear("a -> b", a=3, b=3), op.linear("a -> b", a=3, b=3)
    one, two = (twice @ (shared * other) @ op.add() for other in (shared, own))
    assert one.equals(one)
    assert not one.equals(two)
    assert one.drawing(a=3).equals(one)


def test_convolutions_are_those_of_torch():
    torch.manual_seed(0)
    x = torch.rand(5, 2, 7, 8)
    down = op.conv("c h w -> n p q", kernel=3, stride=2, padding=1, dilation=2, bias=True, c=2, n=4) >> "b"
    wanted = F.conv2d(x, down.inner.weight, down.inner.bias, 2, 1, 2)
    torch.testing.assert_close(down(x), wanted)
    assert down.signature() == "b c h w -> b n p q"
    last = ncd("b h w c -> b h w c") @ down.inner  # channels last, as they come
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)), wanted)
    torch.testing.assert_close(down.inner(x[0]), wanted[0])
    drawing = down.drawing(b=5, h=7, w=8)
    assert drawing.signature() == "b c h w -> b n p q"
    assert drawing.cost().total() == 2 * 9 * 2 * wanted.numel()
    assert check_svg(drawing.svg()).counts_agree


def test_weights_are_trained_saved_and_copied():
    net = cross_attention()
    y, x = tensors((5, 32), (7, 32))
    net(y, x).square().sum().backward()
    assert len(list(net.parameters())) == 5
    assert all(p.grad is not None for p in net.parameters())
    again = cross_attention()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(y, x), copy.deepcopy(net)(y, x))
    assert net.double()(y.double(), x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ncd("y k"), "expected a signature"),
        (lambda: ncd("y 2 -> y"), "got '2'"),
        (lambda: ncd("y -> x"), "new axis x"),
        (lambda: op.linear("m -> k", m=3), "size of k"),
        (lambda: op.linear("m, n -> k", m=3, n=2, k=2), "a linear map of one tensor"),
        (lambda: op.conv("c h -> n p", kernel=3, c=2, n=3).drawing(h=5, p=4), "the axis p has the sizes 4 and 3"),
        (lambda: op.identity("a") @ (op.identity("a") * op.identity("b")), "takes 2 tensors, got 1"),
        (lambda: op.elementwise(torch.nn.functional.gelu).to_source(), "only functions of torch can be written out"),
        (lambda: op.linear("m -> m k", m=3, k=2), "new axes"),
        (lambda: op.elementwise("no_such"), "no_such"),
        (lambda: op.copy(1), "two copies"),
        (lambda: ncd("a b -> a b") @ op.softmax("x"), r"a b -> a b cannot be followed by x -> x.*no x"),
        (lambda: ncd("a b -> a b") @ op.add(), "takes 2 tensors, got 1"),
        (lambda: ncd("a b -> a b")(torch.zeros(2)), "axes a b"),
        (lambda: ncd("a b, b -> a")(torch.zeros(2, 3), torch.zeros(4)), "sizes 3 and 4"),
        (lambda: ncd("a b -> a b")(), "expected 1 tensors"),
        (lambda: op.linear("m -> k", m=2, k=3) >> "k", "woven over its own axis k"),
        (lambda: op.conv("c h -> n h", kernel=3, c=2, n=3), "h changes its length"),
        (lambda: op.conv("c h -> n p", kernel=3, n=3), "needs the size of c"),
        (lambda: op.conv("c h -> n p", kernel=3, groups=2, c=2, n=3), "2 groups do not divide 2 and 3"),
        (lambda: op.conv("c -> n", kernel=3, c=2, n=3), "one to three further axes"),
        (lambda: op.conv("c h -> n p", kernel=9, c=2, n=3).drawing(h=5), "a window of 9 does not fit"),
        (lambda: op.concat("a -> b"), "such as 'x, y -> z'"),
        (lambda: (ncd("a c -> a c") * ncd("b d -> b d")) @ op.concat("a, b -> e"), "differ in a, b -> e alone"),
        (
            lambda: (op.identity("a") * op.identity("b") @ op.concat("a, b -> e")).drawing(a=2, b=3, e=4),
            "sizes 4 and 5",
        ),
    ],
)
def test_what_does_not_fit_is_told(make, message):
    with pytest.raises(SignatureError, match=message):
        make()
