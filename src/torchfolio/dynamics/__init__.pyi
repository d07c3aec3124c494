# Written by docs/generate.py from the catalogue.
from torchfolio.dynamics.adjoint_dpm import ClassifierFreeGuidance as ClassifierFreeGuidance
from torchfolio.dynamics.adjoint_dpm import ClassifierGuidance as ClassifierGuidance
from torchfolio.dynamics.adjoint_dpm import DiffusionODE as DiffusionODE
from torchfolio.dynamics.adjoint_dpm import adversarial_noise as adversarial_noise
from torchfolio.dynamics.adjoint_dpm import finetune as finetune
from torchfolio.dynamics.adjoint_dpm import optimize_condition as optimize_condition
from torchfolio.dynamics.adjoint_dpm import style_loss as style_loss
