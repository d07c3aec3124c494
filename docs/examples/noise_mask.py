"""Pretrain a network on rows of a table under masks from a policy, then fine-tune it without them."""

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.engine.recipes import cosine, sgd
from torchfolio.training import NoiseMaskPretraining, average_checkpoints
from torchfolio.training.snapshots import Snapshots

tumours = data.load("breast_cancer", seed=0)
net = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))

rule, last = NoiseMaskPretraining(), Snapshots(3)
engine.fit(
    net, tumours.train, rule=rule, optimizer=rule.optimizer(sgd(0.1)), epochs=15, batch_size=32, drop_last=True,
    callbacks=[last], device="cpu",
)  # fmt: skip
net.load_state_dict(average_checkpoints(last.states))
print("heated:", engine.evaluate(net, tumours.test))

engine.fit(net, tumours.train, optimizer=sgd(0.01), scheduler=cosine(warmup=20), epochs=5, batch_size=32, device="cpu")
print("fine-tuned:", engine.evaluate(net, tumours.test))

expected = rule.masks(torch.stack([tumours.test[0][0], tumours.test[1][0]]), expected=True)
print("share of each feature that is kept, two patients:", expected.mean(1).tolist())
