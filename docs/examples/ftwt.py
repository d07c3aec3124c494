"""A residual network on handwritten digits that computes, for every image, only the filters that will fire."""

from torchfolio import data, engine
from torchfolio.efficiency import FTWT, attach_gates, choose_r, compact, measure_flops
from torchfolio.efficiency.ftwt import gates_open
from torchfolio.engine.recipes import cosine, sgd
from torchfolio.measure import count_flops
from torchfolio.models import ResNetCIFAR

digits = data.load("digits")
net = ResNetCIFAR(8, widths=(8, 16, 16), in_channels=1)
engine.fit(net, digits.train, epochs=3, optimizer=sgd(0.1), scheduler=cosine())
print("dense:", engine.evaluate(net, digits.test))

images = digits.train.tensors[0][:200]
r = choose_r(net, images, reduction=0.3)  # known before any gate is trained
print(f"r = {r:.3f} saves 30 % of the operations with gates that hit all their targets")
net = attach_gates(net, r, softmax=False)
engine.fit(net, digits.train, rule=FTWT(gate_lr=0.5), epochs=4, optimizer=sgd(0.02), scheduler=cosine())
flops = measure_flops(net, digits.test)
print("gated:", engine.evaluate(net, digits.test), f"saves {100 * flops.reduction:.0f} %")
print("from", f"{float(flops.reductions.min()):.2f} to {float(flops.reductions.max()):.2f}, image by image")
for name, mask in gates_open(net, images).items():
    print(f"{name}: {mask.sum(1).float().mean():.1f} of {mask.shape[1]} filters open")

small = compact(net)  # really skips them, for single images
print([count_flops(small, image[None]) for image in images[:4]])
