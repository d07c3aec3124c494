# Written by docs/generate.py from the catalogue.
from torchfolio.training.guidance import Guidance as Guidance
from torchfolio.training.guidance import GuidedRule as GuidedRule
