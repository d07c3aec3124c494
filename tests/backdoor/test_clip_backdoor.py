"""The guided attack: its losses, its ball, its triggers by hand, who carries them, and CLIP from transformers."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.contracts.detectors import Left
from torchfolio.backdoor import (
    AllToOne,
    BlendTrigger,
    CLIPGuidedAttack,
    clean_feature_erase,
    poisoned_test,
    universal_trigger,
)
from torchfolio.backdoor.clip_backdoor import DataConstraint
from torchfolio.backdoor.guided_noise import agreement_loss, erasing_loss, target_loss
from torchfolio.backdoor.image_text import CLIPEncoder, PrototypeEncoder
from torchfolio.backdoor.poison import load
from torchfolio.backdoor.zoo import SmallConvNet

EPS = 8 / 255


def encoder(classes: int = 4, channels: int = 3, seed: int = 0) -> PrototypeEncoder:
    torch.manual_seed(seed)
    net = SmallConvNet(channels, classes, 4)
    backbone = nn.Sequential(*list(net.children())[:-1], nn.Dropout(0.2))
    return PrototypeEncoder(backbone, torch.randn(classes, 16))


def pixels(n: int = 40, channels: int = 3, side: int = 8, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, side, side), generator=generator).float() / 255


def labelled(n: int = 40, classes: int = 4, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    return pixels(n, **settings), torch.arange(n) % classes


class Flat(PrototypeEncoder):
    """The image itself as feature: everything can be worked out by hand."""

    def __init__(self, prototypes: torch.Tensor, logit_scale: float = 1.0) -> None:
        super().__init__(nn.Flatten(), prototypes, logit_scale)


def test_erasing_loss_is_zero_exactly_where_the_encoder_knows_nothing():
    guide = Flat(torch.eye(2)).double()
    even = torch.full((1, 1, 1, 2), 0.3, dtype=torch.float64, requires_grad=True)
    loss = erasing_loss(guide, even)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss.sum(), even)
    assert gradient.abs().max() == 0
    uneven = torch.tensor([[[[0.3, 0.4]]]], dtype=torch.float64, requires_grad=True)
    loss = erasing_loss(guide, uneven)
    h = math.exp(0.6) / (math.exp(0.6) + math.exp(0.8))  # the cosines are 3/5 and 4/5
    assert loss.item() == pytest.approx((h - 0.5) ** 2, rel=1e-12)
    assert torch.autograd.grad(loss.sum(), uneven)[0].abs().min() > 0


def test_erasing_loss_passes_gradcheck():
    guide = encoder().double().eval().requires_grad_(False)
    x = pixels(1, side=4).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: erasing_loss(guide, x), (x,))


def test_images_that_are_alike_agree():
    guide = encoder().double().eval()
    x = pixels(1).double().expand(6, -1, -1, -1).clone().requires_grad_(True)
    loss = agreement_loss(guide, x)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, x)[0].abs().max() < 1e-12
    odd = pixels(5).double()  # the last of five is left out; image j is compared with j + 2
    f = F.normalize(guide.encode_image(odd), dim=1)
    by_hand = 1 - ((f[0] * f[2]).sum() + (f[1] * f[3]).sum()) / 2
    torch.testing.assert_close(agreement_loss(guide, odd), by_hand)


def test_with_no_room_nothing_changes():
    guide, x = encoder(), pixels()
    assert torch.equal(clean_feature_erase(guide, x, eps=0, steps=3), x)
    assert torch.equal(universal_trigger(guide, x, "cfa", eps=0, epochs=2)(x), x)
    attack = CLIPGuidedAttack(guide, 1, trigger="uap", constraint=DataConstraint.number(0.2), eps=0, epochs=1).fit(x)
    made = attack.poison(labelled(), seed=0)
    assert torch.equal(made.block(), x[made.source_index[made.is_poison]])


@pytest.mark.parametrize("target", [0, 1])
def test_two_pixels_by_hand(target):
    """The gradient of CE for the features x and classes e0, e1 has the sign of w_other - w_target everywhere."""
    guide, x = Flat(torch.eye(2)), torch.rand(8, 1, 1, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    trigger = universal_trigger(guide, x, "uap", target=target, eps=0.1, epochs=30, batch_size=4)
    difference = torch.eye(2)[target] - torch.eye(2)[1 - target]
    assert torch.equal(trigger.delta.flatten(), 0.1 * difference.sign())


def test_another_objective_is_a_function():
    """The authors' cross-entropy of probabilities that were normalised once already."""
    guide, x = encoder(), pixels()

    def twice(guide, x):
        return F.cross_entropy(guide(x).softmax(1), torch.full((len(x),), 2))

    made = universal_trigger(guide, x, twice, epochs=3)
    assert 0 < float(made.delta.abs().max()) <= EPS + 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_erasing_stays_in_its_ball_and_forgets(dtype):
    guide, x = encoder().to(dtype), torch.rand(30, 3, 9, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    left = Left(guide)
    erased = clean_feature_erase(guide, x, EPS, 10, seed=3)
    left.check()
    assert erased.dtype == dtype
    assert float((erased.double() - x.double()).abs().max()) <= EPS  # exactly
    assert erased.min() >= 0
    assert erased.max() <= 1
    guide.eval()
    with torch.no_grad():
        assert erasing_loss(guide, erased).mean() < 0.5 * erasing_loss(guide, x).mean()
    # Each image has its own start: neither batches nor order matter.
    parts = clean_feature_erase(guide, x[10:], EPS, 1, index=torch.arange(10, 30), batch_size=7, seed=3)
    whole = clean_feature_erase(guide, x, EPS, 1, seed=3)[10:]
    assert float((parts != whole).double().mean()) < 0.01  # signs of gradients that are zero but for rounding
    assert not torch.equal(clean_feature_erase(guide, x, EPS, 1, seed=4), clean_feature_erase(guide, x, EPS, 1, seed=3))


def test_triggers_do_what_they_are_for():
    guide, x = encoder(), pixels(60)
    held_out = pixels(60, seed=9)
    left = Left(guide)
    uap = universal_trigger(guide, x, "uap", target=2, eps=0.1, epochs=20, batch_size=20, seed=0)
    cfa = universal_trigger(guide, x, "cfa", eps=0.1, epochs=20, batch_size=25, seed=0)
    left.check()
    again = universal_trigger(guide, x, "cfa", eps=0.1, epochs=20, batch_size=25, seed=0)
    assert torch.equal(cfa.delta, again.delta)
    guide.eval()
    with torch.no_grad():
        assert target_loss(guide, uap(held_out), 2) < target_loss(guide, held_out, 2)
        assert agreement_loss(guide, cfa(held_out)) < agreement_loss(guide, held_out)


CONSTRAINTS = {
    "number": (DataConstraint.number(0.2), lambda y: y != 1),
    "target class": (DataConstraint.classes([1], 0.2), lambda y: y == 1),
    "another class": (DataConstraint.classes([3], 0.2), lambda y: y == 3),
    "domain": (DataConstraint.domain(1 - pixels(12, seed=5), 0.2), lambda y: y == -1),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("suppress", [True, False])
def test_poison_is_appended_to_what_the_attacker_holds(name, suppress, tmp_path):
    constraint, holds = CONSTRAINTS[name]
    data = labelled()
    blend = BlendTrigger.noise((3, 8, 8), 0.15)
    attack = CLIPGuidedAttack(
        encoder(), 1, trigger=blend, constraint=constraint, suppress=suppress, eps=EPS, erase_steps=2
    ).fit(data[0])
    made = attack.poison(data, seed=4)
    x, y = made.tensors()
    assert (len(made), int(made.is_poison.sum())) == (48, 8)
    assert torch.equal(x[:40], data[0])
    assert torch.equal(y[:40], data[1])
    assert (y[40:] == 1).all()
    assert holds(made.y_true[40:]).all()
    assert len(set(made.source_index[40:])) == 8
    carriers = torch.cat([data[0], 1 - pixels(12, seed=5)])[made.source_index[40:]]
    assert float((x[40:] - blend(carriers)).abs().max()) <= (EPS if suppress else 0) + 0.5 / 255 + 1e-6
    assert torch.equal((255 * x).round() / 255, x)
    for same in (attack.poison(data, seed=4), attack.poison(torch.utils.data.TensorDataset(*data), seed=4)):
        assert torch.equal(same.block(), made.block())
    assert not np.array_equal(attack.poison(data, seed=5).source_index, made.source_index)
    again = load(made.save(tmp_path), made.base)
    assert torch.equal(again.tensors()[0], x)
    figures = attack.stealth(made)
    assert figures.linf == pytest.approx(float((x[40:] - carriers).abs().flatten(1).amax(1).mean()), abs=1e-6)
    assert len(poisoned_test(data, attack.trigger, attack.labels)) == 30  # of all classes but the target


def test_one_channel_pickle_and_repr():
    guide = encoder(channels=1)
    attack = CLIPGuidedAttack(guide, 0, constraint=DataConstraint.number(0.1), epochs=1, erase_steps=1)
    data = labelled(channels=1, side=9)
    made = attack.fit(data[0]).poison(data, seed=0)
    for copied in (copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert torch.equal(copied.poison(data, seed=0).block(), made.block())
    again = encoder(channels=1, seed=1)
    again.load_state_dict(guide.state_dict())
    assert torch.equal(again.eval()(data[0]), guide.eval()(data[0]))
    assert "PrototypeEncoder" in repr(guide)
    assert attack.labels.pairs() == AllToOne(0, 4).pairs()
    half = encoder(channels=1).bfloat16().eval()
    assert half(data[0].bfloat16()).dtype == torch.float32  # in half precision small losses would vanish


def test_prototypes_are_mean_directions():
    x, y = labelled()
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    guide = PrototypeEncoder.from_images(net, x, y)
    mean = F.normalize(net(x), dim=1)[y == 2].mean(0)
    torch.testing.assert_close(guide.text_features[2], F.normalize(mean, dim=0))
    with pytest.raises(ValueError, match="every class"):
        PrototypeEncoder.from_images(net, x, torch.where(y == 1, 3, y))


def test_clip_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**part, "vocab_size": 50, "max_position_embeddings": 12, "bos_token_id": 48, "eos_token_id": 49},
        vision_config={**part, "image_size": 16, "patch_size": 8}, projection_dim=8,
    )  # fmt: skip
    model, ids = transformers.CLIPModel(config).eval(), torch.tensor([[48, 1, 2, 49], [48, 3, 4, 49], [48, 5, 6, 49]])
    guide = CLIPEncoder.from_tokens(model, ids)
    x = pixels(5, side=16)
    with torch.no_grad():
        its_own = model(input_ids=ids, pixel_values=(x - guide.mean) / guide.std).logits_per_image
        torch.testing.assert_close(guide(x), its_own, atol=1e-4, rtol=1e-4)
        assert guide(pixels(2, channels=1, side=10)).shape == (2, 3)
    small = pixels(6)
    left = Left(guide)
    erased = clean_feature_erase(guide, small, 0.1, 10)
    left.check()
    with torch.no_grad():
        assert erasing_loss(guide, erased).mean() < erasing_loss(guide, small).mean()
    with pytest.raises(ValueError, match="one or three channels"):
        guide(torch.rand(1, 2, 8, 8))


class Broken(Flat):
    def encode_image(self, x):
        return x.flatten(1)[:, :2] * torch.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: universal_trigger(encoder(), pixels(), "uap"), "needs a target"),
        (lambda: universal_trigger(encoder(), pixels(), "uap", target=4), "target"),
        (lambda: universal_trigger(encoder(), pixels(), "cfe"), "objective"),  # pyright: ignore
        (lambda: universal_trigger(encoder(), pixels(1)), "two images"),
        (lambda: universal_trigger(encoder(), 255 * pixels()), r"\[0, 1\]"),
        (lambda: universal_trigger(encoder(), pixels(), eps=math.nan), "eps"),
        (lambda: clean_feature_erase(encoder(), pixels() - 0.5), r"\[0, 1\]"),
        (lambda: clean_feature_erase(encoder(), pixels() * math.nan), "finite"),
        (lambda: clean_feature_erase(Broken(torch.eye(2)), pixels(2)), "NaN"),
        (lambda: clean_feature_erase(Flat(torch.eye(2)), pixels(2)), "image features"),
        (lambda: Flat(torch.ones(1, 2)), "at least two classes"),
        (lambda: Flat(torch.zeros(2, 2)), "not zero"),
        (lambda: DataConstraint.number(1.5), "rate"),
        (lambda: DataConstraint.classes([], 0.1), "classes"),
        (lambda: CLIPGuidedAttack(encoder(), 4), "target"),
        (lambda: CLIPGuidedAttack(encoder(), 1, constraint=DataConstraint.classes([0, 1], 0.1)), "alone or other"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_more_poison_than_the_attacker_holds_is_refused():
    x, y = labelled()

    def poison(constraint, data=(x, y), classes=4):
        attack = CLIPGuidedAttack(encoder(classes), 1, trigger=BlendTrigger.noise((3, 8, 8)), constraint=constraint)
        return attack.fit(x).poison(data, seed=0)

    for constraint in (
        DataConstraint.classes([1], 0.3),
        DataConstraint.domain(pixels(5), 0.2),
        DataConstraint.number(0.9),
    ):
        with pytest.raises(ValueError, match="as many as the attacker holds"):
            poison(constraint)
    with pytest.raises(ValueError, match="0 to 2"):
        poison(DataConstraint.number(0.1), classes=3)
    with pytest.raises(ValueError, match="foreign images"):
        poison(DataConstraint.domain(pixels(8, side=9), 0.1))
    with pytest.raises(RuntimeError, match="fit first"):
        CLIPGuidedAttack(encoder(), 1).poison((x, y), seed=0)
