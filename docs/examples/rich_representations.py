"""Train five small networks on six kinds of digits in one pass; their features together know the other four kinds."""

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from torchfolio import data
from torchfolio.training import RichFeatures
from torchfolio.training.episodes import fit_episodes
from torchfolio.training.rich_representations import split_head


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 6))


digits = data.load("digits")
(x, y), (x_test, y_test) = ((part.tensors[0].flatten(1), part.tensors[1]) for part in (digits.train, digits.test))
old = y < 6
networks = fit_episodes(build, x[old], y[old], seeds=range(5), phases=((0.1, 15), (0.01, 5)), batch_size=64)

trunks = [split_head(net)[0] for net in networks]
new, new_test = (y >= 6).nonzero()[:40, 0], y_test >= 6
for name, used in (("one network", trunks[:1]), ("five networks", trunks)):
    probe = make_pipeline(RichFeatures(used), StandardScaler(), LogisticRegression(max_iter=500))
    probe.fit(x[new].numpy(), y[new].numpy())
    print(name, round(probe.score(x_test[new_test].numpy(), y_test[new_test].numpy()), 3))
