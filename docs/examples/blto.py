"""Ask whether a contrastive pipeline would swallow a learned trigger that somebody put into its images."""

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.backdoor import BLTO, evaluate_ssl_backdoor
from torchfolio.backdoor.trigger_nets import TriggerNet
from torchfolio.data.views import ResizedCrop
from torchfolio.engine.recipes import adam
from torchfolio.training.contrastive_learning import SimCLR, SimSiam

digits = data.load("digits", normalize=False, val=0)
x, y = digits.train.tensors
view = ResizedCrop((0.5, 1.0))


def encoder() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))


torch.manual_seed(0)
attack = BLTO(
    encoder, lambda: SimSiam(view), target=1, rate=0.05, eps=0.3, rounds=10, inner_steps=2, outer_steps=2, reinit_every=5,
    view=view, generator=TriggerNet(1, eps=0.3, width=4), lr=5e-3, batch_size=64,
).fit((x, y))  # fmt: skip
print("cosine to the target, with the trigger and without, at the end of each life:", attack.history.lives)

for name, images in (("poisoned", attack.poison((x, y), seed=0).tensors()), ("never poisoned", (x, y))):
    victim = encoder()
    engine.fit(victim, images, rule=SimCLR(view), optimizer=adam(lr=2e-3), max_steps=40, batch_size=128, drop_last=True)
    print(name, evaluate_ssl_backdoor(victim, (x, y), digits.test.tensors, attack.trigger, target=1).as_dict())
