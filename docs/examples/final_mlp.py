"""Predict from a table of patients' cell measurements, some of them made categories, and see what each stream looks at."""

import numpy as np
import pandas as pd
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from torchfolio.applications import FinalMLPClassifier

cells = load_breast_cancer(as_frame=True)
frame = cells.data.iloc[:, :6].copy()
frame["size"] = pd.cut(frame.pop("mean area"), 4, labels=["tiny", "small", "large", "huge"]).astype(str)
frame["round"] = np.where(frame.pop("mean compactness") < 0.1, "yes", "no")
train, test, y, y_test = train_test_split(frame, cells.target, random_state=0, stratify=cells.target)

model = FinalMLPClassifier(
    dim=8, hidden_1=(32,), hidden_2=(32,), heads=4, context_1=("size",), context_2=("round",),
    learning_rate=0.01, batch_size=64, max_epochs=30, patience=5, random_state=0,
)  # fmt: skip
model.fit(train, y)
print("AUC on held-out rows:", round(roc_auc_score(y_test, model.predict_proba(test)[:, 1]), 3))
for k, gates in enumerate(model.feature_gates(test), start=1):
    print(f"stream {k} looks most at", gates.mean().sort_values(ascending=False).index[0])
