"""Fast and slow learning: one fast step is a step of SGD, episodes equal single steps, nothing is known too early."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn
from torch.nn import functional as F

from torchfolio.engine import evaluate, fit
from torchfolio.engine.modes import random_state
from torchfolio.engine.recipes import adam
from torchfolio.training import FastSlowEstimator, FastSlowMemoryNetwork, FastSlowTraining
from torchfolio.training.fast_slow_memory import episode_loss, true_gradients
from torchfolio.training.memory_network import FastState
from torchfolio.training.meta_episodes import class_episodes, prototype_episodes, sine_episodes
from torchfolio.training.plastic import PlasticLinear
from torchfolio.training.synthetic_gradients import FeedbackPath, SyntheticGradient


def network(task="regression", inputs=1, out=1, dtype=torch.float64, lively=True, **options):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(inputs, 12), nn.Tanh())
    net = FastSlowMemoryNetwork(encoder, out, task=task, **{"slots": 5, "width": 6, "hidden": 12, **options}).to(dtype)
    for layer in net.modules() if lively else ():
        if isinstance(layer, PlasticLinear):  # rates and forgetting large enough to be seen
            nn.init.constant_(layer.log_rate, -0.5)
            nn.init.constant_(layer.decay_logit, 1.0)
    return net


def episodes(task="regression", n=4, dtype=torch.float64, seed=0):
    x, y = sine_episodes(n, 7, seed=seed) if task == "regression" else prototype_episodes(n, 3, 2, 4, seed=seed)
    return x.to(dtype), y.to(dtype) if task == "regression" else y


TASKS = {"regression": {}, "classification": {"task": "classification", "inputs": 4, "out": 3}}


def stepped(net, x, y):
    state, outputs = net.init_state(len(x)), []
    for t in range(x.shape[1]):
        output, context = net.step(state, x[:, t])
        state = net.observe(state, context, y[:, t])
        outputs.append(output)
    return torch.stack(outputs, 1), state


# The spec's exact checks


@pytest.mark.parametrize("task", TASKS)
def test_a_fast_step_by_the_true_gradient_is_a_step_of_sgd(task, monkeypatch):
    net = network(**TASKS[task])
    for layer in (net.hidden_layer, net.readout):
        layer.scale = 1.0
        nn.init.constant_(layer.decay_logit, float("inf"))
    x, y = (v[:1] for v in episodes(task))
    state = net.init_state(1)
    output, context = net.step(state, x[:, 0])
    target = net.targets(y, 1)[:, 0]
    loss = F.mse_loss(output, target, reduction="sum") / 2 if task == "regression" else F.cross_entropy(output, target)
    weights = (net.hidden_layer.weight, net.readout.weight)
    *slow, before, error = torch.autograd.grad(loss, [*weights, context.before, context.output])
    zeros = [torch.zeros(1, n, dtype=torch.float64) for n in (6, 18)]
    monkeypatch.setattr(net, "signals", lambda *given: (zeros[0], before, zeros[1], error))
    state = net.observe(state, context, y[:, 0])
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for own, gradient in zip((twin.hidden_layer, twin.readout), slow, strict=True):
            own.weight -= own.rate * gradient
        expected, _ = twin.step(FastState(state.memory, *(torch.zeros_like(v) for v in list(state.state_dict().values())[1:])), x[:, 0])  # fmt: skip
        actual, _ = net.step(state, x[:, 0])
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    assert (actual - output).abs().max() > 1e-3


def test_a_linear_model_of_gradients_is_exact_for_squared_errors():
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    model = SyntheticGradient(3, 3).double()
    inputs = torch.cat((output, target, torch.ones(50, 1, dtype=torch.float64)), 1)
    solution = torch.linalg.lstsq(inputs, output - target).solution.T
    model.net.weight.data, model.net.bias.data = solution[:, :6], solution[:, 6]
    assert model.loss(model(output, target), output - target) < 1e-8


@pytest.mark.parametrize("task", TASKS)
def test_without_rates_it_is_the_slow_network_to_the_bit(task):
    fast = network(dtype=torch.float32, **TASKS[task])
    slow = network(dtype=torch.float32, fast=False, **TASKS[task])
    for layer in (fast.read, fast.hidden_layer, fast.readout, fast.write):
        nn.init.constant_(layer.log_rate, float("-inf"))
    x, y = episodes(task, dtype=torch.float32)
    assert all(torch.equal(fast.get_parameter(name), p) for name, p in slow.named_parameters())
    assert torch.equal(fast(x, y), slow(x, y))


@pytest.mark.parametrize("task", TASKS)
def test_no_output_knows_its_target_or_later_ones(task):
    net, (x, y) = network(**TASKS[task]), episodes(task)
    expected = net(x, y)
    for t in range(x.shape[1]):
        changed = y.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 3
        output = net(x, changed)
        assert torch.equal(output[:, : t + 1], expected[:, : t + 1])
        if t + 1 < x.shape[1]:
            assert (output[:, t + 1] != expected[:, t + 1]).any()


# The same thing computed in two ways


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_episodes_equal_single_steps_with_their_gradients(task, fast):
    net, (x, y) = network(fast=fast, lively=fast, **TASKS[task]), episodes(task)
    gradients = []
    for run in (net, lambda x, y: stepped(net, x, y)[0]):
        net.zero_grad()
        output = run(x, y)
        output.square().mean().backward()
        gradients.append([output, *(p.grad for p in net.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_kernel_equals_the_matrix():
    torch.manual_seed(0)
    layer = PlasticLinear(3, 2, rate=0.5, decay=0.8, scale=2.0).double()
    x, delta = torch.randn(5, 4, 3).double(), torch.randn(5, 4, 2).double()
    fast = layer.init_state(5)
    for t in range(4):
        recalled = ((x[:, t : t + 1] @ x.mT) * layer.kernel(4)[t]) @ delta
        torch.testing.assert_close(layer(x[:, t], fast) - layer(x[:, t]), recalled[:, 0])
        fast = layer.update(fast, x[:, t], delta[:, t])


@pytest.mark.parametrize("task", TASKS)
def test_true_gradients_are_those_of_autograd(task):
    net, (x, y) = network(**TASKS[task]), episodes(task)
    trace = net.trace(x, y)
    query, before = true_gradients(net, trace)
    state, target = net.init_state(len(x)), net.targets(y, len(x))
    for t in range(x.shape[1]):
        output, context = net.step(state, x[:, t])
        loss = F.mse_loss(output, target[:, t], reduction="sum") / 2
        if task == "classification":
            loss = F.cross_entropy(output, target[:, t], reduction="sum")
        expected = torch.autograd.grad(loss, (context.query, context.before, context.output), retain_graph=True)
        for a, b in zip((query[:, t], before[:, t], trace.error[:, t]), expected, strict=True):
            torch.testing.assert_close(a, b)
        state = net.observe(state, context, y[:, t])


# Training


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("through_time", [True, False])
def test_both_ways_of_training_lower_the_loss(through_time, precision):
    net, before = network(dtype=torch.float32, lively=False), random_state()
    rule = FastSlowTraining(through_time)
    result = fit(net, sine_episodes(320, 6, seed=1), rule=rule, optimizer=adam(5e-3), batch_size=33, epochs=2, device="cpu",
                 clip_norm=5.0, precision=precision, progress=False)  # fmt: skip
    assert result.history["loss"][-1] < result.history["loss"][0]
    assert result.history["synthetic"][-1] > 0
    assert str(random_state()) == str(before)


def test_decoupled_controllers_follow_their_synthetic_gradients():
    net, (x, y) = network(), episodes()
    state, corrections = net.init_state(4), []
    with torch.no_grad():
        for t in range(x.shape[1]):
            _, context = net.step(state, x[:, t])
            learned = net.learned(state, context, y[:, t])
            corrections.append(learned.signals[3])
            state = learned.state
    rule = FastSlowTraining(backprop_through_time=False)
    rule.prepare(net, (x, y))
    rule.step((x, y), torch.Tensor.backward)
    torch.testing.assert_close(net.readout.bias.grad, torch.stack(corrections).mean((0, 1)))
    without = {name for name, p in net.named_parameters() if p.grad is None}
    assert without == {"memory.initial"} | {n for n, _ in net.named_parameters() if "log_rate" in n or "decay" in n}


def test_two_networks_share_a_feedback_path():
    first = network()
    second = network(feedback=first.feedback)
    both, data = nn.ModuleList([first, second]), (*episodes(), *episodes(seed=1))
    rule, alone = FastSlowTraining(), []
    for net, batch in ((both, data), (first, data[:2]), (second, data[2:])):
        both.zero_grad()
        rule.prepare(net, batch)
        rule.step(batch, torch.Tensor.backward)
        alone.append([p.grad.clone() for p in first.feedback.parameters()])
    for shared, a, b in zip(*alone, strict=True):
        torch.testing.assert_close(shared, (a + b) / 2)
    with pytest.raises(ValueError, match="share it need equal"):
        network(feedback=first.feedback, width=7)
    with pytest.raises(ValueError, match="uses no feedback"):
        network(feedback=first.feedback, fast=False)
    with pytest.raises(ValueError, match="each of 2 networks"):
        rule.prepare(both, data[:2])
    first.feedback.requires_grad_(False)
    for through_time in (True, False):
        rule = FastSlowTraining(through_time)
        rule.prepare(second, data[2:])
        rule.step(data[2:], torch.Tensor.backward)


# Online use


def test_learns_from_a_stream_without_going_backward():
    x, y = prototype_episodes(600, 3, 3, 4, noise=0.3, seed=1)
    net = network(dtype=torch.float32, lively=False, **TASKS["classification"])
    fit(net, (x, y), rule=FastSlowTraining(), optimizer=adam(1e-2), batch_size=32, epochs=4, clip_norm=5.0, device="cpu",
        progress=False)  # fmt: skip
    stream = clone(FastSlowEstimator(net), safe=False)
    with pytest.raises(NotFittedError):
        stream.predict(x[0])
    weights = copy.deepcopy(net.state_dict())
    x, y = prototype_episodes(1, 3, 20, 4, noise=0.1, seed=2)
    names = np.array(["a", "b", "c"])[y[0]]
    for part in range(0, 30, 10):
        stream.partial_fit(x[0, part : part + 10], names[part : part + 10])
    assert stream.score(x[0, 30:], names[30:]) > 0.6
    assert stream.n_seen_ == 30
    assert set(stream.classes_) == {"a", "b", "c"}
    np.testing.assert_allclose(stream.predict_proba(x[0]).sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(stream.predict_proba(x[0, :1]), stream.predict_proba(x[0])[:1], rtol=1e-4, atol=1e-6)
    whole = FastSlowEstimator(net).fit(x[0, :30], names[:30])
    torch.testing.assert_close(whole.state_.memory, stream.state_.memory)
    again = pickle.loads(pickle.dumps(stream))
    assert (again.predict(x[0]) == stream.predict(x[0])).all()
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    assert net.training is False
    with pytest.raises(ValueError, match="at most 3 classes"):
        stream.partial_fit(x[0, :1], ["d"])
    with pytest.raises(ValueError, match="finite"):
        stream.predict(x[0] * float("nan"))


def test_states_move_and_are_kept():
    net, (x, y) = network(), episodes()
    _, state = stepped(net, x, y)
    assert not state.detach().memory.requires_grad
    assert state.to(torch.float32).hidden.dtype == torch.float32
    again = FastState(**state.detach().state_dict())
    torch.testing.assert_close(net.step(again, x[:, 0])[0], net.step(state, x[:, 0])[0])
    assert set(network(fast=False, lively=False).init_state(2).state_dict()) == {"memory"}
    copied = pickle.loads(pickle.dumps(net))
    assert torch.equal(copied(x, y), net(x, y))
    assert "FeedbackPath" in repr(net)


# Networks and episodes of other kinds


def test_images_by_a_convolution_in_half_precision():
    torch.manual_seed(0)
    x, y = class_episodes(torch.randn(60, 1, 6, 6), torch.arange(60) % 4, 3, (2, 1, 3), episodes=3)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 12), nn.Dropout(0.1))
    net = FastSlowMemoryNetwork(encoder, 3, task="classification", slots=4, width=5, hidden=12).bfloat16()
    output = net(x.bfloat16(), y)
    assert output.shape == (3, 6, 3)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


def test_labels_of_episodes_are_shuffled_and_seeded():
    before = random_state()
    x, y = prototype_episodes(400, 5, (5, 5, 5, 5, 2), 3)
    assert x.shape == (400, 22, 3)
    counts = F.one_hot(y, 5).sum(1)
    assert (counts.sort(1).values == torch.tensor([2, 5, 5, 5, 5])).all()
    rare = counts.argmin(1)
    assert (F.one_hot(rare, 5).float().mean(0) - 0.2).abs().max() < 0.07
    assert torch.equal(prototype_episodes(3, seed=4)[0], prototype_episodes(3, seed=4)[0])
    assert not torch.equal(sine_episodes(3, seed=4)[0], sine_episodes(3, seed=5)[0])
    X = torch.arange(40).float()[:, None]
    drawn, named = class_episodes(X, torch.arange(40) % 8, 4, 3, episodes=50)
    assert all(len(row.unique()) == 12 for row in drawn)  # no example twice
    origin = (drawn[..., 0] % 8).long()
    for k in range(50):
        assert len(torch.stack((origin[k], named[k]), 1).unique(dim=0)) == 4  # one label for each class
    assert str(random_state()) == str(before)
    with pytest.raises(ValueError, match="at least 9 classes"):
        class_episodes(X, torch.arange(40) % 8, 9, 1, episodes=1)
    with pytest.raises(ValueError, match="at least 6 examples"):
        class_episodes(X, torch.arange(40) % 8, 2, 6, episodes=1)


def test_refusals():
    net, (x, y) = network(**TASKS["classification"]), episodes("classification")
    with pytest.raises(TypeError, match="not one-hot"):
        net(x, F.one_hot(y, 3).double())
    with pytest.raises(ValueError, match="labels from 0 to 2, got"):
        net(x, y + 1)
    with pytest.raises(ValueError, match="T >= 1"):
        net(x[:, :0], y[:, :0])
    with pytest.raises(ValueError, match="NaN"):
        net(x * float("nan"), y)
    with pytest.raises(ValueError, match="NaN"):
        network()(*(v * (1 if k == 0 else float("nan")) for k, v in enumerate(episodes())))
    with pytest.raises(TypeError, match="floating point"):
        network()(episodes()[0], episodes("classification")[1][:, :1].expand(-1, 7))
    with pytest.raises(ValueError, match=r"codes \[N, 12\]"):
        FastSlowMemoryNetwork(nn.Linear(4, 3), 3, hidden=12, task="classification").double()(x, y)
    with pytest.raises(ValueError, match="lambda_sg"):
        network(lambda_sg=float("nan"))
    with pytest.raises(ValueError, match="with a fast path"):
        FastSlowTraining(False).prepare(network(fast=False, lively=False), episodes())
    with pytest.raises(TypeError, match="FastSlowMemoryNetwork"):
        FastSlowTraining().prepare(nn.Linear(1, 1), episodes())
    with pytest.raises(ValueError, match="hidden"):
        FeedbackPath((3,), 1, hidden=0)


def test_foreign_networks_and_inputs_are_refused_in_a_sentence():
    net, (x, y) = network(), episodes()
    with pytest.raises(ValueError, match="each of 2 sequences"):
        net.step(net.init_state(2), x[:, 0])
    with pytest.raises(ValueError, match="NaN"):
        net.step(net.init_state(4), x[:, 0] * float("nan"))
    with pytest.raises(TypeError, match=r"codes .* got tuple"):
        FastSlowMemoryNetwork(nn.LSTM(1, 40), 1)(x.float(), y.float())
    with pytest.raises(TypeError, match="module as encoder"):
        FastSlowMemoryNetwork(None, 1)
    with pytest.raises(TypeError, match="FastSlowMemoryNetwork, got Linear"):
        FastSlowEstimator(nn.Linear(1, 1)).fit(x[0], y[0])
    classes = FastSlowEstimator(network(dtype=torch.float32, **TASKS["classification"]))
    with pytest.raises(ValueError, match="NaN among"):
        classes.fit(np.ones((2, 4)), [1.0, float("nan")])
    with pytest.raises(ValueError, match=r"\(x, y, y\)"):
        evaluate(net, (x, y), rule=FastSlowTraining())


def test_a_stream_may_be_a_table_or_tokens():
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame(np.arange(12).reshape(3, 4), columns=list("abcd"))
    stream = FastSlowEstimator(network(dtype=torch.float32, **TASKS["classification"])).fit(table, ["u", "v", "u"])
    assert (stream.predict(table) == stream.predict(table.to_numpy().astype(float))).all()
    words = FastSlowMemoryNetwork(nn.EmbeddingBag(9, 40), 2, task="classification")
    assert FastSlowEstimator(words).fit(torch.tensor([[1, 8], [2, 3]]), [0, 1]).predict(
        torch.tensor([[4, 5]])
    ).shape == (1,)


@pytest.mark.parametrize("task", TASKS)
def test_validation_is_the_loss_of_episodes(task):
    net, (x, y) = network(**TASKS[task]), episodes(task)
    scores = evaluate(net, (x, y, y), rule=FastSlowTraining())
    torch.testing.assert_close(scores["loss"], episode_loss(net, net(x, y), net.targets(y, len(x))).item())
