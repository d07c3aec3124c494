"""The base classes: calibration, thresholds, files, time limits, and a network that is left alone whatever a method does."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn

from tests.contracts.detectors import Left, check_input_detector, check_model_detector
from torchfolio.backdoor import AllToOne, PatchTrigger, PoisonedDataset
from torchfolio.backdoor.defenses import Attack, TrainingDefense
from torchfolio.backdoor.detectors import InputDetector, ModelDetector, ModelVerdict
from torchfolio.backdoor.evaluation import evaluate_input_detector, evaluate_model_detector
from torchfolio.backdoor.input_detector import _digest


def examples(count: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return x, (x.mean((1, 2, 3)) > 0.5).long()


def network() -> nn.Sequential:
    last = nn.Linear(16, 2)
    with torch.no_grad():
        last.weight.copy_(torch.stack([-torch.ones(16), torch.ones(16)]))
        last.bias.copy_(torch.tensor([8.0, -8.0]))
    return nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.Flatten(), last).eval()


class Brightness(InputDetector):
    """How far an image's brightness lies from that of the clean ones."""

    def __init__(self, weight: float = 1.0, **settings) -> None:
        super().__init__(**settings)
        self.weight = weight

    def _settings(self):
        return {"weight": self.weight, "fpr": self.fpr, "calib_frac": self.calib_frac, "seed": self.seed}

    def _fit(self, model, clean):
        self.mean_ = clean[0].mean()
        self.noise_ = float(torch.rand(()))

    def _score(self, x):
        return self.weight * (x.mean((1, 2, 3)) - self.mean_.to(x)).abs()


class Meddler(InputDetector):
    """Trains, unfreezes, hooks and reseeds, then fails or not."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails = fails

    def _fit(self, model, clean):
        torch.manual_seed(1)
        model.train().requires_grad_(True)
        model.register_forward_hook(lambda *_: None)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(clean[0]).sum().backward()
        optimizer.step()
        if self.fails:
            raise RuntimeError("on the way")

    def _score(self, x):
        self.model_.train()
        return self.model_(x).double().sum(1)


class Largest(ModelDetector):
    def __init__(self, fails: bool = False, slow: float = 0.0) -> None:
        self.fails, self.slow = fails, slow

    def _scan(self, model, clean, scan):
        assert clean is not None
        model.train()
        model(clean[0])
        seen = 0
        for _ in scan.items(range(4), "parts"):
            time.sleep(self.slow)
            seen += 1
        if self.fails:
            raise RuntimeError("on the way")
        return ModelVerdict(True, float(seen) + float(torch.rand(())), 0.5, ((0, 1),))


def test_the_contracts_hold_for_small_detectors(tmp_path):
    check_input_detector(lambda: Brightness(fpr=0.02, weight=2.0), network(), examples(), tmp_path)
    verdict = check_model_detector(Largest, network(), examples())
    assert verdict.sentences(["cat", "dog"])[1] == "Suspected, from class to class: cat to dog."


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.filterwarnings("ignore:.*cannot tell")
def test_nothing_that_a_method_does_reaches_the_network(fails):
    net = network().train()
    list(net.parameters())[-1].requires_grad_(False)
    left = Left(net)
    if fails:
        for call in (lambda: Meddler(True).fit(net, examples()), lambda: Largest(True).scan(net, examples())):
            with pytest.raises(RuntimeError, match="on the way"):
                call()
    else:
        Meddler(False).fit(net, examples()).score(examples()[0])
        Largest().scan(net, examples())
    left.check()


class Rude:
    """No subclass: it changes the network where it is judged."""

    def __init__(self, net) -> None:
        self.net = net

    def score(self, x):
        self.net.train().requires_grad_(False)
        self.net(x)
        return x.mean((1, 2, 3))

    def predict(self, x, fpr=None):
        raise RuntimeError("on the way")

    def scan(self, model, clean=None):
        self.net.train()(examples()[0])
        return ModelVerdict(False, 0.0, 1.0)


def test_evaluation_restores_what_strangers_change():
    net, (x, y) = network(), examples()
    attacked = PoisonedDataset((x, y), torch.arange(40).numpy(), y[:40].numpy(), 1 - y[:40].numpy(),
                               torch.ones(40, dtype=torch.uint8).numpy(), trigger=nn.Identity(), cover_trigger=None,
                               label_map=AllToOne(0, 2), info={"quantize": False})  # fmt: skip
    left = Left(net)
    with pytest.raises(RuntimeError, match="on the way"):
        evaluate_input_detector(Rude(net), net, (x, y), attacked)  # pyright: ignore[reportArgumentType]
    left.check()
    evaluate_model_detector(Rude(net), [(net, True), (net, False)])  # pyright: ignore[reportArgumentType]
    left.check()


def test_a_failed_fit_leaves_nothing_to_score_with():
    made = Brightness(fpr=0.02).fit(network(), examples())
    with pytest.raises(ValueError, match="integer labels"):
        made.fit(network(), (examples()[0], torch.rand(400)))
    with pytest.raises(RuntimeError, match="fit"):
        made.score(examples()[0])


class Undefined(Brightness):
    def _score(self, x):
        return torch.where(x.mean((1, 2, 3)) > 0.5, torch.nan, 0.0)


def test_scores_that_are_no_numbers_are_refused_in_fit_and_suspicious_later():
    with pytest.raises(ValueError, match="finite scores"):
        Undefined(fpr=0.02).fit(network(), examples())
    made = Brightness(fpr=0.02).fit(network(), examples())
    made.mean_ = torch.tensor(torch.nan)
    assert made.predict(examples()[0]).all()


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        ((torch.rand(9, 1, 4, 4), torch.zeros(9, dtype=torch.long)), "two classes"),
        ((torch.rand(9, 1, 4, 4), torch.arange(9)), "from 0 to 1"),
        ((torch.rand(9, 1, 4, 4), torch.rand(9)), "integer labels"),
        ((examples()[0], 1 - examples()[1]), "gets none"),
    ],
)
def test_bad_examples_are_refused(clean, message):
    with pytest.raises(ValueError, match=message):
        Brightness().fit(network(), clean)


@pytest.mark.parametrize("value", [0, 1, torch.nan, "1"])
def test_bad_shares_are_refused(value):
    with pytest.raises((TypeError, ValueError), match="fpr"):
        Brightness(fpr=value)
    with pytest.raises((TypeError, ValueError), match="calib_frac"):
        Brightness(calib_frac=value)


def _signed(record, folder):
    body = json.loads(record)
    body["sha256"] = _digest(body, (folder / "detector.safetensors").read_bytes())
    return json.dumps(body)


def test_files_of_other_detectors_and_bad_records_are_refused(tmp_path):
    net = network()
    Brightness(fpr=0.02).fit(net, examples()).save(tmp_path)
    with pytest.raises(ValueError, match="filter of Undefined"):
        Undefined.load(tmp_path, net)
    record = (tmp_path / "detector.json").read_text()
    for bad, message in (
        ("{", "not JSON"),
        ("[]", "not the record"),
        (record.replace('"weight"', '"wait"'), "was changed after it was written"),
        (_signed(record.replace('"weight"', '"wait"'), tmp_path), "settings"),
        (record.replace("0.02", "0.03"), "was changed after it was written"),
    ):
        (tmp_path / "detector.json").write_text(bad)
        with pytest.raises(ValueError, match=message):
            Brightness.load(tmp_path, net)


def test_what_cannot_be_saved_is_said(tmp_path):
    made = Brightness(fpr=0.02).fit(network(), examples())
    setattr(made, "net_", nn.Linear(2, 2))  # noqa: B010
    with pytest.raises(ValueError, match="another architecture"):
        made.save(tmp_path)
    setattr(made, "net_", print)  # noqa: B010
    with pytest.raises(ValueError, match="cannot be saved"):
        made.save(tmp_path)


def test_a_scan_keeps_its_time_limit_and_says_so():
    with pytest.warns(UserWarning, match="cut short"):
        verdict = Largest(slow=0.1).scan(network(), examples(), budget_seconds=0.15)
    assert not verdict.complete
    assert int(verdict.score) in (1, 2)
    assert "cut short" in " ".join(verdict.sentences())
    with pytest.raises(ValueError, match="budget_seconds"):
        Largest().scan(network(), examples(), budget_seconds=0)


def test_inputs_alone_get_the_networks_labels():
    class Labels(ModelDetector):
        def _scan(self, model, clean, scan):
            assert clean is not None
            return ModelVerdict(False, float((model(clean[0]).argmax(1) == clean[1]).double().mean()), 2.0)

    assert Labels().scan(network(), examples()[0]).score == 1


def test_attacks_poison_and_defences_deploy_what_they_are_told():
    class Patch(Attack):
        rate = 0.25

        def fit(self):
            self.trigger, self.labels = PatchTrigger.checkerboard((1, 4, 4), size=1, margin=0), AllToOne(1, 2)
            return self

    class Nothing(TrainingDefense):
        def prepare(self, dataset, *, clean=None, seed=0):
            return dataset

    with pytest.raises(RuntimeError, match="fit first"):
        Patch().poison(examples(), 0)
    assert Patch().fit().poison(examples(), 0).is_poison.sum() == 100
    net = network()
    assert Nothing().wrap(net) is net
    with pytest.raises(TypeError, match="abstract"):
        TrainingDefense()  # pyright: ignore[reportAbstractUsage]
