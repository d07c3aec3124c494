"""Surgery: what is replaced really runs, what is read is what the model computed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from torchfolio.models import ResNetCIFAR, ViT, collect_features, parameter_groups, replace_layers, take_features


class Zero(nn.Module):
    def forward(self, x):
        return x * 0


def test_replaces_by_type_and_by_predicate():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    replace_layers(net, nn.ReLU, lambda old: nn.GELU())
    assert sum(isinstance(m, nn.GELU) for m in net.modules()) == 2
    replace_layers(net, lambda name, module: name == "2.1", lambda old: nn.Identity())
    assert isinstance(net[2][1], nn.Identity)
    assert isinstance(net[0], nn.Linear)


def test_weights_may_be_handed_over_and_mode_device_dtype_follow():
    net = nn.Sequential(nn.Linear(3, 3)).double().eval()

    def factory(old):
        new = nn.Linear(3, 3)
        new.load_state_dict(old.state_dict())
        return new

    x = torch.randn(2, 3, dtype=torch.float64)
    before = net(x)
    replace_layers(net, nn.Linear, factory)
    torch.testing.assert_close(net(x), before, rtol=1e-6, atol=1e-7)
    assert net[0].weight.dtype == torch.float64
    assert not net[0].training


def test_a_module_in_two_places_is_replaced_once():
    shared = nn.ReLU()
    net = nn.Sequential(shared, nn.Linear(2, 2), shared)
    made = []
    replace_layers(net, nn.ReLU, lambda old: made.append(nn.Tanh()) or made[-1])
    assert len(made) == 1
    assert net[0] is net[2] is made[0]


def test_the_root_itself():
    assert isinstance(replace_layers(nn.ReLU(), nn.ReLU, lambda old: nn.Tanh()), nn.Tanh)


def test_nothing_to_replace():
    with pytest.raises(ValueError, match="the network has Linear, Sequential"):
        replace_layers(nn.Sequential(nn.Linear(1, 1)), nn.ReLU, lambda old: old)
    replace_layers(nn.Sequential(nn.Linear(1, 1)), nn.ReLU, lambda old: old, allow_none=True)
    with pytest.raises(TypeError, match="module"):
        replace_layers(nn.Sequential(nn.ReLU()), nn.ReLU, lambda old: 3)


def test_hooks_that_are_lost_are_told():
    net = nn.Sequential(nn.ReLU())
    net[0].register_forward_hook(lambda m, a, o: None)
    with pytest.warns(UserWarning, match="hooks"):
        replace_layers(net, nn.ReLU, lambda old: nn.Tanh())


@pytest.mark.parametrize("stacked", [False, True])
def test_replaced_norms_of_a_transformer_layer_run_in_evaluation_mode(stacked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 2) if stacked else layer
    net.eval()
    x = torch.randn(2, 3, 8)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        net(x, src_key_padding_mask=mask)
        replace_layers(net, nn.LayerNorm, lambda old: Zero())
        assert not net(x, src_key_padding_mask=mask).any()


def test_features_are_those_of_the_one_pass():
    torch.manual_seed(0)
    net = ResNetCIFAR(8, widths=(4, 6, 8)).eval()
    x = torch.randn(2, 3, 8, 8)
    calls = []
    net.block1.register_forward_hook(lambda m, a, o: calls.append(o))
    with take_features(net, ["block1", "block3"]) as features:
        logits = net(x)
        assert torch.equal(features["block1"], calls[0])
        assert len(calls) == 1
        assert features["block3"].shape == (2, 8, 2, 2)
        features["block3"].sum().backward()
    assert net.stem[0].weight.grad is not None
    assert torch.equal(net(x), logits)
    assert len(net.block3._forward_hooks) == 0
    assert [name for name, _ in features.items()] == ["block1", "block3"]


@pytest.mark.parametrize(("flatten", "shape"), [(False, (2, 4, 8)), ("all", (2, 32)), ("pool", (2, 8))])
def test_tokens_are_kept_joined_or_averaged(flatten, shape):
    net = ViT(8, 4, 3, 1, dim=8, depth=1, heads=2)
    with take_features(net, "block1", flatten=flatten, detach=True) as features:
        net(torch.randn(2, 1, 8, 8))
    assert features["block1"].shape == shape
    assert not features["block1"].requires_grad


def test_modules_that_run_twice_or_return_tuples():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.gru = nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True)

        def forward(self, x):
            return self.gru(self.linear(self.linear(x)))[0]

    net = Net()
    with take_features(net, ["linear", "gru"]) as features:
        out = net(torch.randn(2, 3, 4))
        assert torch.equal(features["gru"], out)
        assert len(features.calls("linear")) == 2
        with pytest.raises(RuntimeError, match="ran 2 times"):
            features["linear"]


def test_wrong_names():
    with pytest.raises(ValueError, match="did you mean block1"):
        take_features(ResNetCIFAR(8), "blok1")
    with take_features(ResNetCIFAR(8), "block1") as features:
        with pytest.raises(KeyError, match="not asked for"):
            features["block2"]
        with pytest.raises(RuntimeError, match="has not run"):
            features["block1"]


def test_a_copy_of_a_watched_model_does_not_write_into_its_features():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with take_features(net, "0") as features:
        net(torch.zeros(1, 2))
        before = features["0"]
        copy.deepcopy(net)(torch.ones(1, 2))
        assert torch.equal(features["0"], before)


def test_collected_features_are_those_of_a_whole_pass():
    net = ResNetCIFAR(8, widths=(4, 6, 8)).train()
    x = torch.randn(7, 3, 8, 8)
    found = collect_features(net, x, ["block2"], flatten="pool", batch_size=3)
    assert net.training
    net.eval()
    with take_features(net, "block2", flatten="pool") as features:
        net(x)
    torch.testing.assert_close(found["block2"], features["block2"].detach())


def test_parameter_groups_hold_every_parameter_once():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    net[2].weight = net[0].weight
    groups = parameter_groups(net, {nn.BatchNorm1d: {"weight_decay": 0.0}}, biases={"lr": 1.0})
    assert [len(g["params"]) for g in groups] == [2, 2, 1]
    torch.optim.SGD(groups, lr=0.1)
    members = [id(p) for g in groups for p in g["params"]]
    assert sorted(members) == sorted({id(p) for p in net.parameters()})


def test_a_network_that_is_listened_to_can_be_pickled_and_copied():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with take_features(net, ["0", "2"]) as features:
        for other in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
            x = torch.randn(5, 3)
            net(x)
            seen = features["0"]
            other(torch.randn(7, 3))
            assert features["0"] is seen
            torch.testing.assert_close(other(x), net(x))


def test_a_module_under_two_names_is_replaced_by_either():
    for named in ("1", "3"):
        shared = nn.Linear(2, 2)
        net = nn.Sequential(nn.Linear(2, 2), shared, nn.ReLU(), shared)
        replace_layers(net, lambda name, module, named=named: name == named, lambda old: nn.Identity())
        assert isinstance(net[1], nn.Identity)
        assert net[3] is net[1]
