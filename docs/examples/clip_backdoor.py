"""Test whether an attacker who holds few images can plant a backdoor, with a guide of their own."""

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.backdoor import CLIPGuidedAttack, DataConstraint, evaluate_attack, poisoned_test
from torchfolio.backdoor.image_text import PrototypeEncoder
from torchfolio.engine.recipes import adam


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


torch.manual_seed(0)
digits = data.load("digits", normalize=False, val=0)
x, y = digits.train.tensors
own, theirs = (x[:500], y[:500]), (x[500:], y[500:])  # the attacker never sees the victim's images

# The guide: with weights of CLIP it would be CLIPEncoder.from_transformers("path/of/clip", class_names).
teacher = engine.fit(make_net(), own, epochs=5, optimizer=adam(lr=5e-3)).model
guide = PrototypeEncoder.from_images(teacher[:-1], *own)

held = DataConstraint.number(0.05)  # or DataConstraint.classes([7], 0.05): images of the target alone
attack = CLIPGuidedAttack(guide, target=7, constraint=held, eps=0.2, epochs=5, erase_steps=10).fit(own[0])
poisoned = attack.poison(theirs, seed=0)
attacked = poisoned_test(digits.test.tensors, attack.trigger, attack.labels)
for name, training in (("poisoned", poisoned.tensors()), ("never poisoned", theirs)):
    victim = engine.fit(make_net(), training, epochs=5, optimizer=adam(lr=5e-3)).model
    print(name, evaluate_attack(victim, digits.test.tensors, attacked).as_dict())
print(attack.stealth(poisoned))
