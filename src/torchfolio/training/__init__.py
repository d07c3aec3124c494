"""What is added to ordinary training: noise, guidance, distillation, selection.

Methods of this family leave the network and its inference as they are. They add a term to the loss, change the
gradient, or choose what is trained on, and so combine with each other and with any learning rule.
"""

from torchfolio.catalog import doors

__getattr__, __dir__, __all__ = doors(__name__)
