# Written by docs/generate.py from the catalogue.
from torchfolio.adaptation.dam import ConcreteMerging as ConcreteMerging
from torchfolio.adaptation.dam import DefenseAwareMerging as DefenseAwareMerging
from torchfolio.adaptation.naive_bayes_probe import NaiveBayesHead as NaiveBayesHead
from torchfolio.adaptation.naive_bayes_probe import NaiveBayesProbe as NaiveBayesProbe
from torchfolio.adaptation.naive_bayes_probe import consistency_bound as consistency_bound
from torchfolio.adaptation.naive_bayes_probe import crossover as crossover
from torchfolio.adaptation.naive_bayes_probe import learning_curve as learning_curve
from torchfolio.adaptation.naive_bayes_probe import probe as probe
from torchfolio.adaptation.naive_bayes_probe import samples_to_reach as samples_to_reach
