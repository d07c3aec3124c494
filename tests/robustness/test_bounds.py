"""Bounds hold, tighten as they should, and verifiers agree with the exact answer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from torchfolio.models import BasicBlock, ResNetCIFAR
from torchfolio.robustness.activation_lines import _sigmoidal_lines
from torchfolio.robustness.attacks import pgd
from torchfolio.robustness.bounds import Bounds, ElementwiseAffine, Residual, crown, ibp
from torchfolio.robustness.properties import Box, Property, Verifier, classification
from torchfolio.robustness.relu_split import ReluSplit
from torchfolio.robustness.verifiers import Crown, CrownSplit, Interval, milp_verify


def small(activation=nn.ReLU, seed=0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 10), activation(), nn.Linear(10, 8), activation(), nn.Linear(8, classes)).double()


def convolutional(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.Sequential(nn.AvgPool2d(2, padding=1), nn.Conv2d(4, 5, 2, groups=1, bias=False), nn.Tanh()),
        nn.Flatten(), nn.Identity(), nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Linear(6, 3),
    ).double()  # fmt: skip
    with torch.no_grad():
        for norm in (net[1], net[8]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.normal_()
    return net.eval()


def pooled(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.MaxPool2d(2, 1, 1), nn.Tanh(),
        nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 3),
    ).double()  # fmt: skip


def residual(seed=0):
    """Paths within paths: a block that changes the shape, one around another, and a last one without an activation."""
    torch.manual_seed(seed)
    block = BasicBlock(2, 4, stride=2)
    inner = Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()))
    outer = Residual(
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), inner, nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    )
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), Residual(nn.Linear(3, 3)))
    net = nn.Sequential(block, outer, head).double()
    with torch.no_grad():
        for norm in (block.bn1, block.bn2):
            norm.running_mean.normal_(std=0.2)
            norm.running_var.uniform_(0.5, 2)
    return net.eval()


NETS = {
    "pooled": (pooled, (2, 6, 6)),
    "residual": (residual, (2, 6, 6)),
    "relu": (lambda seed: small(nn.ReLU, seed), (4,)),
    "tanh": (lambda seed: small(nn.Tanh, seed), (4,)),
    "sigmoid": (lambda seed: small(nn.Sigmoid, seed), (4,)),
    "conv": (convolutional, (2, 6, 6)),
    "scaled": (
        lambda seed: nn.Sequential(
            ElementwiseAffine(-2 * torch.ones(4).double(), torch.ones(4).double()), small(seed=seed)
        ),
        (4,),
    ),
}


def inputs(shape, n=3, seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("eps", [0.01, 0.1, 0.6])
def test_no_input_falls_below_the_bounds(name, eps):
    make, shape = NETS[name]
    for seed in range(3):
        net, x = make(seed), inputs(shape, seed=seed)
        box, prop = Box.ball(x, eps, clip=None), classification(0, 3)
        low, high = ibp(net, box)
        bounds = {
            "ibp": ibp(net, box, prop), "crown": crown(net, box, prop), "fast": crown(net, box, prop, intermediate="ibp"),
            "alpha": crown(net, box, prop, alpha_steps=5),
        }  # fmt: skip
        u = 2 * torch.rand(400, *x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1
        u[:100] = u[:100].sign()
        points = (box.center + box.radius * u).flatten(0, 1)
        attack = pgd(net, x, torch.zeros(3, dtype=torch.long), eps=eps, alpha=eps / 4, steps=10)
        points = torch.cat([points, attack.x_adv])
        outputs = net(points).view(-1, 3, 3)
        assert (outputs >= low - 1e-9).all()
        assert (outputs <= high + 1e-9).all()
        worst = prop.slack(outputs.flatten(0, 1)).view(-1, 3, 2).amin(0)
        for found in bounds.values():
            assert isinstance(found, Bounds)
            assert (found.lower <= worst + 1e-9).all()


@pytest.mark.parametrize("name", NETS)
def test_a_point_is_bounded_by_its_output(name):
    make, shape = NETS[name]
    net, x = make(0), inputs(shape)
    prop = classification(1, 3)
    wanted = prop.slack(net(x))
    for found in (ibp(net, Box(x, x), prop), crown(net, Box(x, x), prop)):
        torch.testing.assert_close(found.lower, wanted, atol=1e-8, rtol=0)  # pyright: ignore


@pytest.mark.parametrize("name", NETS)
def test_tighter_methods_are_tighter(name):
    make, shape = NETS[name]
    prop = classification(0, 3)
    for seed in range(3):
        net, box = make(seed), Box.ball(inputs(shape, seed=seed), 0.1, clip=None)
        cheap, tight = ibp(net, box, prop), crown(net, box, prop)
        optimised = crown(net, box, prop, alpha_steps=10)
        assert (optimised.lower >= tight.lower - 1e-9).all()
        assert (tight.lower >= cheap.lower).all()  # pyright: ignore
        wider = ibp(net, Box.ball(box.center, 0.2, clip=None), prop)
        assert (wider.lower <= cheap.lower + 1e-9).all()  # pyright: ignore


@pytest.mark.parametrize("kind", ["tanh", "sigmoid"])
def test_lines_enclose_smooth_activations(kind):
    ends = torch.tensor([-6.0, -2.0, -0.5, -1e-3, 0.0, 1e-8, 1e-3, 0.5, 2.0, 6.0], dtype=torch.float64)
    low, high = (t.flatten() for t in torch.meshgrid(ends, ends, indexing="ij"))
    low, high = low[low <= high], high[low <= high]
    a, c, b, d = _sigmoidal_lines(kind, low, high)
    z = low + torch.linspace(0, 1, 201, dtype=torch.float64)[:, None] * (high - low)
    f = getattr(torch, kind)(z)
    assert (a * z + c <= f + 1e-12).all()
    assert (b * z + d >= f - 1e-12).all()
    # Not needlessly far: slopes are those of the function, so the enclosure is no wider than the interval.
    gap = ((b * z + d) - (a * z + c)).amax(0)
    assert (gap <= high - low + 1e-9).all()


@pytest.mark.parametrize("kind", ["tanh", "sigmoid"])
def test_tangents_touch_the_function(kind):
    """The line from an end touches where bisection finds it, on intervals from a thousandth to a hundred wide; beyond that
    point it is the tangent in the middle."""
    f = getattr(torch, kind)
    ends = torch.logspace(-3, 2, 26, dtype=torch.float64)
    low, high = (t.flatten() for t in torch.meshgrid(-ends, ends, indexing="ij"))

    def derivative(z):
        return 1 - f(z) ** 2 if kind == "tanh" else f(z) * (1 - f(z))

    _, _, slope, cut = _sigmoidal_lines(kind, low, high)
    near, far = torch.zeros_like(low), high.clone()
    for _ in range(80):
        p = (near + far) / 2
        beyond = derivative(p) * (p - low) < f(p) - f(low)
        near, far = torch.where(beyond, near, p), torch.where(beyond, p, far)
    chord = (f(high) - f(low)) / (high - low)
    best = torch.where(derivative(high) * (high - low) < f(high) - f(low), derivative(near), chord)
    middle = (low + high) / 2
    for z in (low, high):
        tangent = f(middle) + derivative(middle) * (z - middle)
        line = torch.where(middle > near, tangent, f(low) + best * (z - low))
        torch.testing.assert_close(slope * z + cut, line, atol=1e-9, rtol=1e-9)


POOLS = [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2}, {"kernel_size": (1, 3), "stride": 1, "padding": (0, 1)},
         {"kernel_size": 2, "stride": 1, "dilation": 2, "padding": 1}]  # fmt: skip


@pytest.mark.parametrize("settings", POOLS)
def test_max_pools_lie_between_their_lines(settings):
    layer = nn.MaxPool2d(**settings)
    low = torch.randn(3, 2, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    high = low + 0.8 * torch.rand(low.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    box, outputs = Box(low, high), layer(low).flatten(1).shape[1]
    net = nn.Sequential(layer, nn.Flatten())
    C = torch.cat([torch.eye(outputs), -torch.eye(outputs), torch.randn(5, outputs)]).double()
    found = crown(net, box, Property.rows(C))
    # Each output by itself is bounded exactly, as the pool is monotone.
    exact = torch.cat([layer(low).flatten(1), -layer(high).flatten(1)], 1)
    torch.testing.assert_close(found.lower[:, : 2 * outputs], exact)
    u = torch.rand(300, *low.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).round(decimals=1)
    values = net((low + u * (high - low)).flatten(0, 1)).view(300, 3, -1) @ C.T
    assert (found.lower <= values + 1e-9).all()
    # The lines themselves, not what intervals cut: the input of the largest lower bound, exact where none exceeds it.
    points = (low + u * (high - low)).flatten(2)
    linear = torch.einsum("brd,nbd->nbr", found.A.flatten(2), points)
    one = crown(nn.Sequential(layer, nn.Flatten()), Box(low, low), Property.rows(C))
    torch.testing.assert_close(torch.einsum("brd,bd->br", one.A.flatten(2), low.flatten(1)), net(low) @ C.T)
    assert (linear[..., :outputs] <= values[..., :outputs] + 1e-9).all()


def test_max_pools_that_are_not_known_are_refused():
    box = Box.ball(inputs((2, 6, 6)), 0.1)
    with pytest.raises(TypeError, match="ceil_mode"):
        ibp(nn.Sequential(nn.MaxPool2d(4, ceil_mode=True)), box)
    with pytest.raises(TypeError, match="ReLUs"):
        milp_verify(pooled(), Box.ball(inputs((2, 6, 6), 1), 0.1), classification(0, 3))
    around = nn.Sequential(nn.MaxPool2d((1, 2), padding=(0, 1), dilation=(1, 4)))
    for sides, past in (((3, 3), True), ((3, 4), False), ((3, 5), False)):
        box = Box.ball(inputs((1, *sides), 1), 0.1)
        assert bool(around(box.center).isinf().any()) == past
        if past:
            with pytest.raises(TypeError, match="nothing of images of 3x3 but their padding"):
                ibp(around, box)
        else:
            assert ibp(around, box)[0].isfinite().all()


def test_sums_of_linear_paths_are_one_layer():
    net = nn.Sequential(
        nn.Linear(4, 4), Residual(nn.Linear(4, 4), nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 3)
    ).double()
    sum_ = copy.deepcopy(net[1].body)
    with torch.no_grad():
        sum_.weight += net[1].shortcut.weight
        sum_.bias += net[1].shortcut.bias
    box, prop = Box.ball(inputs((4,)), 0.3, clip=None), classification(0, 3)
    whole = crown(nn.Sequential(net[0], sum_, *net[2:]), box, prop)
    found = crown(net, box, prop)
    torch.testing.assert_close(found.lower, whole.lower)
    torch.testing.assert_close(found.A, whole.A)


@pytest.mark.parametrize("seed", range(5))
def test_a_path_around_a_relu_is_one_more_stable_unit(seed):
    """On inputs of one sign the identity may pass through a ReLU, in a chain of twice the width."""
    torch.manual_seed(seed)
    first, second, last = nn.Linear(4, 5).double(), nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
    net = nn.Sequential(Residual(nn.Sequential(first, nn.ReLU(), second)), nn.ReLU(), last)
    wide, narrow = nn.Linear(4, 9).double(), nn.Linear(9, 4).double()
    eye = torch.eye(4, dtype=torch.float64)
    with torch.no_grad():
        wide.weight.copy_(torch.cat([first.weight, eye]))
        wide.bias.copy_(torch.cat([first.bias, 0 * first.bias[:4]]))
        narrow.weight.copy_(torch.cat([second.weight, eye], 1))
        narrow.bias.copy_(second.bias)
    chain = nn.Sequential(wide, nn.ReLU(), narrow, nn.ReLU(), last)
    box, prop = Box.ball(inputs((4,), seed=seed), 0.2), classification(1, 3)
    torch.testing.assert_close(net(box.center), chain(box.center))
    for settings in ({}, {"intermediate": "ibp"}, {"rounding": 1e-12}):
        found, wanted = crown(net, box, prop, **settings), crown(chain, box, prop, **settings)
        torch.testing.assert_close(found.lower, wanted.lower, atol=1e-8, rtol=0)
        torch.testing.assert_close(found.A, wanted.A, atol=1e-6, rtol=0)
    verdict = CrownSplit(max_boxes=2000).decide(net, box[:1], prop, 20)
    assert verdict.status in (milp_verify(chain, box[:1], prop).status, "unknown")


def test_a_residual_network_is_bounded_and_paths_of_two_shapes_are_refused():
    torch.manual_seed(0)
    net = ResNetCIFAR(8, (2, 3, 4), num_classes=3, in_channels=1, shortcut="B").double().eval()
    x = inputs((1, 8, 8), 2)
    box = Box.ball(x, 0.01)
    found = crown(net, box, classification(0, 3), intermediate="ibp")
    points = box.lower + (box.upper - box.lower) * torch.rand(200, *x.shape, dtype=x.dtype).round()
    slack = classification(0, 3).slack(net(points.flatten(0, 1))).view(200, 2, -1)
    assert (found.lower <= slack + 1e-9).all()
    assert (found.lower >= slack.amin(0) - 2).all()
    with pytest.raises(ValueError, match="paths of one shape"):
        ibp(nn.Sequential(Residual(nn.Linear(4, 3))).double(), Box.ball(inputs((4,)), 0.1))


def test_crown_verifies_what_intervals_do():
    """Linear bounds alone are looser than intervals on some networks."""
    cut = 0
    for seed in range(60):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).double()
        box, prop = Box.ball(inputs((3,), seed=seed), 0.3, clip=None), classification(0, 3)
        found, cheap = crown(net, box, prop).lower, ibp(net, box, prop).lower  # pyright: ignore
        assert (found >= cheap).all()
        cut += int((found == cheap).any())
    assert cut > 0


def test_intervals_are_differentiable():
    net, box = small(), Box.ball(inputs((4,)), 0.1)
    found = ibp(net, box, classification(0, 3))
    found.lower.sum().backward()  # pyright: ignore
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters() if p.dim() > 1)


def test_crown_is_exact_on_a_linear_network():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    box, prop = Box.ball(inputs((4,)), 0.2, clip=None), classification(2, 3)
    W, b = prop.C @ net[1].weight, prop.C @ net[1].bias
    wanted = box.center @ W.T + b - 0.2 * W.abs().sum(1)
    torch.testing.assert_close(crown(net, box, prop).lower, wanted)
    torch.testing.assert_close(ibp(net, box, prop).lower, wanted)  # pyright: ignore


def instances():
    for seed in range(12):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
        x = inputs((4,), 1, seed)
        label = int(net(x).argmax())
        yield net, Box.ball(x, (0.1, 0.3, 0.6)[seed % 3], clip=None), classification(label, 2)


def test_splitting_agrees_with_the_exact_answer():
    statuses = set()
    for net, box, prop in instances():
        exact, split = milp_verify(net, box, prop), CrownSplit().decide(net, box, prop, timeout=20)
        assert exact.status == split.status != "unknown"
        statuses.add(exact.status)
        for verdict in (exact, split):
            if verdict.status == "falsified":
                assert verdict.witness is not None
                assert box.contains(verdict.witness[None]).all()
                assert prop.violated(net(verdict.witness[None])).all()
        for verifier in (Interval(), Crown(), Crown(alpha_steps=10)):
            assert verifier.decide(net, box, prop).status in (exact.status, "unknown")
    assert statuses == {"verified", "falsified"}


def test_splitting_without_an_attack_still_finds_witnesses():
    found = [CrownSplit(attack_steps=0, batch=4).decide(*instance, timeout=20) for instance in instances()]
    wanted = [CrownSplit().decide(*instance, timeout=20) for instance in instances()]
    assert [v.status for v in found] == [v.status for v in wanted]
    assert CrownSplit(attack_steps=0, max_boxes=0).decide(*next(instances())).status == "unknown"


def test_groups_are_violated_together():
    net = nn.Sequential(nn.Linear(1, 2, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    box = Box(torch.tensor([[-1.0]]).double(), torch.tensor([[1.0]]).double())
    C, t = torch.eye(2).double(), torch.tensor([-0.5, -0.5]).double()
    # y_0 <= -0.5 and y_1 <= -0.5 cannot be; either alone can.
    together, apart = Property(C, t, torch.tensor([0, 0])), Property.rows(C, t)
    assert CrownSplit().decide(net, box, together).status == "verified"
    assert milp_verify(net, box, together).status == "verified"
    assert CrownSplit().decide(net, box, apart).status == "falsified"
    assert milp_verify(net, box, apart).status == "falsified"


class Shrinking(CrownSplit):
    def shrink(self, box):
        return Box(box.center, box.center)


def test_verifiers_of_classifiers_and_their_hooks():
    net = small().float()
    x = inputs((4,), 1)[0].float()
    label = int(net(x[None]).argmax())
    for verifier in (Interval(), Crown(), CrownSplit(), CrownSplit(dtype=torch.float32)):
        assert isinstance(verifier, Verifier)
        assert verifier.verify(net, x, x, label).status == "verified"
        assert verifier.verify(net, x, x, (label + 1) % 3).status == "falsified"
    wide = CrownSplit().verify(net, x - 5, x + 5, label, timeout=10)
    assert wide.status == "falsified"
    assert Shrinking().verify(net, x - 5, x + 5, label).status == "verified"
    assert net[0].weight.dtype == torch.float32


def test_nothing_is_verified_on_nan():
    net = small()
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    box = Box.ball(inputs((4,), 1), 0.01)
    for verifier in (Interval(), Crown(), CrownSplit(max_boxes=4)):
        with pytest.raises(ValueError, match=r"NaN or infinity in 0\.weight"):
            verifier.decide(net, box, classification(0, 3), timeout=1)


def tied(seed, gap):
    """A network of large sums that violates its property at one input by about `gap`."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(50, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 2)).double()
    x = (10 * torch.rand(1, 50)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_((8 * p).float())
        z = net(x)
        net[4].bias[0] += z[0, 1] - z[0, 0] - gap
        net[4].bias.copy_(net[4].bias.float())
    return net, x


@pytest.mark.parametrize("gap", [1e-3, 1e-4, 1e-5])
def test_rounding_in_float32_verifies_nothing_false(gap):
    for net, x in (tied(seed, gap) for seed in range(30)):
        false = net(x)[0, 0] <= net(x)[0, 1]
        for kind in (Interval, Crown):
            status = kind(dtype=torch.float32).decide(net, Box(x, x), classification(0, 2)).status
            assert not (false and status == "verified")


def test_rounding_lowers_bounds_by_its_share():
    net, box, prop = small(), Box.ball(inputs((4,)), 0.1), classification(0, 3)
    for bound in (ibp, crown):
        plain, safe = bound(net, box, prop).lower, bound(net, box, prop, rounding=1e-6).lower
        assert (safe < plain - 1e-7).all()
        assert (safe > plain - 1e-3).all()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3, stride=2), nn.Conv2d(2, 3, 3, stride=3, padding=1), nn.Conv2d(2, 4, 2, stride=2, groups=2),
        nn.Conv2d(2, 3, 2, dilation=2, stride=2, bias=False), nn.Conv2d(2, 3, 3, padding="same"),
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.AvgPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(2, divisor_override=3), nn.AvgPool2d(2, padding=1, count_include_pad=False),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("size", [6, 7, 8])
def test_linear_bounds_of_one_affine_layer_are_exact(layer, size):
    layer = layer.double()
    x = inputs((2, size, size))
    rows = layer(x)[0].numel()
    net = nn.Sequential(layer, nn.Flatten())
    box, prop = Box.ball(x, 0.3, clip=None), Property.rows(torch.eye(rows).double()[::5])
    found = crown(net, box, prop)
    cheap = ibp(net, box, prop).lower  # pyright: ignore
    if getattr(layer, "padding_mode", "zeros") == "reflect":  # an input meets two weights, which intervals do not add
        assert (cheap <= found.lower + 1e-12).all()
    else:
        torch.testing.assert_close(found.lower, cheap)
    assert found.A is not None
    corner = torch.where(found.A > 0, box.lower[:, None], box.upper[:, None])
    reached = torch.stack([prop.slack(net(corner[:, r]))[:, r] for r in range(found.lower.shape[1])], 1)
    torch.testing.assert_close(reached, found.lower)


class Negated(nn.Sequential):
    def forward(self, x):
        return -super().forward(x)


class Signed(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.sign(), self.bias)


def test_a_subclass_that_computes_something_else_is_refused():
    box = Box.ball(inputs((4,)), 0.1)
    for name, net in (("Negated", Negated(nn.Linear(4, 3))), ("Signed", nn.Sequential(Signed(4, 3)))):
        with pytest.raises(TypeError, match=f"{name} are not known"):
            crown(net, box, classification(0, 3))


def test_narrowing_a_box_rounds_outward():
    x = inputs((4,), 5)
    box = Box.ball(x, 0.1).to(torch.float32)
    assert (box.lower.double() <= Box.ball(x, 0.1).lower).all()
    assert (box.upper.double() >= Box.ball(x, 0.1).upper).all()


def test_bad_input_is_refused():
    x = inputs((4,), 2)
    with pytest.raises(ValueError, match="nowhere above"):
        Box(x, x - 1)
    with pytest.raises(ValueError, match="one shape"):
        Box(x, x[:1])
    with pytest.raises(ValueError, match="nowhere above"):
        Box(x * torch.nan, x)
    with pytest.raises(TypeError, match="LPPool2d are not known; known: Linear"):
        ibp(nn.Sequential(nn.LPPool2d(2, 2)), Box(x, x))
    with pytest.raises(ValueError, match="one box"):
        Interval().decide(small(), Box(x, x), classification(0, 3))
    with pytest.raises(ValueError, match="0 to 2"):
        classification(3, 3)
    with pytest.raises(ValueError, match="intermediate"):
        crown(small(), Box(x, x), classification(0, 3), intermediate="guess")
    with pytest.raises(TypeError, match="ReLU"):
        milp_verify(small(nn.Tanh), Box(x[:1], x[:1]), classification(0, 3))
    with pytest.raises(ValueError, match="groups"):
        Property(torch.eye(2), torch.zeros(3), torch.zeros(2, dtype=torch.long))


def test_robust_convex_training_keeps_neurons_on_their_side():
    pytest.importorskip("cvxpy")
    from torchfolio.theory.convex_relu import activation_patterns, conic_program

    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    X[:, -1] = 1
    y = (X[:, 0] > 0).double() * 2 - 1
    D = activation_patterns(X, 20, epsilon=0.05, bias=True, generator=generator)
    found = conic_program(X, y, D, beta=0.01, loss="hinge", epsilon=0.05, bias=True)
    net = nn.Sequential(
        nn.Linear(2, len(found.hidden)), nn.ReLU(), nn.Linear(len(found.hidden), 1, bias=False)
    ).double()
    with torch.no_grad():
        net[0].weight.copy_(found.hidden[:, :-1])
        net[0].bias.copy_(found.hidden[:, -1])
        net[2].weight.copy_(found.output[None])
    box = Box.ball(X[:, :-1], 0.05, clip=None)
    corners = torch.stack([box.lower, box.upper, *[torch.stack([a[:, 0], b[:, 1]], 1) for a, b in ((box.lower, box.upper), (box.upper, box.lower))]])  # fmt: skip
    for sign in (1.0, -1.0):
        lower = crown(net, box, Property.rows(torch.tensor([[sign]]).double())).lower[:, 0]
        # Where no neuron changes its pattern in the ball, the network is linear there and the bound is reached.
        torch.testing.assert_close(lower, (sign * net(corners)[..., 0]).amin(0), atol=1e-5, rtol=0)


def test_rows_in_turns_are_bounded_alike(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.rand(4, 5, dtype=torch.float64)
    box, prop = Box(x - 0.2, x + 0.2), classification(0, 3)
    whole = crown(net, box, prop)
    monkeypatch.setattr("torchfolio.robustness.preactivation_bounds.ELEMENTS", 1)
    torch.testing.assert_close(crown(net, box, prop).lower, whole.lower, rtol=0, atol=1e-12)


EXACT = {
    "a block": lambda: [nn.Linear(3, 5), nn.ReLU(), Residual(nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))),
                        nn.ReLU(), nn.Linear(5, 3)],
    "a block in a block": lambda: [
        Residual(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Residual(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())),
                               nn.ReLU(), nn.Linear(4, 3)), nn.Linear(3, 3)), nn.ReLU(), nn.Linear(3, 3)],
    "max pools": lambda: [nn.Unflatten(1, (1, 1, 3)), nn.Conv2d(1, 2, 2, padding=1), nn.MaxPool2d(2, 1, 1), nn.ReLU(),
                          nn.Flatten(), nn.Linear(30, 3)],
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", EXACT)
def test_sums_and_max_pools_are_decided_exactly(name, seed):
    torch.manual_seed(seed)
    net, x = nn.Sequential(*EXACT[name]()).double().eval(), torch.randn(1, 3).double()
    prop = classification(int(net(x).argmax()), 3)
    for eps in (0.1, 0.6):
        box = Box.ball(x, eps, clip=None)
        exact = milp_verify(net, box, prop)
        assert exact.status == CrownSplit().decide(net, box, prop).status
        assert exact.status in ("verified", "falsified")
        if name != "max pools":
            assert exact.status == ReluSplit().decide(net, box, prop).status
    if name == "max pools":
        with pytest.raises(TypeError, match=r"only activations are ReLUs.*max pools"):
            ReluSplit().decide(net, box, prop)
