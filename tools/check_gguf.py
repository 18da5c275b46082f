"""Compare greedy tokens of a model with those of llama.cpp on its .gguf files.

usage: python tools/check_gguf.py MODEL [--llama .llama-cpp] [--build] [--tokens 64]
           [--prompt TEXT]

MODEL is a run or a directory that `llmnorm export` takes. It is exported as f32, f16 and q8_0, and
llama.cpp continues the prompt from each file, as does our own model in float32. Prompt and
continuation must be the same tokens for f32 and f16; of q8_0, which rounds every weight to 8 bits,
it is reported after how many tokens it parts, and how close our two best tokens were there.

llama.cpp comes as llama-cpp-python, which has no wheels: `--build` compiles it once, into a virtual
environment of its own in `--llama` (half an hour of one core; needs a C++ compiler). CI does not
run this.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from llmnorm.exchange.gguf_file import export_gguf
from llmnorm.exchange.loading import load_model, open_source
from llmnorm.part import InputError

EXACT, ROUNDED = ("f32", "f16"), ("q8_0",)
CMAKE = {name: "OFF" for name in ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAVA_BUILD")}
CMAKE |= {"LLAMA_BUILD_TOOLS": "OFF", "LLAMA_BUILD_SERVER": "OFF", "LLAMA_CURL": "OFF"}
CMAKE |= {"GGML_NATIVE": "ON"}
# Runs in llama.cpp's environment; prints the prompt's tokens and those that follow. Weights are
# used as the file has them: repacked for AMX, those of q8_0 end the process with an illegal
# instruction where a processor names AMX and the system does not grant it (0.3.36).
CONTINUE = """
import json, sys
from llama_cpp import Llama, llama_cpp

params = llama_cpp.llama_model_default_params()
params.use_extra_bufts = False
llama_cpp.llama_model_default_params = lambda: params
file, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = Llama(file, n_ctx=len(prompt) + count + 8, n_threads=1, verbose=False)
ids = model.tokenize(prompt.encode(), add_bos=True, special=True)
found = model.generate(ids, temp=0.0, repeat_penalty=1.0)
print(json.dumps([ids, [next(found) for _ in range(count)]]))
"""


def build(directory: Path) -> None:
    """Compile llama-cpp-python into a virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    options = " ".join(f"-D{name}={value}" for name, value in CMAKE.items())
    environment = {**os.environ, "CMAKE_ARGS": options, "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
    words = ["-m", "pip", "install", "--no-binary", "llama-cpp-python", "llama-cpp-python"]
    subprocess.run([directory / "bin" / "python", *words], check=True, env=environment)


def of_llama(python: Path, file: Path, prompt: str, count: int) -> tuple[list[int], list[int]]:
    """llama.cpp's tokens of the prompt, and the greedy ones that follow."""
    words = [str(python), "-c", CONTINUE, str(file), prompt, str(count)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"llama.cpp: {file.name}: ended with code {done.returncode}")
    ids, more = json.loads(done.stdout.splitlines()[-1])
    return ids, more


def of_ours(model: Path, prompt: str, count: int) -> tuple[list[int], list[int], list[float]]:
    """As `of_llama`, by our model; an end token ends nothing, as in llama.cpp's `generate`.

    Returns:
        The prompt's tokens, those that follow, and by how many nats each led the second best.
    """
    directory = open_source(model).tokenizer
    assert directory is not None  # export_gguf refuses a model without
    loaded = load_model(model)[0].float().eval()
    ids = AutoTokenizer.from_pretrained(directory)(prompt).input_ids
    with torch.no_grad():
        out = loaded.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=-1
        )
        best = loaded(out[:, :-1]).logits[0, len(ids) - 1 :].topk(2).values
    return ids, out[0, len(ids) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def same(a: list[int], b: list[int]) -> int:
    """How many tokens two lists have in common from their beginning."""
    pairs = enumerate(zip(a, b, strict=True))
    return next((n for n, (mine, theirs) in pairs if mine != theirs), len(a))


def main() -> int:
    """Compares; returns 1 where an exact type is not equal."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama", type=Path, default=Path(".llama-cpp"))
    parser.add_argument("--build", action="store_true", help="compile llama.cpp first")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", default="The first of these is")
    options = parser.parse_args()
    python = options.llama / "bin" / "python"
    if options.build and not python.exists():
        build(options.llama)
    if not python.exists():
        raise InputError(f"--llama: there is no {python}; --build compiles llama.cpp there")
    ids, expected, leads = of_ours(options.model, options.prompt, options.tokens)
    wrong = 0
    with tempfile.TemporaryDirectory() as made:
        for kind in (*EXACT, *ROUNDED):
            file = Path(made) / f"{kind}.gguf"
            export_gguf(options.model, file, type=kind)
            theirs, found = of_llama(python, file, options.prompt, options.tokens)
            equal = same(expected, found)
            alike = "the same" if theirs == ids else f"{theirs} instead of {ids}"
            line = f"{kind}: prompt {alike}, {equal} of {options.tokens} greedy tokens equal"
            if equal < options.tokens:
                line += f"; there our token leads by {leads[equal]:.3f} nats"
            print(line)
            wrong += kind in EXACT and (theirs != ids or equal < options.tokens)
    return int(wrong > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"check_gguf: error: {error}")
