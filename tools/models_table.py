"""What every decoder of the installed transformers can do here: docs/models.md and its figures.

usage: python tools/models_table.py             (all types that are not in the figures yet)
       python tools/models_table.py TYPE ...    (these again)
       python tools/models_table.py --page      (makes the page from the figures)

Each type is a tiny random model of its class, 4 layers and 32 wide, in float32. It is looked at as
a run would (`llmnorm/models/looks.py`), gets an adapter wherever PEFT puts one, is written, merged
and read again by plain PEFT and transformers, and takes a step on two processes under FSDP2. Two
processes of its own do that, so that a class that hangs or dies costs its row alone.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "results" / "models" / "types.json"
PAGE = ROOT / "docs" / "models.md"
PATIENCE = 900  # seconds for a type
VOCABULARY, LAYERS = 96, 4
# Sizes by the names that configurations have for them; a class is given those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("block_dim", "conv_dim", "dim", "attention_hidden_size", "dim_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "d_kv", "attention_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "rope_dim", "rotary_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim",), 8),
    **dict.fromkeys(("qk_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(
        ("block_ff_dim", "dense_intermediate_size", "intermediate_size_mlp", "d_ff"), 48
    ),
    **dict.fromkeys(("dff", "decoder_ffn_dim", "shared_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "num_kv_shared_layers"), 1),
    **dict.fromkeys(
        ("mamba_n_groups", "n_groups", "moe_num_shared_experts", "n_shared_experts"), 1
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("state_size", "chunk_size", "mamba_chunk_size", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "mamba_d_ssm": 64},
    **{"vocab_size_per_layer_input": VOCABULARY},
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 6),
    **{"block_multiple_of": 16, "mamba_expand": 2, "expand": 2},
}
# Keys that are None by default, and are read as a number all the same.
_NEEDED = {"head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts"}
_NEEDED |= {"n_group", "topk_group", "n_shared_experts"}
OTHERS: dict[str, dict[str, Any]] = {  # what sizes alone do not tell
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
}
_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")


def types() -> list[str]:
    """Types of models for which transformers has a causal language model without an encoder."""
    pictures = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    return sorted(
        name
        for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if kind not in pictures
        and not kind.endswith("ForConditionalGeneration")
        and not getattr(CONFIG_MAPPING[name], "is_encoder_decoder", False)
    )


def tiny_of(name: str) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """A small configuration of a type, and its class."""
    try:
        config = AutoConfig.for_model(name)
    except Exception:  # of any kind: a class whose defaults contradict each other
        config = CONFIG_MAPPING[name](hidden_size_per_layer_input=0)
    kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    text = config.sub_configs.get("text_config")
    if text is not None and kind.config_class is text:
        config = config.get_text_config()
    return small(config), kind


def small(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration of the same class with the sizes above; kinds of layers take turns."""
    known = {name: value for name, value in SIZES.items() if _takes(config, name)}
    if _takes(config, "is_decoder"):
        known["is_decoder"] = True  # of an encoder's class that can be one
    if "kv_lora_rank" in known:
        known["num_key_value_heads"] = 4  # keys are compressed, and shared by no heads
    if hasattr(config, "attn_layer_indices"):
        known["attn_layer_indices"] = [1, 3]  # from which Bamba's kinds of layers follow
    for name in _LISTS:
        if not _takes(config, name):
            continue
        kinds = getattr(config, name)
        if isinstance(kinds, list | tuple) and kinds:
            several = list(dict.fromkeys(kinds))
            known[name] = [several[i % len(several)] for i in range(LAYERS)]
    known |= OTHERS.get(config.model_type, {})
    try:
        return type(config)(**known)
    except Exception:  # of any kind: a class that checks sizes against others
        for name, value in known.items():
            setattr(config, name, value)
        return config


def _takes(config: PreTrainedConfig, name: str) -> bool:
    """Whether a size of this name can be given to a configuration."""
    own = config.attribute_map.get(name, name)
    if isinstance(getattr(type(config), own, None), property):
        return False  # follows from other keys
    try:
        value = getattr(config, own)
    except Exception:  # of any kind: there is none, or one a layer
        return False
    return value is not None or name in _NEEDED


def measure(name: str) -> dict[str, Any]:
    """A type's row, by two processes."""
    import models_probe

    context = multiprocessing.get_context("forkserver")
    # A class then costs its own time and not that of imports.
    context.set_forkserver_preload(["models_probe", "peft", "accelerate", "deepspeed"])
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        started = [
            context.Process(target=models_probe.main, args=(name, tiny_of, directory, rank, 2))
            for rank in range(2)
        ]
        for process in started:
            process.start()
        started[0].join(PATIENCE)
        late = started[0].is_alive()
        for process in started:
            process.kill()
            process.join()
        file = directory / "row.json"
        row: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if late or not row:
        row["sharded"] = f"no answer after {PATIENCE} seconds" if late else "the process died"
    return row


HEADING = """# Models of transformers

`model.pretrained: DIRECTORY` trains any causal language model that transformers has a class for. Llama, Mistral, Qwen2 and Qwen3 become llmnorm's own classes (faster, with all parts); every other directory keeps the class that transformers has for it, and `model.classes: transformers` asks for that class by name. Rows, losses, optimizers, sharding, adapters and checkpoints are llmnorm's in both cases.

Nothing about a family is written down. A run looks at the model when its weights are there and prints what it saw; `llmnorm train CONFIG --dry-run` prints it and trains nothing. The table is what such looks saw in a tiny random model of every decoder that {versions} have, made by `python tools/models_table.py` ([figures](results/models/types.json)). Sizes, windows and kernels of a real model may differ, so the run's own table is the one that counts.

- **Documents** of a packed row are kept apart by `positions` that restart at 0, by transformers' packed `mask` besides, or each gets a row of its own (`apart`), padded on the right.
- **Head**: `linear` means that the loss is made in chunks without logits; `own`, that the class's own forward pass makes it of the labelled hidden states, in chunks; `logits`, that all logits are there at once.
- **Recomputed**: `parallel.activation_checkpointing` gives the gradients that a run without it has.
- **LoRA**: how many linear layers of four blocks get an adapter under `adapter.targets: all-linear`. In brackets: layers that get none, since PEFT would not load an adapter there. Stacks of experts and their routers are no linear layers; [`adapter.parameters`](fine-tuning.md#adapters-of-experts) asks for stacks.
- **Sharded**: a step of two processes under `fsdp2` is that of one.
- **Merged**: an exported adapter computes the same in plain PEFT, and merged in plain transformers.

{count} of {all} types run. Errors up to {small} of the largest number count as the same.

"""  # noqa: E501
CURES = """
## What to do about a no

- **Recomputed: no.** Leave `parallel.activation_checkpointing` out, or give more processes a smaller part.
- **Sharded: no.** Train with `parallel.sharding: ddp`, where each process has the whole model.
- **LoRA: none, or layers in brackets.** The other layers of the block are trained. `training.trainable: norms`, or all weights without an adapter, need no layers of PEFT's.
- **Without a gradient.** Such layers are not used in the forward pass that was looked at, and a run stops and names them. Name the others in `adapter.targets`.
- **Merged: no.** Use the run itself (`llmnorm generate`, `llmnorm export RUN DIRECTORY --merge`), and compare before you give the adapter to other tools.
- **Documents: `apart`.** Nothing is wrong, but padding costs time: the run prints its share.
- **Does not run.** The reason below is that of transformers' class, or says that the tiny model could not be made; a real directory of that type may run.
"""  # noqa: E501


def page(figures: dict[str, Any]) -> str:
    """The text of docs/models.md."""
    rows = figures["types"]
    running = {name: row for name, row in rows.items() if isinstance(row.get("ways"), list)}
    versions = [f"{package} {number}" for package, number in figures["versions"].items()]
    heading = HEADING.format(
        versions=", ".join(versions[:-1]) + f" and {versions[-1]}",
        count=len(running),
        all=len(rows),
        small="5e-4",
    )
    columns = ("Type", "Class", "Documents", "Head", "Recomputed", "LoRA", "Sharded", "Merged")
    lines = [columns, ["---"] * len(columns)]
    lines += [_cells(name, row) for name, row in running.items()]
    text = heading + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" + CURES
    noes = {name: _noes(row) for name, row in rows.items()}
    reasons = [f"- `{name}`: {why}" for name, found in noes.items() for why in found]
    return text + "\n## Reasons\n\n" + "\n".join(reasons) + "\n"


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    adapter = row.get("adapter")
    lora, merged = "no", "no"
    if isinstance(adapter, dict):
        left = f" ({', '.join(adapter['left_out'])})" if adapter["left_out"] else ""
        same = _is_yes(adapter["peft"]) and _is_yes(adapter["merged"])
        lora, merged = f"{adapter['layers']}{left}", "yes" if same else "no"
    ways = [row["ways"][0], row["ways"][1]]
    flags = ["yes" if _is_yes(row.get(key)) else "no" for key in ("recomputation", "sharded")]
    return [f"`{name}`", row["class"], *ways, flags[0], lora, flags[1], merged]


def _is_yes(value: Any) -> bool:
    return value is True or isinstance(value, float)


def _noes(row: dict[str, Any]) -> list[str]:
    """What a type cannot do, each with its reason."""
    if not isinstance(row.get("ways"), list):
        return [f"does not run: {_plain(row.get('ways') or row.get('class') or row['sharded'])}"]
    found = []
    for key, what in (
        ("recomputation", "not recomputed"),
        ("saved", "weights are not written as transformers would"),
        ("adapter", "no adapter, or another result in plain PEFT"),
        ("sharded", "not sharded"),
    ):
        value = row.get(key)
        if not _is_yes(value) and not isinstance(value, dict):
            found.append(f"{what}: {_plain(value)}")
    adapter = row.get("adapter")
    if isinstance(adapter, dict):
        for key, what in (("peft", "in plain PEFT"), ("merged", "merged")):
            if not _is_yes(adapter[key]):
                found.append(f"an adapter {what}: {_plain(adapter[key])}")
    if isinstance(adapter, dict) and adapter["without_gradient"]:
        found.append(f"adapters without a gradient: {', '.join(adapter['without_gradient'])}")
    return found


def _plain(reason: Any) -> str:
    """A reason as text of a page."""
    text = " ".join(str(reason or "it was not found out").split())
    return "".join(f"\\{c}" if c in "|<>*_[]`" else c for c in text)


def main(words: list[str]) -> None:
    """Measure what is asked for, a type at a time, and make the page."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"types": {}}
    names = [] if "--page" in words else words or [n for n in types() if n not in figures["types"]]
    for name in names:
        figures["types"][name] = measure(name)
        figures["types"] = dict(sorted(figures["types"].items()))
        figures["versions"] = {p: version(p) for p in ("transformers", "torch", "peft")}
        FIGURES.parent.mkdir(parents=True, exist_ok=True)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(figures["types"][name]), flush=True)
    PAGE.write_text(page(figures), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1:])
