"""Recall several images from one relaxation of a Hopfield network, learned from noisy examples."""

import torch
from sklearn.datasets import load_digits

from torchfolio.theory.multitasking_hopfield import (
    MultitaskingHopfield,
    example_set,
    fill_blanks,
    mean_field,
    phase_diagram,
    to_ternary,
)

# Patterns with blanks from real data: of each image, the half of the pixels nearest to its median becomes blank.
images, digits = load_digits(return_X_y=True)
first = [int((digits == k).argmax()) for k in (0, 1, 7)]
patterns = to_ternary(torch.tensor(images[first]), d=0.5)

examples, labels = example_set(patterns, r=0.6, M=15)
network = MultitaskingHopfield("supervised").fit(examples, labels)
print(network)
relaxation = network.relax(fill_blanks(patterns[0], replicas=50), sweeps=10, patterns=patterns)
print("recalled from the first image:", relaxation.amplitudes())
print("energy:", relaxation.energies.mean(-1))

# A part of an image is completed.
cue = patterns[1].clone()
cue[32:] = 0
overlap = (network.recall(cue) * patterns[1]).sum() / patterns[1].abs().sum()
print("completed from its upper half:", float(overlap))

# What theory says of many random patterns of this dilution, and where each regime is.
print(mean_field(K=3, d=0.5, r=0.6, M=15).best)
phase_diagram(3, d=[0.2, 0.5, 0.8], T=[0.05, 0.5, 1.1]).plot().savefig("phases.png")
