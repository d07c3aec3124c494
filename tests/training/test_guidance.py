"""Guidance against its equation, and against whatever else it must leave alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.engine import Backprop, LearningRule, fit
from torchfolio.local.auglocal import AugLocal
from torchfolio.models import MLP, ResNetCIFAR, ViT
from torchfolio.training.guidance import Guidance, GuidedRule, Recorder, layer_correspondence, linear_cka, rsa


def features(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def target() -> MLP:
    torch.manual_seed(0)
    return MLP(48, 5, hidden=(12, 11, 10, 9), norm="batch")


def guide() -> ResNetCIFAR:
    torch.manual_seed(1)
    return ResNetCIFAR(8, widths=(4, 5, 6), num_classes=5, shortcut="A")


def batch(n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 3, 4, 4, generator=generator), torch.randint(5, (n,), generator=generator)


def gradients(net: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


# The similarity


@pytest.mark.parametrize("d", [7, 60])
def test_cka_is_one_up_to_rotation_scale_and_shift(d):
    x = features(20, d)
    q, _ = torch.linalg.qr(features(d, d, 1))
    moved = -3.0 * x @ q + features(1, d, 2)
    assert linear_cka(x, x).item() == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, moved).item() == pytest.approx(1, abs=1e-12)
    assert linear_cka(x.float(), moved.float()).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("p", "q"), [(5, 9), (50, 9), (50, 70)])
def test_cka_equals_gram_and_feature_form(p, q):
    x, y = features(20, p), features(20, q, 1)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    torch.testing.assert_close(linear_cka(x, y), expected)
    h = torch.eye(20, dtype=x.dtype) - 1 / 20
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h
    torch.testing.assert_close(linear_cka(x, y), (k * l).sum() / (k.norm() * l.norm()))


@pytest.mark.parametrize("similarity", [linear_cka, rsa])
def test_similarity_passes_gradcheck(similarity):
    x, y = features(6, 4).requires_grad_(), features(6, 9, 1).requires_grad_()
    assert torch.autograd.gradcheck(similarity, (x, y))


@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("d", [5, 200])
def test_gradient_survives_tiny_activations(scale, d):
    x, y = features(32, d).float(), features(32, 20, 1).float()
    reference = torch.autograd.functional.jacobian(lambda a: linear_cka(a, y), x)
    small = (scale * x).requires_grad_()
    linear_cka(small, scale * y).backward()
    torch.testing.assert_close(small.grad * scale, reference, rtol=1e-3, atol=1e-7)


# The map


@pytest.mark.parametrize(
    ("n_guide", "n_target", "layers"),
    [(8, 4, [0, 0, 1, 1, 2, 2, 3, 3]), (3, 5, [0, 2, 4]), (1, 6, [0]), (2, 2, [0, 1]), (5, 1, [0] * 5)],
)
def test_layers_are_spread_evenly(n_guide, n_target, layers):
    assert layer_correspondence(n_guide, n_target) == list(enumerate(layers))


def test_map_needs_layers():
    with pytest.raises(ValueError, match="at least one"):
        layer_correspondence(0, 3)


def test_default_layers_leave_the_logits_out():
    net, other = target(), guide()
    guidance = Guidance(net, other)
    x, _ = batch()
    net(x)
    guidance(x)
    assert list(guidance.guide_features(x)) == [
        "stem.0", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "block3.conv1", "block3.conv2", "head.0",
    ]  # fmt: skip
    assert [j for _, j in guidance.per_layer] == [f"layer{k}.{int(k == 1)}" for k in (1, 1, 2, 2, 3, 3, 4, 4)]


# The loss


def by_hand(net: nn.Module, other: nn.Module, x: torch.Tensor, names: list[tuple[str, str]]) -> torch.Tensor:
    seen: dict[tuple[str, str], torch.Tensor] = {}
    handles = [
        dict(module.named_modules())[name].register_forward_hook(
            lambda m, i, o, key=(side, name): seen.__setitem__(key, o)
        )
        for pair in names
        for side, module, name in (("g", other, pair[0]), ("t", net, pair[1]))
    ]
    net(x)
    with torch.no_grad():
        other(x)
    for handle in handles:
        handle.remove()
    return sum(
        (1 - linear_cka(seen["t", j].flatten(1), seen["g", i].flatten(1)) for i, j in names), start=torch.zeros(())
    )


@pytest.mark.parametrize(("reduction", "divide"), [("sum", 1), ("mean", 8)])
def test_loss_and_gradient_equal_the_equation(reduction, divide):
    net, other = target(), guide().eval()
    x, y = batch()
    guidance = Guidance(net, other, alpha=3.0, reduction=reduction)
    F.cross_entropy(net(x), y).add(guidance(x)).backward()
    assert all(p.grad is None for p in other.parameters())
    got, reference = gradients(net), target()
    alignment = 3 / divide * by_hand(reference, other, x, list(guidance.per_layer))
    (F.cross_entropy(reference(x), y) + alignment).backward()
    for a, b in zip(got, gradients(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_last_of_duplicates_is_the_released_codes():
    net, other = target(), guide()
    guidance = Guidance(net, other, duplicates="last")
    x, _ = batch()
    net(x)
    guidance(x)
    assert [i for i, _ in guidance.per_layer] == ["block1.conv1", "block2.conv1", "block3.conv1", "head.0"]


def test_target_runs_once():
    net, calls = target(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    guidance = Guidance(net, guide())
    x, _ = batch()
    net(x)
    guidance(x)
    assert len(calls) == 1
    assert net.layer1[2].num_batches_tracked == 1


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("training", [True, False])
def test_guide_never_changes(mode, training):
    net, other = target(), guide().train(training)
    before = copy.deepcopy(other.state_dict())
    data = batch(64)
    fit(net, data, rule=GuidedRule(Guidance(net, other, guide_mode=mode)), epochs=2, batch_size=16, device="cpu")
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    assert all(p.grad is None for p in other.parameters())
    assert other.training == training


def test_guide_modes_differ_by_batch_norm():
    net, other = target(), guide()
    x, _ = batch()
    rows = {mode: Guidance(net, other, guide_mode=mode).guide_features(5 + x)["head.0"] for mode in ("eval", "train")}
    assert not torch.allclose(rows["eval"], rows["train"])


def test_steps_end_the_alignment():
    net = target().train()
    guidance = Guidance(net, guide(), steps=2)
    x, _ = batch()
    values = []
    for _ in range(3):
        net(x)
        values.append(guidance(x).item())
    assert values[0] > 0
    assert values[2] == 0
    assert not guidance.active


def test_measuring_counts_no_step():
    net = target().eval()
    guidance = Guidance(net, guide(), steps=1)
    x, _ = batch()
    with torch.no_grad():
        net(x)
        guidance(x)
    assert guidance.active


def test_cached_features_give_the_same_loss():
    net = target().eval()
    guidance = Guidance(net, guide())
    x, _ = batch(32)
    cached = guidance.guide_features(x)
    index = torch.tensor([3, 1, 20, 7, 30])
    net(x[index])
    expected = guidance(x[index])
    net(x[index])
    got = guidance(features={name: rows[index] for name, rows in cached.items()})
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_guide_input_adapts_or_permutes():
    net = target()
    flat = MLP(48, 5, hidden=(8, 8))
    guidance = Guidance(net, flat, guide_input=lambda x: x.flatten(1).flip(0))
    x, _ = batch()
    first = guidance.guide_features(x)["layer2.0"]
    torch.testing.assert_close(first, Guidance(net, flat).guide_features(x.flip(0))["layer2.0"])


# Kinds of layers


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.LSTM, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.rnn = kind(6, 7, batch_first=batch_first)
        self.read = nn.Linear(7, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self.rnn(self.embed(x))[0])


class Shared(nn.Module):
    """One layer used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        self.read = nn.Linear(8, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = memory = self.embed(x)
        for _ in range(3):
            h = self.layer(h, memory)
        return self.read(h)


def test_shared_layers_are_recorded_by_call():
    net, other = Recurrent(), Shared()
    x = torch.randint(9, (6, 5))
    guidance = Guidance(net, other, layers=(nn.TransformerDecoderLayer, nn.Linear))
    names = list(guidance.guide_features(x))
    assert [n for n in names if n.startswith("layer") and "." not in n] == ["layer", "layer#2", "layer#3"]
    guidance = Guidance(net, other, pairs=[("layer#2", "rnn")])
    net(x)
    guidance(x).backward()
    assert net.rnn.weight_ih_l0.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM])
def test_final_states_of_recurrent_layers_are_left_out(kind):
    guidance = Guidance(target(), Recurrent(kind))
    maps = guidance.guide_features(torch.randint(9, (6, 5)))
    assert {name: tuple(m.shape) for name, m in maps.items()} == {"rnn": (6, 5, 7)}


def test_axis_of_examples_comes_first():
    guidance = Guidance(target(), Recurrent(batch_first=False), batch_dim=1)
    assert guidance.guide_features(torch.randint(9, (5, 6)))["rnn"].shape == (6, 5, 7)
    square = torch.randint(9, (6, 6))
    torch.testing.assert_close(guidance.guide_features(square)["rnn"], guidance.guide(square).new_tensor(0) + guidance.guide.rnn(guidance.guide.embed(square))[0].transpose(0, 1))  # fmt: skip


class Encoded(nn.Module):
    """A transformer over [N, T, 6], which may run with the axis of time first."""

    def __init__(self, kind, batch_first):
        super().__init__()
        torch.manual_seed(3)
        layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=batch_first)
        stacked = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(6), enable_nested_tensor=False)
        attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.inner = {"layer": layer, "stacked": stacked, "attention": attention}[kind]
        self.read, self.batch_first = nn.Linear(6, 3), batch_first

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        h = self.inner(x, x, x)[0] if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)
        return self.read(h.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("length", [7, 5])
@pytest.mark.parametrize("kind", ["layer", "stacked", "attention"])
def test_time_is_not_taken_for_examples_inside_a_transformer(kind, length):
    """The layers inside give [T, N, D] where their transformer has `batch_first=False`; told apart even for T = N."""
    x = torch.randn(7, length, 6, generator=torch.Generator().manual_seed(0))
    values = []
    for batch_first in (True, False):
        net = Encoded(kind, batch_first)
        guidance = Guidance(net, nn.Sequential(nn.Flatten(), nn.Linear(6 * length, 8), nn.Linear(8, 3)))
        net(x)
        values.append(guidance(x).item())
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_packed_sequences_are_padded():
    class Packed(Recurrent):
        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(self.embed(x), torch.tensor([5, 4, 3, 2]), batch_first=True)
            return self.read(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])

    maps = Guidance(target(), Packed()).guide_features(torch.randint(9, (4, 5)))
    assert maps["rnn"].shape == (4, 5, 7)
    assert maps["rnn"][3, 2:].abs().sum() == 0


def test_tokenwise_adds_up_over_positions():
    torch.manual_seed(0)
    net, other = Recurrent(), Recurrent(nn.RNN)
    x = torch.randint(9, (6, 5))
    guidance = Guidance(net, other, tokenwise=True)
    net(x)
    got = guidance(x)
    a, b = net.rnn(net.embed(x))[0], other.rnn(other.embed(x))[0]
    expected = sum(1 - linear_cka(a[:, t], b[:, t]).item() for t in range(5))
    assert got.item() == pytest.approx(expected, abs=1e-5)


def test_tokenwise_needs_equal_lengths():
    net = target()
    guidance = Guidance(net, Recurrent(), tokenwise=True, guide_input=lambda x: torch.randint(9, (len(x), 5)))
    x, _ = batch()
    net(x)
    with pytest.raises(ValueError, match=r"equal T.*\(16, 5, 7\)"):
        guidance(x)


@pytest.mark.parametrize("swap", [False, True])
def test_vision_transformers_guide_and_are_guided(swap):
    torch.manual_seed(0)
    vit = ViT(image_size=4, patch_size=2, num_classes=5, dim=8, depth=2, heads=2)
    net, other = (target(), vit) if swap else (vit, guide())
    result = fit(net, batch(32), rule=GuidedRule(Guidance(net, other)), epochs=2, batch_size=16, device="cpu")
    assert result.history.to_frame()["guidance"].gt(0).all()


def test_fused_encoder_layers_still_run_their_parts():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    other = nn.Sequential(nn.Embedding(9, 8), encoder)
    maps = Guidance(target(), other, layers=nn.LayerNorm).guide_features(torch.randint(9, (6, 5)))
    assert list(maps) == ["1.layers.0.norm1", "1.layers.0.norm2", "1.layers.1.norm1"]


# Composition


def test_rule_is_the_plain_loop():
    x, y = batch()
    net = target().train()
    rule = GuidedRule(Guidance(net, guide(), alpha=2.0, reduction="mean"))
    rule.prepare(net, (x, y))
    scalars = rule.step((x, y), torch.Tensor.backward)
    reference = target().train()
    guidance = Guidance(reference, guide(), alpha=2.0, reduction="mean")
    task = F.cross_entropy(reference(x), y)
    alignment = guidance(x)
    (task + alignment).backward()
    assert scalars["loss"].item() == pytest.approx(task.item())
    assert scalars["guidance"].item() == pytest.approx(alignment.item(), rel=1e-5)
    for a, b in zip(gradients(net), gradients(reference), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_local_rule_guides_every_block_without_crossing(reduction):
    x, y = batch()

    def step(alpha: float) -> tuple[MLP, dict]:
        net = target().train()
        rule = GuidedRule(Guidance(net, guide(), alpha=alpha, reduction=reduction), AugLocal(aux_depth=1))
        torch.manual_seed(5)
        rule.prepare(net, (x, y))
        return net, dict(rule.step((x, y), torch.Tensor.backward)), rule

    plain, _, _ = step(0.0)
    net, scalars, rule = step(1.0)
    assert set(scalars) == {"loss", "local_loss", "guidance"}
    assert len(rule.guidance.per_layer) == 8
    whole = torch.stack(list(rule.guidance.per_layer.values()))
    expected = whole.sum() if reduction == "sum" else whole.mean()
    torch.testing.assert_close(scalars["guidance"], expected)
    # What is added to the first layer's gradient is its own two terms, no later layer's.
    first = net.layer1[1]
    own = [1 - linear_cka(h, rule.guidance.guide_features(x)[i].flatten(1))
           for i in ("stem.0", "block1.conv1") for h in [F.linear(x.flatten(1), first.weight, first.bias)]]  # fmt: skip
    total = sum(own) / (1 if reduction == "sum" else 8)
    (expected,) = torch.autograd.grad(total, first.weight)
    torch.testing.assert_close(first.weight.grad - plain.layer1[1].weight.grad, expected, rtol=1e-3, atol=1e-6)


def test_rule_leaves_no_hook_and_the_network_pickles():
    net = target()
    fit(net, batch(32), rule=GuidedRule(Guidance(net, guide())), batch_size=16, device="cpu")
    x, _ = batch()
    torch.testing.assert_close(pickle.loads(pickle.dumps(net))(x), net(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_copies_of_the_target_do_not_record():
    net = target()
    guidance = Guidance(net, guide())
    x, _ = batch()
    net(x)
    copy.deepcopy(net)(x + 1)
    value = guidance(x)
    net(x)
    torch.testing.assert_close(guidance(x), value)


def test_warmup_trains_on_the_alignment_alone():
    x, y = batch()
    net = target()
    rule = GuidedRule(Guidance(net, guide(), steps=1), warmup_only=True)
    rule.prepare(net, (x, y))
    rule.step((x, y), torch.Tensor.backward)
    assert net.head.weight.grad is None
    assert net.layer4[0].weight.grad.abs().sum() > 0
    scalars = rule.step((x, y), torch.Tensor.backward)
    assert net.head.weight.grad is not None
    assert "guidance" not in scalars


def test_training_resumes_to_the_bit(tmp_path):
    def train(epochs: int, folder=None) -> torch.Tensor:
        net = target()
        rule = GuidedRule(Guidance(net, guide(), steps=3))
        fit(net, batch(32), rule=rule, epochs=epochs, batch_size=16, device="cpu", checkpoint=folder)
        return net.layer1[1].weight

    expected = train(4)
    train(1, tmp_path)
    assert torch.equal(train(4, tmp_path), expected)


def test_another_guide_is_noticed_on_resuming():
    guidance = Guidance(target(), guide())
    state = guidance.state_dict()
    other = Guidance(target(), ResNetCIFAR(8, widths=(4, 5, 6), num_classes=5))
    with pytest.raises(ValueError, match="not the one"):
        other.load_state_dict(state)


def test_precisions():
    net = target().double()
    x, y = batch()
    rule = GuidedRule(Guidance(net, guide()))
    fit(net, (x.double(), y), rule=rule, precision="64-true", max_steps=2, device="cpu")
    assert next(iter(rule.guidance.per_layer.values())).dtype == torch.float64
    net = target()
    fit(net, (x, y), rule=GuidedRule(Guidance(net, guide())), precision="bf16-mixed", max_steps=2, device="cpu")


def test_constant_features_cost_one_without_gradient():
    net = target().train()
    guidance = Guidance(net, guide())
    x, _ = batch()
    with torch.no_grad():
        net.layer1[1].weight.zero_()
    net(x)
    with pytest.warns(UserWarning, match="do not vary"):
        loss = guidance(x)
    loss.backward()
    assert guidance.per_layer["stem.0", "layer1.1"] == 1
    assert all(g.isfinite().all() for g in gradients(net))


# Bad input


def test_shared_parameters_are_refused():
    net = target()
    with pytest.raises(ValueError, match="deepcopy"):
        Guidance(net, nn.Sequential(net.layer1, nn.Linear(12, 3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"similarity": "pwcca"}, "similarity"),
        ({"reduction": "max"}, "reduction"),
        ({"duplicates": "first"}, "duplicates"),
        ({"guide_mode": "frozen"}, "guide_mode"),
        ({"steps": -3}, "steps"),
        ({"layers": ["block9"]}, "no module 'block9'"),
        ({"layers": nn.Conv3d}, "no module of the types Conv3d"),
        ({"layers": []}, "by name or by type"),
        ({"layers": ["stem"], "pairs": [("stem", "layer1")]}, "either pairs"),
        ({"pairs": [("stem", "layer9")]}, "no module 'layer9'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Guidance(target(), guide(), **settings)


def test_small_batches_are_refused():
    net = target()
    guidance = Guidance(net, guide())
    x, _ = batch(3)
    net(x)
    with pytest.raises(ValueError, match=r"at least 4 examples.*drop_last"):
        guidance(x)


def test_target_that_did_not_run():
    guidance = Guidance(target(), guide())
    with pytest.raises(RuntimeError, match=r"run target\(x\)"):
        guidance(batch()[0])


def test_closed_guidance_says_so():
    net = target()
    guidance = Guidance(net, guide())
    guidance.close()
    x, _ = batch()
    net(x)
    with pytest.raises(RuntimeError, match="hooks are off"):
        guidance(x)
    with guidance:
        net(x)
        assert guidance(x) > 0


def test_features_overwritten_in_place_are_noticed():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(inplace=True), nn.Linear(8, 5))
    guidance = Guidance(net, guide())
    x, _ = batch()
    net(x)
    with pytest.raises(RuntimeError, match="overwritten in place"):
        guidance(x)


def test_features_without_examples():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(48, 8)

        def forward(self, x):
            return self.inner(x.flatten(1)).flatten()

    net = target()
    maps = Guidance(net, nn.Sequential(Flat(), nn.Unflatten(0, (-1, 8)), nn.Linear(8, 5)), layers=["0"])
    x, _ = batch()
    with pytest.raises(ValueError, match=r"axis of 16 examples, got shape \(128,\)"):
        maps.guide_features(x)


def test_only_the_logits_to_compare():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    guidance = Guidance(net, guide())
    x, _ = batch()
    net(x)
    with pytest.raises(ValueError, match="one layer of the types"):
        guidance(x)


def test_rule_of_another_network():
    with pytest.raises(ValueError, match="got another MLP"):
        GuidedRule(Guidance(target(), guide())).prepare(target(), batch())


def test_rule_checks_its_settings():
    with pytest.raises(ValueError, match="warmup_only"):
        GuidedRule(Guidance(target(), guide()), warmup_only=True)
    with pytest.raises(RuntimeError, match="prepare"):
        GuidedRule(Guidance(target(), guide()), Backprop()).step(batch(), torch.Tensor.backward)


def test_rule_that_runs_a_copy_is_noticed():
    class Copying(Backprop):
        def prepare(self, model, example):
            return super().prepare(copy.deepcopy(model), example)

    net = target()
    rule: LearningRule = GuidedRule(Guidance(net, guide()), Copying())
    rule.prepare(net, batch())
    with pytest.raises(ValueError, match="ran none of the guided layers"):
        rule.step(batch(), torch.Tensor.backward)


@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_that_say_where_their_examples_are_are_believed(batch_first):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=batch_first), nn.Linear(4, 2)

        def forward(self, x):  # [N, T, 3]
            h, _ = self.lstm(x if batch_first else x.transpose(0, 1))
            return self.head(h.mean(1 if batch_first else 0))

    target, x = Reader(), torch.randn(6, 6, 3)  # as many steps as examples
    recorder = Recorder(target, "lstm", "target", 0)
    with recorder:
        target(x)
        seen = recorder.take(6)["lstm"]
    expected = target.lstm(x if batch_first else x.transpose(0, 1))[0]
    torch.testing.assert_close(seen, expected if batch_first else expected.transpose(0, 1))


def test_an_armed_target_can_be_pickled():
    target = MLP(6, 3, hidden=(8, 8))
    with Guidance(target, MLP(6, 3, hidden=(8, 8))):
        again = pickle.loads(pickle.dumps(target))
    x = torch.randn(4, 6)
    torch.testing.assert_close(again(x), target(x))
