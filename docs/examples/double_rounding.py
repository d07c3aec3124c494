"""One network on handwritten digits that switches between 8, 4 and 2 bits while it runs, from one byte a weight."""

import torch
from torch.nn import functional as F

from torchfolio import data, engine
from torchfolio.efficiency import MultiPrecision, convert, search_bits, set_bits, store
from torchfolio.efficiency.double_rounding import use_bits, weight_traces
from torchfolio.engine.recipes import adam, cosine
from torchfolio.models import MLP

digits = data.load("digits")
net = MLP(64, 10, hidden=(64, 64, 64), norm="batch")
engine.fit(net, digits.train, epochs=3, optimizer=adam(3e-3))
print("float32:", engine.evaluate(net, digits.test))

x, y = (t[:256] for t in digits.train.tensors)
traces = weight_traces(net, F.cross_entropy, (x, y), samples=8)  # how curved the loss is in every layer
net = convert(net, bits=(8, 4, 2), example=x)
engine.fit(net, digits.train, rule=MultiPrecision(), epochs=2, optimizer=adam(3e-3), scheduler=cosine())

weights = sum(p.numel() for p in net.parameters() if p.dim() == 2)
mixed = search_bits(net, traces, budget=5 * weights)  # five bits a weight on average
net = store(net)
for bits in (8, 4, 2, mixed):
    with use_bits(net, bits):
        print(bits, "bits:", engine.evaluate(net, digits.test))
set_bits(net, 4)  # until it is switched again
print(sum(t.numel() * t.element_size() for t in net.state_dict().values() if t.dtype == torch.int8), "bytes of weights")
