# Written by docs/generate.py from the catalogue.
from torchfolio.adaptation.dam import ConcreteMerging as ConcreteMerging
from torchfolio.adaptation.dam import DefenseAwareMerging as DefenseAwareMerging
