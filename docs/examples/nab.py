"""Train on data that somebody may have poisoned."""

from functools import partial

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.backdoor import AllToOne, PatchTrigger, evaluate_defense, poison, poisoned_test
from torchfolio.backdoor.nab import NAB, LGAIsolator, Stamp, VerifiedDataRelabeler


def make_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip


digits = data.load("digits", normalize=False, val=0)
trigger = PatchTrigger.checkerboard(digits.shape, size=2, margin=0)
poisoned = poison(digits.train.tensors, trigger, AllToOne(7, 10), rate=0.1, seed=0)
images, labels = digits.test.tensors
clean, test = (images[:150], labels[:150]), (images[150:], labels[150:])

torch.manual_seed(0)
nab = NAB(
    LGAIsolator(make_net, epochs=3, lr=0.05), VerifiedDataRelabeler(model_fn=make_net, epochs=40, lr=0.05),
    Stamp(size=2, value=0.5), ratio=0.05,
)  # fmt: skip
training = nab.prepare(poisoned.tensors(), clean=clean, seed=0)
print("how well the first step did:", training.report(poisoned.is_poison, poisoned.y_true))
net = make_net()
engine.fit(net, training.tensors(), epochs=15, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
deployed = nab.wrap(net)  # stamps every input
print(evaluate_defense(net, deployed, test, poisoned_test(test, trigger, AllToOne(7, 10))).as_dict())
