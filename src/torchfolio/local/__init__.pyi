# Written by docs/generate.py from the catalogue.
from torchfolio.local.auglocal import AugLocal as AugLocal
from torchfolio.local.forwardgnn import ForwardGNNClassifier as ForwardGNNClassifier
from torchfolio.local.forwardgnn import ForwardGNNLinkPredictor as ForwardGNNLinkPredictor
from torchfolio.local.forwardgnn import augment_with_virtual_nodes as augment_with_virtual_nodes
from torchfolio.local.forwardgnn import link_split as link_split
from torchfolio.local.man import MAN as MAN
from torchfolio.local.physical_ff import PhysicalBlock as PhysicalBlock
from torchfolio.local.physical_ff import PhysicalLocalFeatures as PhysicalLocalFeatures
from torchfolio.local.physical_ff import PhysicalLocalNet as PhysicalLocalNet
from torchfolio.local.physical_ff import as_physical as as_physical
