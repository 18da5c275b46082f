"""The child of decode_profile.py: calls and time of a decode step by kind, of one checkout.

usage: python tools/bench/decode_kinds.py '{"mixer": "nala", "hidden": 512, "layers": 8, ...}'

Which kind a call is of, the file says that made it: the innermost frame of this package, which an
eager step tells by its stack and a captured one by the places that its graph's nodes remember.
Calls are those into torch, views counted and questions of shapes left out. Times of an eager step
are CPU seconds around each call; those of a captured one are torch's profiler's.

Prints a line of JSON: {way: {"step": milliseconds, "calls": {kind: n}, "us": {kind: n}}}; the ways
are `model` (the model called with its cache), `eager` and `captured` (a Decoder, where there is
one). It runs on older checkouts too, so it imports nothing that they lack.
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from llmnorm.models import LlmNormConfig
from llmnorm.models.building import build_model

PROMPT = 128
QUESTIONS = {
    *("__get__", "size", "dim", "numel", "stride", "is_floating_point", "element_size", "__len__"),
    *("data_ptr", "untyped_storage", "is_inference", "is_complex", "is_contiguous"),
}
KINDS: list[tuple[str, tuple[str, ...]]] = [
    ("products", ("nn/projections.py", "nn/linear.py", "nn/loss.py")),
    ("norm", ("nn/norms/",)),
    ("rotation", ("nn/mixers/rotary.py",)),
    ("attention", ("nn/key_values.py", "nn/cache.py", "models/cache.py")),
    ("state", ("nn/mixers/", "nn/recurrent_cache.py", "nn/states.py")),
]
Frame = tuple[str, str]  # path and function
Numbers = defaultdict[str, float]  # by kind
Figures = tuple[Numbers, Numbers]  # calls and microseconds


def kind_of(frames: Sequence[Frame]) -> str:
    """The kind of a call that was made there, innermost frame first."""
    for path, function in frames:
        name = path.rpartition("/llmnorm/")[2]
        if name == path:
            continue
        if name == "nn/mixers/softmax.py":
            return "attention" if "mix" in function or "attend" in function else "rest"
        if name == "models/decoding.py":
            return "attention" if function == "append" else "rest"
        for kind, beginnings in KINDS:
            if name.startswith(beginnings):
                return kind
        return "rest"
    return "rest"


class Noting(TorchFunctionMode):
    """Counts and times the calls of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.us = Numbers(float), Numbers(float)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call; note it."""
        begin = time.thread_time_ns()
        out = func(*args, **(kwargs or {}))
        took = time.thread_time_ns() - begin
        if getattr(func, "__name__", "") not in QUESTIONS:
            kind = kind_of(_stack(sys._getframe(1)))
            self.calls[kind] += 1
            self.us[kind] += took / 1000
        return out


def _stack(frame: FrameType | None) -> list[Frame]:
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return found


def eager_figures(step: Callable[[], object], steps: int) -> Figures:
    """Calls of one step, and the medians over the steps of the times."""
    noted = []
    for _ in range(steps):
        with Noting() as mode:
            step()
        noted.append(mode)
    return noted[-1].calls, _medians([mode.us for mode in noted])


def captured_figures(step: Callable[[], object], steps: int) -> Figures:
    """The same of a graph: its calls, in the order of its nodes."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    nodes = list(torch.jit.last_executed_optimized_graph().nodes())
    names = [node.kind().replace("prim::ConstantChunk", "aten::chunk") for node in nodes]
    kinds = [_kind_of_node(node) for node in nodes]
    calls, times = Numbers(float), []
    for graph in (e for e in profiler.events() if e.name == "__call__" and e.cpu_children):
        calls, us, last = Numbers(float), Numbers(float), 0
        for event in sorted(graph.cpu_children, key=lambda e: e.time_range.start):
            at = next((n for n in range(last, len(names)) if names[n] == event.name), None)
            kind = "rest"
            if at is not None:
                kind, last = kinds[at], at + 1
            calls[kind] += 1
            us[kind] += event.time_range.elapsed_us()
        times.append(us)
    return calls, _medians(times)


def _kind_of_node(node: Any) -> str:
    if node.kind().startswith("mkldnn"):  # a script, which remembers no file of ours
        return "products"
    frames = []
    for line in node.sourceRange().splitlines():  # "FILE(12): function"
        path, _, rest = line.rpartition("(")
        frames.append((path, rest.rpartition(": ")[2]))
    return kind_of(frames)


def _medians(some: list[Numbers]) -> Numbers:
    kinds = {kind for each in some for kind in each}
    found = {kind: statistics.median(each[kind] for each in some) for kind in kinds}
    return Numbers(float, found)


def main() -> None:
    """Print the figures."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    config = LlmNormConfig(
        vocab_size=4096,
        hidden_size=given["hidden"],
        intermediate_size=-(-given["hidden"] * 8 // 3 // 32) * 32,
        num_hidden_layers=given["layers"],
        num_attention_heads=max(1, given["hidden"] // 64),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        mixer=given["mixer"],
    )
    model = build_model(config, seed=0).to(getattr(torch, given["dtype"])).eval()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 4096, (given["rows"], PROMPT), generator=generator)
    token, found = prompt[:, :1], {}
    with torch.no_grad():
        for way, (fill, step) in _ways(model, token).items():
            fill(prompt)
            for _ in range(4):  # a graph is traced, and then optimized
                step()
            times = []
            for _ in range(given["steps"]):
                begin = time.process_time()
                step()
                times.append(time.process_time() - begin)
            figures = captured_figures if way == "captured" else eager_figures
            calls, us = figures(step, given["steps"])
            found[way] = {"step": 1e3 * statistics.median(times), "calls": calls, "us": us}
    print(json.dumps(found))


Way = tuple[Callable[[torch.Tensor], object], Callable[[], object]]


def _ways(model: Any, token: torch.Tensor) -> dict[str, Way]:
    """By name: what takes in a prompt, and a step."""
    behind = model.model.new_cache()

    def called(ids: torch.Tensor) -> object:
        return model(ids, past_key_values=behind, use_cache=True)

    ways: dict[str, Way] = {"model": (called, lambda: called(token))}
    try:
        from llmnorm.models.decoding import Decoder
    except ImportError:
        return ways
    for way in ("eager", "captured"):
        decoder = Decoder(model, captured=way == "captured")
        cache = decoder.new_cache()

        decoded = partial(decoder.step, cache=cache)
        ways[way] = decoded, partial(decoded, token)
    return ways


if __name__ == "__main__":
    main()
