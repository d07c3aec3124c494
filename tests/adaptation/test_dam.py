"""DAM: the merging formula, what each step may move, and errors."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchfolio.adaptation.dam import ConcreteMerging, DefenseAwareMerging
from torchfolio.adaptation.mask_training import MaskTraining
from torchfolio.adaptation.merge import Average, TaskArithmetic
from torchfolio.adaptation.merging import (
    AdaMerging,
    Stream,
    TaskVectors,
    average,
    initial_weights,
    merge,
    task_arithmetic,
    task_vectors,
)
from torchfolio.models import MLP, ConvNet

# Random networks are confident of one class at once, which is no matter here.
pytestmark = pytest.mark.filterwarnings("ignore:.*of one class")


def networks(tasks: int = 3, make=lambda: MLP(6, 4, (8,))) -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(0)
    base = make()
    tuned = []
    for _ in range(tasks):
        net = copy.deepcopy(base)
        with torch.no_grad():
            for p in net.parameters():
                p += 0.3 * torch.randn_like(p)
        tuned.append(net)
    return base, tuned


def inputs(tasks: int = 3, shape: tuple[int, ...] = (6,)) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.rand(20, *shape) for _ in range(tasks)]


def state_of(method: DefenseAwareMerging) -> tuple[MaskTraining, list[torch.Tensor]]:
    base, tuned = networks()
    tasks = TaskVectors(base, tuned)
    return MaskTraining(method, tasks, initial_weights(tasks, method.weight, method.layerwise)), inputs()


SMALL = {"steps": 4, "adapt_steps": 0, "mask_lr": 2e-2, "delta_lr": 2e-2}


def test_mask_of_ones_is_task_arithmetic_bit_for_bit():
    base, tuned = networks()
    vectors = task_vectors(base, tuned)
    ones = {name: torch.ones_like(v) for name, v in vectors[0].items()}
    plain, masked = task_arithmetic(base, tuned, 0.3), merge(base, vectors, 0.3, ones)
    assert all(torch.equal(plain[k], masked[k]) for k in plain)
    tasks = TaskVectors(base, tuned)
    weights = initial_weights(tasks, 0.3, False)
    assert torch.equal(tasks.theta(weights), tasks.theta(weights, torch.ones_like(tasks.base)))
    for name, value in tasks.unflatten(tasks.theta(weights)).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-6, atol=1e-6)


def test_no_steps_and_no_rate_are_task_arithmetic():
    base, tuned = networks()
    result = DefenseAwareMerging(steps=0, adapt_steps=0).fit(base, tuned, inputs())
    for name, value in task_arithmetic(base, tuned, 0.3).items():
        torch.testing.assert_close(result.model.state_dict()[name], value)


def test_without_safety_a_single_mask_is_concrete_merging():
    base, tuned = networks()
    ours = DefenseAwareMerging(masks="single", alpha=0.0, **SMALL).fit(base, tuned, inputs())
    concrete = ConcreteMerging(**{k: v for k, v in SMALL.items() if k != "delta_lr"}).fit(base, tuned, inputs())
    assert all(torch.equal(ours.masks[k], concrete.masks[k]) for k in ours.masks)


@pytest.mark.parametrize("masks", ["dual", "single"])
def test_every_rescaled_mask_has_mean_one(masks):
    training, x = state_of(DefenseAwareMerging(masks=masks, **SMALL))
    for step in range(3):
        training.step(x, step)
    for phi in training.phis:
        for mask in (training._sample(phi), training._rescale(torch.sigmoid(phi))):
            for part in mask.split(training.tasks.sizes):
                assert abs(float(part.detach().double().mean()) - 1) < 1e-6


def test_detection_moves_the_perturbations_alone():
    training, x = state_of(DefenseAwareMerging(**SMALL))
    training._start_perturbations(x)
    theta = training.tasks.theta(training.weights, torch.ones_like(training.tasks.base))
    before = [training.weights.clone(), *[phi.detach().clone() for phi in training.phis]]
    training._detect(theta, x)
    assert all(torch.equal(a, b) for a, b in zip(before, [training.weights, *training.phis], strict=True))
    assert all(phi.grad is None for phi in training.phis)
    assert all(delta.abs().max() > 0 for delta in training.deltas)


def test_the_search_finds_its_way_back_from_below_the_range():
    """A perturbation that is negative where every input is 0 changes nothing, and yet has a gradient."""
    training, _ = state_of(DefenseAwareMerging(**{**SMALL, "delta_lr": 1e-3}))
    x = [torch.zeros(4, *t.shape[1:]) for t in inputs()]
    training._start_perturbations(x)
    for delta in training.deltas:
        delta.data.fill_(-0.1)
    training._detect(training.tasks.theta(training.weights, torch.ones_like(training.tasks.base)), x)
    assert all((delta.detach() != -0.1).any() for delta in training.deltas)


def test_restarts_find_stronger_perturbations_than_chance_and_leave_masks_alone():
    training, x = state_of(DefenseAwareMerging(search="restarts", delta_steps=4, **SMALL))
    training._start_perturbations(x)
    theta = training.tasks.theta(training.weights, torch.ones_like(training.tasks.base))
    before = training.generator.get_state()
    labels, _ = training._detect(theta, x)
    found = [d.detach().clone() for d in training.deltas]
    training._restart()
    drawn = [d.detach().clone() for d in training.deltas]

    def damage(deltas):
        logits = training.tasks.logits(theta, training._perturbed(x, deltas))
        return sum(float(nn.functional.cross_entropy(z, y)) for z, y in zip(logits, labels, strict=True))

    assert damage(found) > damage(drawn)
    assert not torch.equal(found[0], drawn[0])
    assert torch.equal(before, training.generator.get_state())


def test_each_loss_reaches_its_own_mask():
    training, x = state_of(DefenseAwareMerging(**SMALL))
    reached = []
    for optimizer in training.mask_optimizers:
        optimizer.register_step_post_hook(lambda *_: (reached.append(with_gradient()), clear()))

    def with_gradient() -> list[bool]:
        return [phi.grad is not None and bool(phi.grad.abs().sum() > 0) for phi in training.phis]

    def clear() -> None:
        for phi in training.phis:
            phi.grad = None

    training.step(x, 0)
    assert reached == [[True, False], [False, True]]


@pytest.mark.parametrize("search", ["adam", "restarts"])
def test_perturbations_stay_within_their_bound_and_inputs_in_range(search):
    settings = {**SMALL, "delta_lr": 1.0, "search": search, "delta_steps": 3}
    training, x = state_of(DefenseAwareMerging(epsilon=0.05, input_range=(-1.0, 3.0), **settings))
    for step in range(3):
        training.step(x, step)
    assert all(float(d.detach().abs().max()) <= 0.05 * 4 + 1e-6 for d in training.deltas)
    assert all(p.min() >= -1 and p.max() <= 3 for p in training._perturbed(x, training.deltas))


def test_result_is_the_formula_in_a_plain_state_dict():
    base, tuned = networks()
    before = copy.deepcopy(base.state_dict())
    result = DefenseAwareMerging(**{**SMALL, "adapt_steps": 3}).fit(base, tuned, inputs())
    formula = merge(base, task_vectors(base, tuned), result.weights, result.masks)
    for name, value in result.model.state_dict().items():
        assert type(value) is torch.Tensor
        torch.testing.assert_close(value, formula[name], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    assert len(result.to_frame()) == 7
    pickle.loads(pickle.dumps(result))


def test_seeds_reproduce_and_differ():
    base, tuned = networks()
    first, again, other = (DefenseAwareMerging(seed=s, **SMALL).fit(base, tuned, inputs()).masks for s in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_heads_and_forward_agree():
    base, tuned = networks()
    torch.manual_seed(2)
    heads = [nn.Linear(4, n) for n in (2, 3, 5)]
    with_heads = DefenseAwareMerging(**SMALL).fit(base, tuned, inputs(), heads=heads)
    with_forward = DefenseAwareMerging(**SMALL).fit(
        base, tuned, inputs(), forward=lambda net, x, task: heads[task](net(x))
    )
    for name, value in with_heads.masks.items():
        torch.testing.assert_close(value, with_forward.masks[name], rtol=1e-4, atol=1e-5)


def test_other_network_loaders_and_layerwise_coefficients():
    base, tuned = networks(2, lambda: ConvNet(num_classes=3, in_channels=2))
    loaders = [DataLoader(TensorDataset(x, torch.zeros(20)), 8) for x in inputs(2, (2, 8, 8))]
    result = DefenseAwareMerging(layerwise=True, **{**SMALL, "adapt_steps": 2}).fit(base, tuned, loaders)
    assert result.weights.shape == (2, len(result.masks))
    assert result.model(torch.rand(3, 2, 8, 8)).shape == (3, 3)
    assert [tuple(d.shape) for d in result.perturbations] == [(2, 8, 8)] * 2


def test_tasks_of_different_input_shape():
    base, tuned = networks(2, lambda: ConvNet(num_classes=3, in_channels=1))
    x = [torch.rand(12, 1, 8, 8), torch.rand(12, 1, 12, 12)]
    result = DefenseAwareMerging(**SMALL).fit(base, tuned, x)
    assert [tuple(d.shape) for d in result.perturbations] == [(1, 8, 8), (1, 12, 12)]


def test_frozen_parameters_are_not_merged():
    base, tuned = networks()
    first = next(iter(base.parameters()))
    first.requires_grad_(False)
    name = next(iter(dict(base.named_parameters())))
    with pytest.raises(ValueError, match=f"checkpoint 0 changed {name}, which is frozen"):
        DefenseAwareMerging(**SMALL).fit(base, tuned, inputs())
    with torch.no_grad():
        for net in tuned:
            dict(net.named_parameters())[name].copy_(first)
    result = DefenseAwareMerging(**SMALL).fit(base, tuned, inputs())
    assert name not in result.masks
    assert torch.equal(result.model.state_dict()[name], first)
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in base.parameters()]


def test_adamerging_lowers_entropy():
    base, tuned = networks()
    history = AdaMerging(steps=60, lr=1e-2, batch_size=20).fit(base, tuned, inputs()).to_frame()["entropy"]
    assert history.iloc[-1] < history.iloc[0]


def test_average_is_the_mean():
    _, tuned = networks(2)
    merged = average(tuned)
    a, b = (t.state_dict() for t in tuned)
    assert all(torch.allclose(merged[k], (a[k] + b[k]) / 2) for k in merged)


def test_differing_statistics_warn_and_may_be_averaged():
    base, tuned = networks(2, lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    tuned[0][1].running_mean += 1.0
    with pytest.warns(UserWarning, match="running_mean"):
        result = DefenseAwareMerging(**SMALL).fit(base, tuned, inputs(2), buffers="average")
    torch.testing.assert_close(result.model[1].running_mean, torch.full((4,), 0.5))


def test_one_door_for_all_ways_to_merge():
    base, tuned = networks(2, lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    tuned[0][1].running_mean += 1.0
    for buffers, mean in (("pretrained", 0.0), ("average", 0.5)):
        model = TaskArithmetic(0.4).fit(base, tuned, buffers=buffers).model
        torch.testing.assert_close(model[1].running_mean, torch.full((4,), mean))
    for method in (Average(), TaskArithmetic(), AdaMerging(steps=1), DefenseAwareMerging(**SMALL)):
        with pytest.raises(ValueError, match="buffers"):
            method.fit(base, tuned, inputs(2), buffers="mean")
        with pytest.raises(ValueError, match="got both"):
            method.fit(base, tuned, inputs(2), heads=nn.Identity(), forward=lambda model, x, task: model(x))
        with pytest.raises(ValueError, match="at least 2"):
            method.fit(base, tuned[:1], inputs(1))


def test_networks_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=3)
    base, tuned = networks(2, lambda: transformers.ViTForImageClassification(config))
    x = inputs(2, (1, 8, 8))
    logits = lambda model, x, task: model(x).logits  # noqa: E731
    result = DefenseAwareMerging(**{**SMALL, "steps": 2}).fit(base, tuned, x, forward=logits)
    assert isinstance(result.model, transformers.ViTForImageClassification)
    assert result.model(x[0]).logits.shape == (20, 3)
    assert result.perturbations[0].shape == (1, 8, 8)


def test_errors_name_what_is_wrong():
    base, tuned = networks()
    method = DefenseAwareMerging(**SMALL)
    with pytest.raises(ValueError, match="at least 2"):
        method.fit(base, tuned[:1], inputs(1))
    with pytest.raises(ValueError, match="each of the 3"):
        method.fit(base, tuned, inputs(2))
    with pytest.raises(ValueError, match="lacks"):
        method.fit(base, [*tuned[:2], {}], inputs())
    with pytest.raises(ValueError, match="of shape"):
        method.fit(base, [*tuned[:2], MLP(6, 4, (9,))], inputs())
    with pytest.raises(ValueError, match="NaN"):
        method.fit(base, tuned, [*inputs(2), torch.full((4, 6), torch.nan)])
    with pytest.raises(ValueError, match="outside of the input range"):
        method.fit(base, tuned, [*inputs(2), torch.full((4, 6), 7.0)])
    with pytest.raises(ValueError, match="one head or 3"):
        method.fit(base, tuned, inputs(), heads=[nn.Identity()] * 2)
    with pytest.raises(ValueError, match="nothing to merge"):
        method.fit(copy.deepcopy(base).requires_grad_(False), tuned, inputs())
    with pytest.raises(ValueError, match="gives no batch"):
        method.fit(base, tuned, [[], [], []])
    with pytest.raises(ValueError, match="safety"):
        DefenseAwareMerging(safety="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="search to be 'adam' or 'restarts', got 'none'"):
        DefenseAwareMerging(search="none")  # type: ignore[arg-type]
    for option in (
        {"delta_steps": 0},
        {"adapt_steps": -1},
        {"batch_size": 0},
        {"mask_lr": math.nan},
        {"epsilon": -0.1},
    ):
        with pytest.raises(ValueError, match=next(iter(option))):
            DefenseAwareMerging(**option)
    with pytest.raises(ValueError, match="weights of shape"):
        merge(base, task_vectors(base, tuned), [0.1, 0.2])
    with pytest.raises(TypeError, match="alpha"):
        ConcreteMerging(alpha=1.0)


def test_collapse_warns():
    base, tuned = networks()
    for net in tuned:
        with torch.no_grad():
            list(net.parameters())[-1][0] += 100
    with pytest.warns(UserWarning, match="one class"):
        DefenseAwareMerging(**SMALL).fit(base, tuned, inputs())


def test_stream_shuffles_without_loss():
    x = torch.arange(10.0)[:, None]
    stream = Stream([x], 1, 5, 0, torch.device("cpu"))
    seen = torch.cat([stream.draw()[0] for _ in range(2)])
    assert sorted(seen.flatten().tolist()) == list(range(10))
