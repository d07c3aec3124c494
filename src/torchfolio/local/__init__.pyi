# Written by docs/generate.py from the catalogue.
from torchfolio.local.auglocal import AugLocal as AugLocal
from torchfolio.local.man import MAN as MAN
