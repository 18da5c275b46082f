"""A class of a text, or a number for it: fine-tuning on labelled files.

Row n of the run is an example of the training file, by the same permutations as packed rows, so an
epoch shows each once; a micro-batch is padded to its longest. Figures: accuracy, F1 and Matthews'
correlation of classes, Pearson's and Spearman's of numbers, computed from the predictions of all
processes together, beside the mean loss an example.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from llmnorm.config.tree import RunConfig
from llmnorm.data.examples import Fields, Table, open_examples
from llmnorm.data.order import Order
from llmnorm.objectives import scores
from llmnorm.objectives.contract import MicroBatch, Objective
from llmnorm.objectives.settings import ClassificationSettings
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Classification(Objective):
    """Labelled texts.

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
        """The classes, by which Hugging Face knows their number."""
        if self._settings.regression:
            return {"num_labels": 1, "problem_type": "regression"}
        numbers = dict(enumerate(self._examples.classes))
        return {"id2label": numbers, "label2id": {name: n for n, name in numbers.items()}}

    def batches(
        self, first_row: int, *, global_batch: int, rank: int, world: int, micro_batch: int
    ) -> Iterator[list[MicroBatch]]:
        """This process's part of the steps from `first_row` on, without end."""
        table, rows, share = self._examples.train, self._examples.rows, global_batch // world
        order = Order([rows], [rows], self._config.data_seed)
        while True:
            _, places = order.locate(first_row, global_batch)
            mine = range(rank * share, (rank + 1) * share)
            micro = [mine[start : start + micro_batch] for start in range(0, share, micro_batch)]
            yield [
                self._asked(table, places[list(part)].tolist())._replace(
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
            start = first + parallel.rank * micro_batch
            rows = list(range(start, min(start + micro_batch, count)))
            # Every process makes the same number of calls: one without rows repeats the first.
            inputs = self._asked(table, rows or [0]).inputs
            given = {k: v.to(parallel.device) for k, v in inputs.items() if k != "labels"}
            with parallel.autocast():
                logits = model(**given).logits
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

    def _asked(self, table: Table, rows: Sequence[int]) -> MicroBatch:
        """The examples numbered `rows`, padded to the longest of them."""
        length = max(len(table.ids[row]) for row in rows)
        ids = np.full((len(rows), length), self._examples.pad, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for place, row in enumerate(rows):
            size = len(table.ids[row])
            ids[place, :size] = table.ids[row]
            mask[place, :size] = 1
            types[place, size - table.second[row] : size] = 1
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(table.labels[list(rows)]),
        }
        if self._types:
            inputs["token_type_ids"] = torch.from_numpy(types)
        return MicroBatch(inputs, len(rows), int(mask.sum()), torch.tensor(rows))
