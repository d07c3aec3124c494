"""Classify handwritten digits as nodes of a graph of similar pictures, by graph layers that each learn alone."""

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import nn

from torchfolio.local import ForwardGNNClassifier, ForwardGNNLinkPredictor, link_split


class MaxConv(nn.Module):
    """A layer of your own: any module that is called as `conv(x, edge_index)`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.own, self.neighbours = nn.Linear(in_features, out_features), nn.Linear(in_features, out_features)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        source, target = edge_index
        where = target[:, None].expand(-1, x.shape[1])
        largest = torch.zeros_like(x).scatter_reduce(0, where, x[source], "amax")
        return self.own(x) + self.neighbours(largest)


pictures, digits = load_digits(return_X_y=True)
x, y = torch.tensor(pictures[:600], dtype=torch.float32), torch.tensor(digits[:600])
nearest = kneighbors_graph(x.numpy(), 5)
edges = torch.tensor((nearest + nearest.T).toarray()).nonzero().T
part = torch.randperm(600, generator=torch.Generator().manual_seed(0)) % 10
train, val, test = part < 1, part == 1, part > 1

for name, conv in (("gcn", "gcn"), ("own layer", MaxConv)):
    model = ForwardGNNClassifier(conv, hidden=32, layers=2, lr=0.02, epochs=60).fit(x, edges, y, train, val)
    right = model.predict()[test] == y[test]
    print(f"{name}: {int(train.sum())} labels, accuracy {right.float().mean():.3f}, by depth {model.layer_scores_}")
    print("most bytes held for a backward pass:", model.peak_saved_bytes_)

split = link_split(edges)
links = ForwardGNNLinkPredictor(hidden=32, lr=0.02, epochs=40).fit(x, split)
print("ROC-AUC of edges that were left out:", links.score(split.test, split.test_negative))
