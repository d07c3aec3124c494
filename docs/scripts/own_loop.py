"""A learning rule in a loop of one's own: prepare once, step for every batch, and your optimizer does the rest."""

import torch
from torch.utils.data import DataLoader

from torchfolio import data, engine, models
from torchfolio.local import AugLocal

torch.manual_seed(0)
digits = data.load("digits")
loader = DataLoader(digits.train, batch_size=64, shuffle=True)
net = models.MLP(64, 10, hidden=(64, 64, 64, 64))

rule = AugLocal(aux_depth=1)
module = rule.prepare(net, next(iter(loader))).train()  # the network, and what the rule trains beside it
optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
rule.configure(optimizer, total_steps=10 * len(loader))

for epoch in range(10):
    for batch in loader:
        optimizer.zero_grad()
        scores = rule.step(batch, torch.Tensor.backward)  # gradients are in .grad now; "loss" is among the scores
        torch.nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {float(scores['loss']):.3f}")

rule.release()
print("test:", engine.evaluate(net, digits.test, rule=rule))
