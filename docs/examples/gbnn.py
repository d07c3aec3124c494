"""Grow a network on a table, use half of it, and take it to PyTorch."""

import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import GridSearchCV, train_test_split

from torchfolio.efficiency.gbnn import GBNNRegressor

X, y = load_diabetes(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
search = GridSearchCV(GBNNRegressor(total_units=40, random_state=0), {"learning_rate": [0.05, 0.2]}, cv=3)
model = search.fit(X_train, y_train).best_estimator_
print(search.best_params_, "R2", round(model.score(X_test, y_test), 3))
print("R2 by number of units", [round(score, 2) for score in model.staged_score(X_test, y_test)][::10])

net = model.to_module()
with torch.inference_mode():
    outputs = net(torch.from_numpy(X_test).float()).flatten()
print(net, "differs by at most", float((outputs - torch.from_numpy(model.predict(X_test))).abs().max()))
