"""Distil a convolutional network into a small perceptron, and see whether labels and teacher agree in its head."""

import torch

from torchfolio import data, engine
from torchfolio.engine.recipes import adam
from torchfolio.models import MLP, ConvNet
from torchfolio.training import DHKD, AuxiliaryDistillation, head_conflict

digits = data.load("digits")
torch.manual_seed(0)
teacher = ConvNet(10, 1, widths=(8, 16))
engine.fit(teacher, digits.train, optimizer=adam(0.01), epochs=3, batch_size=64)

student = MLP(64, 10, hidden=(16,))
rule = DHKD(teacher, gradient_alignment=True)
engine.fit(student, digits.train, rule=rule, optimizer=adam(0.01), epochs=3, batch_size=64)
print("teacher", engine.evaluate(teacher, digits.test)["accuracy"])
print("student", engine.evaluate(student, digits.test)["accuracy"])
print(head_conflict(student, digits.train, teacher))

# The same term beside any other rule. On the command line, with the teacher as a bundle:
# torchfolio train --model mlp --data digits --add dhkd --add-set teacher=net/ -o student/
other = MLP(64, 10, hidden=(16,))
rule = AuxiliaryDistillation(teacher, alpha=0.5).on(engine.Backprop())
engine.fit(other, digits.train, rule=rule, optimizer=adam(0.01), epochs=3, batch_size=64)
print("another student", engine.evaluate(other, digits.test)["accuracy"])
