"""Learn digits, then mirrored ones, by a spiking and by an ordinary network, and keep what was known."""

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.engine.recipes import sgd
from torchfolio.spiking import HLOP, SLTT, to_spiking

digits = data.load("digits")
train, test = digits.train.tensors, digits.test.tensors
tasks = {"digits": (train, test), "mirrored": tuple((x.flip(-1), y) for x, y in (train, test))}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def learn(net: nn.Module, rule: engine.LearningRule) -> None:
    for examples, _ in tasks.values():
        engine.fit(net, examples, rule=rule, optimizer=sgd(0.1, momentum=0), batch_size=32, epochs=5)
        if isinstance(rule, HLOP):
            rule.end_task()
    scores = {name: engine.evaluate(net, held_out, rule=rule)["accuracy"] for name, (_, held_out) in tasks.items()}
    print(type(rule).__name__, {name: round(score, 2) for name, score in scores.items()})


rows = {"sizes": 0.4, "growth": 0.2}  # of every layer's inputs
learn(network(), engine.Backprop())
learn(network(), HLOP(**rows))
learn(to_spiking(network()), HLOP(SLTT(timesteps=4), **rows))
