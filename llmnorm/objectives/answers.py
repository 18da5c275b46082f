"""Greedy answers to held-out examples, at every evaluation of fine-tuning.

    answers.exact_match(model, source, ...)   -> the share of a source's answers that are right
    answers.texts(model, parallel)            -> some of them beside their references

An example's prompt is what stands before its last answer. The answer is right if its text is the
reference, white space at both ends aside, and the model has ended it by itself. Examples that ask
nothing are left out: plain texts, and those whose last answer was cut off.

What would surprise: batches are made of the prompts alone, not of the number of processes, which
take turns in them. So the answers are those of one process.
"""

from collections.abc import Sequence
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from llmnorm.config.tree import RunConfig
from llmnorm.data.conversations import Conversations, ConversationSource
from llmnorm.generation.continuations import continuations
from llmnorm.generation.contract import Request, Sampling
from llmnorm.generation.prompts import open_tokenizer
from llmnorm.objectives.samples import refuse_long
from llmnorm.parallel.processes import Parallel

if TYPE_CHECKING:
    from llmnorm.models.modeling import LlmNormForCausalLM

# Tokens that an answer may have beyond its reference's: the same text may be spelled in more.
SLACK = 8


class Question(NamedTuple):
    """A prompt to be answered.

    Attributes:
        prompt: token ids.
        reference: the right answer's text; None where there is none.
        longest: tokens that the answer may have.
    """

    prompt: list[int]
    reference: str | None
    longest: int


class Answer(NamedTuple):
    """What the model has answered.

    Attributes:
        text: without the token that ended it.
        ended: whether one did.
    """

    text: str
    ended: bool

    def is_right(self, question: Question) -> bool:
        """Whether it is the reference, and has ended."""
        return self.ended and self.text.strip() == str(question.reference).strip()


class Answers:
    """The held-out examples that a run answers.

    Args:
        config: the run's settings.
        conversations: the prepared data.
    """

    def __init__(self, config: RunConfig, conversations: Conversations) -> None:
        self._config, self._conversations = config, conversations
        self._tokenizer = open_tokenizer(conversations.tokenizer_directory)
        self._stops = {conversations.eos, *conversations.template.stops}
        self._found: dict[tuple[str, int], list[Question]] = {}

    def exact_match(
        self,
        model: "LlmNormForCausalLM",
        source: ConversationSource,
        micro_batch: int,
        parallel: Parallel,
    ) -> float | None:
        """The share of `evaluation.answers` held-out examples whose answer is right.

        Every process must call it, and gets the same share; None where nothing is asked.

        Args:
            model: in evaluation mode.
            source: whose examples are answered, the first ones that are held out.
            micro_batch: rows of the context's length whose tokens may be in one batch.
            parallel: this process.

        Raises:
            Interrupted: a process was asked to stop.
        """
        questions = self._questions(source, self._config.evaluation.answers)
        if not questions:
            return None
        right = torch.zeros((), dtype=torch.float64)
        batches = self._batches(questions, micro_batch)
        for first in range(0, len(batches), parallel.world):
            parallel.poll()
            # Every process generates equally often: without a batch of its own it repeats the first
            # one, which is not counted.
            turn = first + parallel.rank
            batch = batches[turn] if turn < len(batches) else batches[0]
            turns = range(first, first + parallel.world)
            most = max(len(batches[n if n < len(batches) else 0]) for n in turns)
            found = self._answer(model, batch, parallel, most)
            if turn < len(batches):
                right += sum(a.is_right(q) for a, q in zip(found, batch, strict=True))
        return float(parallel.reduce(right)) / len(questions)

    def texts(self, model: "LlmNormForCausalLM", parallel: Parallel) -> list[dict[str, str]]:
        """Answers to the prompts of `evaluation`, or to `evaluation.samples` held-out examples.

        Every process must call it and generates the same. The model's mode is restored.

        Returns:
            `{"prompt": text, "continuation": text}` for each, and "reference" where there is one.

        Raises:
            Interrupted: a process was asked to stop.
        """
        was_training = model.training
        model.eval()
        found = []
        try:
            for question in self._shown():
                parallel.poll()
                (answer,) = self._answer(model, [question], parallel)
                prompt = self._tokenizer.decode(question.prompt)
                text = {"prompt": prompt, "continuation": answer.text}
                if question.reference is not None:
                    text["reference"] = question.reference
                found.append(text)
        finally:
            model.train(was_training)
        return found

    def _shown(self) -> list[Question]:
        """What is answered to be read: the sources take turns."""
        evaluation, data = self._config.evaluation, self._conversations
        if evaluation.prompts:
            render, longest = data.template.render, evaluation.sample_tokens
            turns = ([{"role": "user", "content": text}] for text in evaluation.prompts)
            prompts = [render(turn, generation_prompt=True) for turn in turns]
            refuse_long(prompts, self._config)
            return [Question(prompt, None, longest) for prompt in prompts]
        each = [self._questions(source, evaluation.samples) for source in data.sources]
        found = (q for questions in zip_longest(*each) for q in questions if q is not None)
        return list(islice(found, evaluation.samples))

    def _questions(self, source: ConversationSource, count: int) -> list[Question]:
        """The first `count` held-out examples that ask something; fewer if there are no more."""
        if (source.name, count) in self._found:
            return self._found[source.name, count]
        held = source.validation
        asking = (index for index in range(len(held)) if self._asks(*held.read(index)))
        questions = []
        for index in islice(asking, count):
            prompt, reference = held.answer(index)
            tokens = len(self._tokenizer.encode(reference, add_special_tokens=False))
            longest = tokens + tokens // 4 + SLACK
            questions.append(Question(prompt.tolist(), reference, longest))
        self._found[source.name, count] = questions
        return questions

    def _asks(self, ids: NDArray[np.int64], trained: NDArray[np.bool_]) -> bool:
        """Whether an example has a prompt behind its first token, and the end of its answer."""
        places = np.flatnonzero(trained)
        cut = len(ids) > self._conversations.context_length and ids[places[-1]] not in self._stops
        return bool((~trained[1 : places[-1]]).any()) and not cut

    def _batches(self, questions: Sequence[Question], micro_batch: int) -> list[list[Question]]:
        """The questions, those of similar length together.

        A batch has at most `micro_batch` rows' tokens, or one question that is longer.
        """
        room = micro_batch * self._conversations.context_length
        batches: list[list[Question]] = []
        tokens = 0  # of the last batch's longest prompt and longest answer
        for question in sorted(questions, key=lambda q: (len(q.prompt), q.longest)):
            batch = [*batches[-1], question] if batches else [question]
            tokens = len(question.prompt) + max(q.longest for q in batch)
            if batches and tokens * len(batch) <= room:
                batches[-1] = batch
            else:
                batches.append([question])
        return batches

    def _answer(
        self,
        model: "LlmNormForCausalLM",
        questions: Sequence[Question],
        parallel: Parallel,
        most: int = 1,
    ) -> list[Answer]:
        """What the model answers; `most`: the questions of the process that has most of them."""
        own = model.config.eos_token_id  # those of the weights that it started from among them
        stops = self._stops | ({own} if isinstance(own, int) else set(own or ()))
        longest = max(question.longest for question in questions)
        greedy = Sampling(max_tokens=longest, temperature=0)
        # Shapes change with every token, so compiled blocks would be compiled again and again.
        with parallel.autocast(), torch.compiler.set_stance("force_eager"):
            found = continuations(
                model,
                self._tokenizer,
                [Request(tuple(question.prompt), greedy) for question in questions],
                ends=stops,
                together=parallel.spread,
                calls=most,
                advance=parallel.phases.advance,
            )
        answers = []
        for ids in found:
            ended = ids[-1] in stops
            text = self._tokenizer.decode(ids[:-1] if ended else ids)
            answers.append(Answer(text, ended))
        return answers
