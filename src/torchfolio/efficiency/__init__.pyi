# Written by docs/generate.py from the catalogue.
from torchfolio.efficiency.biper import BiPer as BiPer
from torchfolio.efficiency.biper import BiPerConv2d as BiPerConv2d
from torchfolio.efficiency.biper import BiPerLinear as BiPerLinear
from torchfolio.efficiency.biper import binarize as binarize
from torchfolio.efficiency.biper import export_binary as export_binary
from torchfolio.efficiency.biper import load_binary as load_binary
from torchfolio.efficiency.gbnn import GBNNClassifier as GBNNClassifier
from torchfolio.efficiency.gbnn import GBNNRegressor as GBNNRegressor
from torchfolio.efficiency.gbnn import boost_head as boost_head
