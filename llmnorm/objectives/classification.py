"""The objective of fine-tuning on labelled files: a class for a text, or a number.

Row n of the run is an example of the training file, chosen by the permutations that order packed
rows too (data/order.py), so an epoch shows each example once. A micro-batch is padded to its
longest example.

Figures: the mean loss per example; accuracy, F1 and Matthews' correlation of classes, or Pearson's
and Spearman's correlation of numbers. They are computed from the predictions of all processes
together, not averaged over them.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from llmnorm.config.tree import RunConfig
from llmnorm.data.examples import Fields, Table, open_examples
from llmnorm.data.order import Order
from llmnorm.data.report import examples_table
from llmnorm.objectives import scores
from llmnorm.objectives.contract import MicroBatch, Objective
from llmnorm.objectives.settings import ClassificationSettings
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Classification(Objective):
    """Labelled texts, read and tokenised when the objective is made.

    Raises:
        InputError: there is no tokenizer, or the files cannot be used.
    """

    def __init__(self, config: RunConfig, settings: ClassificationSettings) -> None:
        tokenizer = config.tokenizer.directory
        if tokenizer is None:
            raise InputError(
                "tokenizer.path: a classification trains none; give one, or model.pretrained"
            )
        self._config, self._settings = config, settings
        self.data = self._examples = open_examples(
            settings.train,
            settings.validation,
            Fields(settings.text_field, settings.pair_field, settings.label_field),
            classes=settings.labels,
            regression=settings.regression,
            tokenizer=tokenizer,
            context_length=config.data.context_length,
        )
        self._types = config.model.type_vocab_size > 1

    def model_keys(self) -> dict[str, Any]:
        """The names of the classes; Hugging Face counts them to size the head."""
        if self._settings.regression:
            return {"num_labels": 1, "problem_type": "regression"}
        numbers = dict(enumerate(self._examples.classes))
        return {"id2label": numbers, "label2id": {name: n for n, name in numbers.items()}}

    def describe(self, rows: int) -> str:
        """What a run of `rows` examples reads of its two files, a line each."""
        names = str(self._settings.train), str(self._settings.validation)
        return examples_table(self._examples, names, rows)

    def batches(
        self, first_row: int, *, global_batch: int, rank: int, world: int, micro_batch: int
    ) -> Iterator[list[MicroBatch]]:
        """Yield, without end, this process's micro-batches of each step."""
        table, rows, share = self._examples.train, self._examples.rows, global_batch // world
        order = Order([rows], [rows], self._config.data_seed)
        while True:
            _, places = order.locate(first_row, global_batch)
            mine = range(rank * share, (rank + 1) * share)
            micro = [mine[start : start + micro_batch] for start in range(0, share, micro_batch)]
            yield [
                self._micro_batch(table, places[list(part)].tolist())._replace(
                    rows=first_row + torch.tensor(part)
                )
                for part in micro
            ]
            first_row += global_batch

    def evaluate(
        self, model: "PreTrainedModel", *, micro_batch: int, parallel: Parallel
    ) -> dict[str, Any]:
        """The mean loss an example, and the scores."""
        table = self._examples.validation
        count = len(table.ids)
        outputs = torch.zeros(count, max(1, len(self._examples.classes)), dtype=torch.float64)
        for first in range(0, count, parallel.world * micro_batch):
            parallel.poll()
            start = first + parallel.rank * micro_batch
            rows = list(range(start, min(start + micro_batch, count)))
            # Every process makes the same number of forward passes: without rows of its own it
            # repeats the first example, and nothing of it is kept.
            inputs = self._micro_batch(table, rows or [0]).inputs_on(parallel.device)
            del inputs["labels"]
            with parallel.autocast():
                logits = model(**inputs).logits
            if rows:
                outputs[rows] = logits.double().cpu()
        figures = self._figures(parallel.reduce(outputs), table.labels)
        return {**figures, "sources": {self._settings.validation.stem: figures}}

    def _figures(self, outputs: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
        true = torch.from_numpy(labels)
        if self._settings.regression:
            values = outputs.squeeze(1)
            found = values.numpy()
            return {
                "loss": float(F.mse_loss(values, true)),
                "pearson": scores.pearson(found, labels),
                "spearman": scores.spearman(found, labels),
            }
        found, classes = outputs.argmax(1).numpy(), outputs.shape[1]
        return {
            "loss": float(F.cross_entropy(outputs, true)),
            "accuracy": scores.accuracy(found, labels),
            "f1": scores.f1(found, labels, classes),
            "matthews": scores.matthews(found, labels, classes),
        }

    def _micro_batch(self, table: Table, rows: Sequence[int]) -> MicroBatch:
        """The examples numbered `rows`, padded to the longest of them."""
        length = max(len(table.ids[row]) for row in rows)
        ids = np.full((len(rows), length), self._examples.pad, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for index, row in enumerate(rows):
            size = len(table.ids[row])
            ids[index, :size] = table.ids[row]
            mask[index, :size] = 1
            types[index, size - table.second[row] : size] = 1
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(table.labels[list(rows)]),
        }
        if self._types:
            inputs["token_type_ids"] = torch.from_numpy(types)
        return MicroBatch(inputs, len(rows), int(mask.sum()), torch.tensor(rows))
