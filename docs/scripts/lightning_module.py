"""A learning rule in Lightning: a module that optimizes by hand and gives the rule Lightning's own backward."""

import warnings

import pytorch_lightning as lightning
import torch
from torch.utils.data import DataLoader

from torchfolio import data, engine, models
from torchfolio.engine import LearningRule
from torchfolio.local import AugLocal


class RuleModule(lightning.LightningModule):
    """A network that is trained by a learning rule."""

    def __init__(self, net: torch.nn.Module, rule: LearningRule, example: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.rule = rule
        self.module = rule.prepare(net, example)  # holds the network, and what the rule trains beside it
        self.predictor = rule.predictor(net)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        scores = self.rule.step(batch, self.manual_backward)
        optimizer.step()
        self.log_dict({f"train_{name}": value for name, value in scores.items()})

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_accuracy", (self.predictor(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([p for p in self.module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        self.rule.configure(optimizer, self.trainer.estimated_stepping_batches)
        return optimizer


warnings.filterwarnings("ignore", ".*(num_workers|tensorboard|log_every_n_steps|LeafSpec|treespec).*")
torch.manual_seed(0)
digits = data.load("digits")
train = DataLoader(digits.train, batch_size=64, shuffle=True)
net = models.MLP(64, 10, hidden=(64, 64, 64, 64))
module = RuleModule(net, AugLocal(aux_depth=1), next(iter(train)))
trainer = lightning.Trainer(
    max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip
trainer.fit(module, train, DataLoader(digits.val, batch_size=256))
print("validation:", {name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
print("test:", engine.evaluate(net, digits.test))
