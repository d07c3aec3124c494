"""Every entry of a state dict gets what its role asks: tied, frozen, complex, integer; and what is broken is named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.contracts.adaptation import check_adapter, check_merge
from torchfolio.adaptation.adapter import Adapted, Adapter
from torchfolio.adaptation.dam import DefenseAwareMerging
from torchfolio.adaptation.merge import Average, TaskArithmetic
from torchfolio.adaptation.merging import AdaMerging, Stream
from torchfolio.adaptation.weights import CHUNK, average, merge, task_arithmetic, task_vectors

pytestmark = pytest.mark.filterwarnings("ignore:.*of one class", "ignore:.*buffers differ")


class Tied(nn.Module):
    """Tied weights, one module under two names, batch norm, a frozen and an integer entry."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 6)
        self.inner = nn.Linear(6, 6)
        self.again = self.inner
        self.norm = nn.BatchNorm1d(6)
        self.leave = nn.Linear(6, 6, bias=False)
        self.leave.weight = self.enter.weight
        self.scale = nn.Parameter(torch.full((6,), 2.0), requires_grad=False)

    def forward(self, x):
        return self.leave(self.scale * self.again(torch.relu(self.norm(self.inner(self.enter(x))))))


def networks(make=Tied, count: int = 2):
    torch.manual_seed(0)
    base, tuned = make(), []
    for k in range(count):
        net = copy.deepcopy(base)
        with torch.no_grad():
            for p in net.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
            for name, buffer in net.named_buffers():
                if name.endswith("num_batches_tracked"):
                    buffer.add_(k)
        tuned.append(net)
    return base, tuned


def inputs(count: int = 2):
    return [torch.rand(20, 6, generator=torch.Generator().manual_seed(k)) for k in range(count)]


SMALL = {"steps": 2, "adapt_steps": 1, "batch_size": 8}


@pytest.mark.parametrize(
    "make",
    [
        Average,
        lambda: TaskArithmetic(0.4),
        lambda: AdaMerging(steps=2, batch_size=8),
        lambda: DefenseAwareMerging(**SMALL),
    ],
    ids=["average", "task_arithmetic", "adamerging", "dam"],
)
def test_the_contract(make):
    base, tuned = networks()
    check_merge(make, base, tuned, inputs())


def by_hand(base, tuned, weight):
    state = {k: v.clone() for k, v in base.state_dict().items()}
    for name in state:
        if name.partition(".")[0] in ("enter", "inner", "again", "leave") or name in ("norm.weight", "norm.bias"):
            state[name] = state[name] + sum(weight * (t.state_dict()[name] - base.state_dict()[name]) for t in tuned)
    return state


@pytest.mark.parametrize("form", ["modules", "states"])
def test_every_name_of_a_tensor_is_merged(form):
    base, tuned = networks()
    wanted = by_hand(base, tuned, 0.3)
    given = (base, tuned) if form == "modules" else (base.state_dict(), [t.state_dict() for t in tuned])
    for merged in (task_arithmetic(*given, 0.3), merge(given[0], task_vectors(*given), 0.3)):
        for name, value in wanted.items():
            torch.testing.assert_close(merged[name], value)
    for name, value in average(given[1]).items():
        if value.is_floating_point():
            mean = torch.stack([t.state_dict()[name] for t in tuned]).mean(0)
            torch.testing.assert_close(value, mean)


def test_a_checkpoint_may_hold_one_name_of_a_tied_tensor_but_not_two_values():
    base, tuned = networks()
    states = [t.state_dict() for t in tuned]
    wanted = task_arithmetic(base, states)
    del states[0]["enter.weight"], states[1]["leave.weight"]
    merged = task_arithmetic(base, states)
    assert all(torch.equal(merged[k], wanted[k]) for k in wanted)
    two = {k: v.clone() for k, v in tuned[0].state_dict().items()}
    two["leave.weight"] += 1
    with pytest.raises(ValueError, match=r"two values for one tensor, named enter\.weight and leave\.weight"):
        task_arithmetic(base, [two])


def test_complex_parameters_are_merged_or_refused_by_name():
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.randn(6, dtype=torch.complex64))
            self.last = nn.Linear(6, 6)

        def forward(self, x):
            return self.last((x * self.phase).abs())

    base, tuned = networks(Waves)
    check_merge(Average, base, tuned, inputs())
    merged = check_merge(TaskArithmetic, base, tuned, inputs()).model.state_dict()["phase"]
    wanted = base.phase + sum(0.3 * (t.phase - base.phase) for t in tuned)
    torch.testing.assert_close(merged, wanted.detach())
    with pytest.raises(ValueError, match="phase is complex"):
        AdaMerging(steps=1).fit(base, tuned, inputs())


def test_a_frozen_parameter_that_a_checkpoint_changed_is_named():
    base, tuned = networks()
    with torch.no_grad():
        tuned[1].scale.add_(1)
    for call in (lambda: task_arithmetic(base, tuned), lambda: AdaMerging(steps=1).fit(base, tuned, inputs())):
        with pytest.raises(ValueError, match="checkpoint 1 changed scale, which is frozen"):
            call()


def test_statistics_of_bare_state_dicts_are_no_weights():
    base, tuned = networks()
    for net in tuned:
        net.norm.running_var.fill_(9.0)
    merged = task_arithmetic(base.state_dict(), [t.state_dict() for t in tuned], 5.0)
    assert torch.equal(merged["norm.running_var"], base.norm.running_var)
    assert torch.equal(merged["norm.num_batches_tracked"], base.norm.num_batches_tracked)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named_with_where_it_came_from(bad):
    base, tuned = networks()
    with torch.no_grad():
        base.enter.bias[0] = bad
    for call in (lambda: task_arithmetic(base, tuned), lambda: AdaMerging(steps=1).fit(base, tuned, inputs())):
        with pytest.raises(ValueError, match=r"the pretrained network holds NaN or infinity in enter\.bias"):
            call()
    base, tuned = networks()
    tuned[1].norm.running_mean[0] = bad
    with pytest.raises(ValueError, match=r"checkpoint 1 holds NaN or infinity in norm\.running_mean"):
        AdaMerging(steps=1).fit(base, tuned, inputs())
    x = inputs()[0]
    x[3, 0] = bad
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 20)
    with pytest.raises(ValueError, match="a batch of task 1 holds NaN"):
        Stream([inputs()[0], loader], 2, 8, 0, torch.device("cpu")).draw()


def test_finite_values_whose_sum_is_too_large_pass():
    large = {"w": torch.full((4,), 3e38)}
    assert torch.equal(average([large, {"w": torch.full((4,), -3e38)}])["w"], torch.zeros(4))
    assert torch.equal(task_arithmetic(large, [large], 0.5)["w"], large["w"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_stay_and_means_of_short_ones_are_exact(dtype):
    states = [{"w": torch.full((3,), v, dtype=dtype)} for v in (256.0, 1.0, 1.0, 1.0)]
    assert average(states)["w"].dtype == dtype
    assert torch.equal(average(states)["w"], torch.full((3,), 64.75).to(dtype))
    assert task_arithmetic(states[0], states[1:], 0.0)["w"].dtype == dtype


def test_pieces_and_layouts_change_nothing():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(3, CHUNK // 2 + 7, generator=generator) for _ in range(3))
    wanted = a + (0.3 * (b - a) + 0.7 * (c - a))
    torch.testing.assert_close(task_arithmetic({"w": a}, [{"w": b}, {"w": c}], [0.3, 0.7])["w"], wanted)
    turned = task_arithmetic({"w": a.t()}, [{"w": b.t().contiguous()}, {"w": c.t()}], [0.3, 0.7])["w"]
    torch.testing.assert_close(turned, wanted.t())


class Scaled(Adapter):
    def _adapt(self, model, data, run):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + torch.rand(()))
        return Adapted(model, {"examples": len(data)})


def test_adapters_leave_the_network_alone_and_come_back_from_disk(tmp_path):
    data = torch.utils.data.TensorDataset(torch.rand(8, 6), torch.arange(8))
    network = {"build": "torch.nn:Linear", "arguments": {"in_features": 6, "out_features": 3}}
    done = check_adapter(
        Scaled, nn.Linear(6, 3).train(), data, network, tmp_path, torch.rand(4, 6), allow=["torch.nn:Linear"]
    )
    assert done.report["examples"] == 8


def test_wrapped_checkpoints_are_known_by_their_own_names():
    nets = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3)]
    expected = task_arithmetic(nets[0], nets[1:], 0.5)
    prefixed = {f"module.{name}": value for name, value in nets[2].state_dict().items()}
    for base, ends in ((nets[0], [torch.compile(nets[1]), prefixed]), (nn.DataParallel(nets[0]), nets[1:])):
        merged = task_arithmetic(base, ends, 0.5)
        assert {n: torch.equal(v, merged[n]) for n, v in expected.items()} == dict.fromkeys(expected, True)
