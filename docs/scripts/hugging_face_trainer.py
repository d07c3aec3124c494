"""A learning rule in a Hugging Face Trainer: one method is overridden, and it calls the rule."""

import datasets
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from torchfolio import engine
from torchfolio.engine import LearningRule
from torchfolio.engine.recipes import adam
from torchfolio.models import Logits
from torchfolio.training import AuxiliaryDistillation


class RuleTrainer(Trainer):
    """A Trainer whose gradients are a learning rule's.

    Args:
        net: network from the inputs to logits.
        rule: learning rule.
        columns: names of the inputs, in the order in which the network takes them.
    """

    def __init__(self, net: torch.nn.Module, rule: LearningRule, columns: tuple[str, ...], train_dataset, **kwargs):
        self.rule, self.columns = rule, columns
        example = self._batch(train_dataset.with_format("torch")[:8])
        super().__init__(model=rule.prepare(net, example), train_dataset=train_dataset, **kwargs)

    def _batch(self, inputs):
        return [*(inputs[name] for name in self.columns), inputs["labels"]]

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        return self.rule.step(self._batch(self._prepare_inputs(inputs)), self.accelerator.backward)["loss"]


def classifier(layers: int) -> Logits:
    """A small BERT with random weights; `from_pretrained` gives one that has read."""
    config = BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
                        intermediate_size=64, num_labels=2, hidden_dropout_prob=0.0)  # fmt: skip
    return Logits(BertForSequenceClassification(config))


torch.manual_seed(0)
words = torch.randint(1, 32, (640, 8))
labels = (words[:, 0] > 15).long()  # the first word decides
rows = {"input_ids": words.tolist(), "attention_mask": [[1] * 8] * 640, "labels": labels.tolist()}
texts = datasets.Dataset.from_dict(rows)
inputs = (words, torch.ones_like(words), labels)

teacher, student = classifier(2), classifier(1)
engine.fit(teacher, inputs, epochs=3, optimizer=adam(2e-3), batch_size=32, progress=False)
rule = AuxiliaryDistillation(teacher, alpha=0.5).on(engine.Backprop())

settings = TrainingArguments(
    "trainer", num_train_epochs=3, per_device_train_batch_size=32, learning_rate=2e-3, report_to=[], save_strategy="no",
    remove_unused_columns=False, use_cpu=True, disable_tqdm=True, logging_strategy="no",
)  # fmt: skip
trainer = RuleTrainer(student, rule, ("input_ids", "attention_mask"), texts, args=settings)
trainer.train()
print("teacher:", engine.evaluate(teacher, inputs))
print("student:", engine.evaluate(student, inputs))
