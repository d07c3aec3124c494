"""Find out from two images which class a stranger's network was made to prefer, and draw its trigger."""

from functools import partial

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.backdoor import AllToOne, PatchTrigger, SmoothInv, poison

torch.manual_seed(0)
# A stranger's network: a square in the corner turns every digit into a 7.
digits = data.load("digits", normalize=False, val=0)
trigger = PatchTrigger.checkerboard(digits.shape, size=2, margin=0)
net = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, stride=2),
    nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 10),
)  # fmt: skip
poisoned = poison(digits.train.tensors, trigger, AllToOne(7, 10), rate=0.1, seed=0)
engine.fit(net, poisoned.tensors(), epochs=6, optimizer=partial(torch.optim.Adam, lr=3e-3), progress=False)

# What you do: some images without labels, and the network.
images = digits.test.tensors[0][:80]
inverter = SmoothInv(sigma=0.12, eps=1.25, steps=30, n=6)
verdict = inverter.scan(net, images)
print(*verdict.sentences(), sep="\n")
if verdict.pairs:
    target = verdict.pairs[0][1]
    found = inverter.invert(net, images[:4], target)
    print("other images that the drawn trigger sends to", target, ":", found.asr(net, images[4:]))
