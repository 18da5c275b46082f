"""What decode_step.py compares: models of one set of weights, and who steps with them.

A candidate decodes greedily, one token a row and step, and gives the seconds of a step and the
tokens. Shapes: prompts (rows, PROMPT).
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmnorm.models import LlmNormConfig, LlmNormForCausalLM
from llmnorm.models.building import build_model
from llmnorm.models.decoding import Decoder

SIZES: dict[str, dict[str, int]] = {
    "27M": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
    "quickstart": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
    },
}
VOCABULARY, PROMPT = 4096, 32


def models(shape: dict[str, int]) -> tuple[LlmNormForCausalLM, LlamaForCausalLM]:
    """Ours and Hugging Face's, with the same weights."""
    more = {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "tie_word_embeddings": True}
    theirs = LlamaForCausalLM(
        LlamaConfig(
            **shape, **more, rms_norm_eps=1e-6, pad_token_id=0, bos_token_id=1, eos_token_id=None
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    ours = build_model(LlmNormConfig(**shape, **more), seed=0).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


Measured = tuple[float, list[list[int]]]  # seconds a step, and the tokens of each step


class Clock:
    """CPU seconds for one thread, wall clock for more."""

    def __init__(self, threads: int) -> None:
        self.now = time.process_time if threads == 1 else time.perf_counter
        self.key = "cpu" if threads == 1 else "wall"


def our_steps(
    decoder: Decoder, model: LlmNormForCausalLM, prompts: Tensor, steps: int, clock: Clock
) -> Measured:
    """Prefill, then one token a row: our own loop."""
    cache = model.model.new_cache().slots
    tokens = decoder.step(prompts, cache, last=True)[:, -1].argmax(-1, keepdim=True)
    made = [tokens]
    begin = clock.now()
    for _ in range(steps):
        tokens = decoder.step(tokens, cache)[:, -1].argmax(-1, keepdim=True)
        made.append(tokens)
    return (clock.now() - begin) / steps, [t[:, 0].tolist() for t in made]


def generated(model: LlamaForCausalLM, prompts: Tensor, steps: int, clock: Clock) -> Measured:
    """Seconds that each token after the first adds to `generate`."""
    seconds, out = [], prompts
    for new in (1, 1 + steps):
        begin = clock.now()
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )
        seconds.append(clock.now() - begin)
    return (seconds[1] - seconds[0]) / steps, out[:, PROMPT:].T.tolist()


@torch.no_grad()
def looped(model: LlamaForCausalLM, prompts: Tensor, steps: int, clock: Clock) -> Measured:
    """Hugging Face's model in a plain loop."""
    out = model(prompts, use_cache=True, logits_to_keep=1)
    made, begin = [out.logits[:, -1].argmax(-1, keepdim=True)], clock.now()
    for _ in range(steps):
        out = model(made[-1], past_key_values=out.past_key_values, use_cache=True)
        made.append(out.logits[:, -1].argmax(-1, keepdim=True))
    return (clock.now() - begin) / steps, [t[:, 0].tolist() for t in made]


def over_a_step(
    decoder: Decoder,
    model: LlmNormForCausalLM,
    prompts: Tensor,
    passes: Sequence[tuple[int, int]],
    clock: Clock,
) -> list[float]:
    """How many steps of one token a row a pass takes, in turns with it; medians of 24.

    Args:
        passes: of each the new tokens a row, rolled back each time, and how many rows its cache
            has, of which the first ones, as many as prompts, take part.
    """
    times: list[list[float]] = [[] for _ in range(len(passes) + 1)]
    caches = []
    for _, slots in [(1, len(prompts)), *passes]:
        caches.append(model.model.new_cache().slots)
        decoder.step(prompts[:1].expand(slots, -1), caches[-1], last=True)
    widths = [1, *(new for new, _ in passes)]
    for turn in range(27):
        for new, cache, some in zip(widths, caches, times, strict=True):
            begin = clock.now()
            decoder.step(prompts[:, :new], cache)
            if turn > 2:  # the first ones trace
                some.append(clock.now() - begin)
            cache.rollback([new] * len(prompts))
    step, *others = times
    return [statistics.median(a / b for a, b in zip(some, step, strict=True)) for some in others]


def read_once(model: LlmNormForCausalLM, rows: int, length: int, clock: Clock) -> float:
    """Seconds of reading all weights, and keys and values of `rows` of so many tokens, once."""
    config = model.config
    numbers = 2 * rows * length * config.num_key_value_heads * config.head_dim
    numbers *= config.num_hidden_layers
    flat = torch.cat([p.detach().flatten() for p in model.parameters()] + [torch.zeros(numbers)])
    pieces, times = flat.chunk(torch.get_num_threads() * 8), []
    for _ in range(7):
        begin = clock.now()
        for piece in pieces:
            piece.sum()
        times.append(clock.now() - begin)
    return min(times)


class LlamaCpp:
    """The child that steps by llama.cpp."""

    def __init__(
        self, python: str, file: Path, threads: int, steps: int, prompts: Path, clock: Clock
    ) -> None:
        script = Path(__file__).with_name("llama_cpp_steps.py")
        self.process = subprocess.Popen(
            [python, str(script), str(file), str(threads), str(steps), str(prompts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.clock = clock
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"bench: error: llama.cpp ended with code {self.process.wait()}")
        return line

    def run(self, rows: int) -> Measured:
        """A round of so many rows."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{rows}\n")
        self.process.stdin.flush()
        answer = json.loads(self._line())
        return answer[self.clock.key], answer["tokens"]

    def close(self) -> None:
        """End the child."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def write_gguf(model: LlamaForCausalLM, file: Path) -> None:
    """The weights in float32 for llama.cpp, with tokens that only count."""
    import gguf  # of the extra that exports

    from llmnorm.exchange.gguf_file import _interleaved

    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{n}" for n in range(3)] + [chr(0x100 + n) for n in range(4093)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges([chr(0x100) + " " + chr(0x101)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = _interleaved(weight, config.num_attention_heads)
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        writer.add_tensor(found, weight.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
