"""Train a memory network on classes that never were; then it learns three kinds of wine from a stream."""

import numpy as np
from sklearn.datasets import load_wine
from sklearn.preprocessing import StandardScaler
from torch import nn

from torchfolio import engine
from torchfolio.engine.recipes import adam
from torchfolio.training import FastSlowEstimator, FastSlowMemoryNetwork, FastSlowTraining
from torchfolio.training.meta_episodes import prototype_episodes

net = FastSlowMemoryNetwork(nn.Linear(13, 24), 3, task="classification", slots=8, width=12, hidden=24)
episodes = prototype_episodes(1600, ways=3, shots=4, dim=13)  # random means; labels mean something else in each
engine.fit(net, episodes, rule=FastSlowTraining(), optimizer=adam(1e-2), batch_size=32, clip_norm=5.0)

table = load_wine()
order = np.random.default_rng(0).permutation(len(table.data))
X, y = StandardScaler().fit_transform(table.data)[order], table.target_names[table.target[order]]

stream = FastSlowEstimator(net)
for k in range(0, 12, 3):
    stream.partial_fit(X[k : k + 3], y[k : k + 3])
    print(k + 3, "wines seen, accuracy on the others", round(stream.score(X[12:], y[12:]), 2))
