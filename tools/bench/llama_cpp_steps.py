"""llama.cpp's decode steps, for decode_step.py: a child in another Python that has llama_cpp.

usage: PYTHON tools/bench/llama_cpp_steps.py FILE.gguf THREADS STEPS PROMPT.json

For each line on stdin, a number of rows: runs the first prompts of the file (lists of equal length)
token by token, then so many greedy steps of all rows in one batch, and prints a JSON line with the
mean wall clock and CPU seconds of a step and the tokens. Keys are float16 and flash attention is
off, its best setting on a CPU.
"""

import importlib
import json
import os
import sys
import time
from typing import Any

import numpy as np


def main() -> None:
    """Serve rounds until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints
    lc: Any = importlib.import_module("llama_cpp")
    file, threads, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with open(sys.argv[4], encoding="utf-8") as source:
        prompts = json.load(source)
    length = len(prompts[0])
    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(file.encode(), lc.llama_model_default_params())
    contexts: dict[int, Any] = {}

    def context(rows: int) -> Any:
        if rows not in contexts:
            asked = lc.llama_context_default_params()
            asked.n_ctx, asked.n_seq_max = -(-(length + steps) // 64) * 64 * rows, rows
            asked.n_batch = asked.n_ubatch = 512
            asked.n_threads = asked.n_threads_batch = threads
            asked.flash_attn_type = 0
            if hasattr(asked, "kv_unified"):
                asked.kv_unified = False
            contexts[rows] = lc.llama_init_from_model(model, asked)
        return contexts[rows]

    def step(where: Any, tokens: list[int], position: int) -> list[int]:
        batch = lc.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for row, token in enumerate(tokens):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, row
            batch.logits[row] = 1
        if lc.llama_decode(where, batch):
            sys.exit("llama_decode failed")
        size = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
        found = [
            int(np.ctypeslib.as_array(lc.llama_get_logits_ith(where, row), shape=(size,)).argmax())
            for row in range(len(tokens))
        ]
        lc.llama_batch_free(batch)
        return found

    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        rows = int(line)
        where = context(rows)
        lc.llama_memory_clear(lc.llama_get_memory(where), True)
        tokens: list[int] = []
        for position in range(length):
            tokens = step(where, [prompt[position] for prompt in prompts[:rows]], position)
        made = [tokens]
        wall, cpu = time.perf_counter(), time.process_time()
        for number in range(steps):
            tokens = step(where, tokens, length + number)
            made.append(tokens)
        answer = {
            "wall": (time.perf_counter() - wall) / steps,
            "cpu": (time.process_time() - cpu) / steps,
            "tokens": made,
        }
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
