"""Put a filter in front of a network of which you do not know where it comes from."""

from functools import partial

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.backdoor import AllToOne, PatchTrigger, poison, poisoned_test
from torchfolio.backdoor.badexpert import BaDExpert

torch.manual_seed(0)
# A stranger's network: a square in the corner turns every digit into a 7.
digits = data.load("digits", normalize=False, val=0)
trigger = PatchTrigger.checkerboard(digits.shape, size=2, margin=0)
net = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Flatten(), nn.Linear(32 * 16, 10),
)  # fmt: skip
poisoned = poison(digits.train.tensors, trigger, AllToOne(7, 10), rate=0.1, seed=0)
engine.fit(net, poisoned.tensors(), epochs=20, optimizer=partial(torch.optim.Adam, lr=1e-3))

# What you do: a few clean images, and the network.
images, labels = digits.test.tensors
clean, test = (images[:200], labels[:200]), (images[200:], labels[200:])
detector = BaDExpert(unlearn_lr="auto", unlearn_batch="auto", finetune_batch="auto", finetune_lr=0.05, fpr=0.05).fit(
    net, clean
)
print("right answers of network, expert and auxiliary network:", detector.accuracy_)
said, rejected = detector.filtered(test[0])
print("clean images that are rejected:", float(rejected.float().mean()))
triggered, target = poisoned_test(test, trigger, AllToOne(7, 10)).tensors()
said, rejected = detector.filtered(triggered)
print("attacks that succeed without the filter:", float((said == target).float().mean()))
print("and with it:", float(((said == target) & ~rejected).float().mean()))
