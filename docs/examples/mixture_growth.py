"""Train two small convolutional networks on digits, grow them into one twice as wide, and keep a plain network."""

import torch
from torch import nn

from torchfolio.data import load
from torchfolio.efficiency import param_groups, recalibrate_bn, templatize
from torchfolio.engine import evaluate, fit

digits = load("digits")
wide = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10),
)  # fmt: skip
torch.manual_seed(0)
images = digits.train.tensors[0]
model = templatize(wide, images[:2], templates=4)


def train(net, lr, epochs):
    optimizer = torch.optim.SGD(param_groups(net, weight_decay=5e-4), lr=lr, momentum=0.9)
    fit(net, digits.train, optimizer=optimizer, epochs=epochs, batch_size=64, progress=False)
    print("test accuracy:", round(evaluate(net, digits.test)["accuracy"], 3))


for i in range(2):
    train(model.train_member(i), lr=0.05, epochs=2)
cost = model.flops(images[:1], member=0) / model.flops(images[:1])
print("operations of a member over those of the wide network:", round(cost, 2))
model.grow("orthogonal")
recalibrate_bn(model, images.split(64))
print("just grown:", round(evaluate(model, digits.test)["accuracy"], 3))
train(model, lr=0.02, epochs=2)
print(model.export())
