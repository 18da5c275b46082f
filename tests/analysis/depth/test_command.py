"""`llmnorm inspect`: runs, directories of any architecture, the page, and what it refuses."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmnorm import cli
from llmnorm.analysis.depth.page import SECTIONS, page
from llmnorm.analysis.depth.pictures import pictures
from tests.analysis.depth.tiny import kill
from tests.running import llmnorm, state_of

FILES = {"inspect.html", "inspect.json", *(f"{name}.png" for name in SECTIONS)}


def found(directory: Path) -> list[dict[str, Any]]:
    assert {file.name for file in directory.iterdir()} == FILES
    return json.loads((directory / "inspect.json").read_text())["models"]


def mistake(capsys, *words: str | Path) -> str:
    capsys.readouterr()
    assert cli.main(["inspect", *map(str, words)]) == 2
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("llmnorm: error: ")]
    assert len(said) == 1, said
    return said[0]


def stock(directory: Path, kind: str, trained: Path, **settings: Any) -> Path:
    """A tiny random model of transformers' own with the run's tokenizer."""
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(kind, **shape, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    shutil.copytree(trained / "tokenizer", directory, dirs_exist_ok=True)
    return directory


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    directory = trained.parent / "exported"
    llmnorm("export", trained, directory)
    return directory


@pytest.fixture(scope="module")
def inspected(trained: Path) -> Path:
    llmnorm("inspect", trained, "--rows", "16")
    return trained / "plots" / "inspect"


def test_a_run_is_read_to_the_last_digit(trained, tmp_path, capsys) -> None:
    """Oracle: `llmnorm eval` on all rows of one source; a line a block, and where the page is."""
    config = tmp_path / "one.yaml"
    config.write_text(
        f"base: {Path('configs/smoke.yaml').resolve()}\n"
        f"data: {{dir: {tmp_path}, sources: [{{name: notes, path: tests/data/text/notes.txt}}]}}\n"
    )
    llmnorm("eval", trained, "--data", config)
    evaluated = json.loads((trained / "eval" / "step_00000012.json").read_text())
    loss = evaluated["validation"]["loss"]
    out = tmp_path / "page"
    capsys.readouterr()
    llmnorm("inspect", trained, "--data", config, "--rows", "9999", "--out", out)
    (model,) = found(out)
    assert list(model["rows"]) == ["notes"] and model["data"] == evaluated["data"]
    assert model["figures"]["removal"]["loss"]["mean"] == pytest.approx(loss, rel=1e-6)
    printed = capsys.readouterr().out
    assert f"deep, step 12: LlmNormForCausalLM, 3 blocks, loss {loss:.4f}" in printed
    assert len(re.findall(r"^ +\d+ ", printed, re.M)) == 3
    assert printed.endswith(f"page: {out / 'inspect.html'}\n")


def test_a_planted_dead_block_is_named_beside_the_run(trained, exported, tmp_path, capsys) -> None:
    """Oracle: block 2 of the exported weights is zeroed; the run itself has no dead block."""
    spoilt = shutil.copytree(exported, tmp_path / "spoilt <b>")
    weights = load_file(spoilt / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.1.{name}.weight"].zero_()
    save_file(weights, spoilt / "model.safetensors", {"format": "pt"})
    llmnorm("inspect", spoilt, trained, "--rows", "9")
    one, other = found(spoilt / "inspect")
    assert one["dead"] == [2] and other["dead"] == []
    assert one["figures"]["removal"]["block"]["mean"][1] == 0
    assert one["figures"]["branch_ratio"]["mlp"][1] == 0
    assert "Block 2 is dead: the stream is not changed." in capsys.readouterr().out
    html = (spoilt / "inspect" / "inspect.html").read_text()
    assert html.count("Block 2 is dead") == 1 and html.count('<tr class="dead">') == 1
    assert "spoilt &lt;b&gt;" in html and "<b>, step" not in html


class Counted(HTMLParser):
    """Opening tags that were not closed, pictures, and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_beside_it(inspected) -> None:
    """Oracle: a parser: every tag is closed, every picture embedded and a PNG, no address."""
    html = (inspected / "inspect.html").read_text()
    parser = Counted()
    parser.feed(html)
    assert parser.open == [] and len(parser.sources) == len(SECTIONS)
    assert all(source.startswith("data:image/png;base64,iVBORw0KGgo") for source in parser.sources)
    assert "http" not in html


@pytest.mark.parametrize(
    ("kind", "settings", "absent"),
    [
        ("llama", {"intermediate_size": 24}, {}),
        ("qwen3", {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}, {}),
        ("gpt2", {}, {"variance_law": "GPT2Attention has no v_proj"}),
    ],
)
def test_stock_directories_are_read_as_what_they_are(
    kind: str, settings: dict[str, Any], absent: dict[str, str], trained, tmp_path
) -> None:
    """Oracle: transformers' own loss on the same text; what the architecture lacks is named."""
    directory = stock(tmp_path / kind, kind, trained, **settings)
    kill_last(directory)
    llmnorm("inspect", directory, "--data", trained, "--rows", "8")
    (model,) = found(directory / "inspect")
    assert model["absent"] == absent and model["dead"] == [2]
    assert model["architecture"].lower().startswith(kind) and model["layers"] == 2
    loss = model["figures"]["removal"]["loss"]["mean"]
    assert loss == pytest.approx(torch.tensor(512.0).log().item(), abs=0.1)  # random weights
    assert (directory / "inspect" / "gains.png").stat().st_size > 10_000


def kill_last(directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    kill(blocks[-1])
    model.save_pretrained(directory)


def test_two_checkpoints_of_a_run_are_told_apart(trained, tmp_path) -> None:
    """Oracle: their steps; the figures differ."""
    out = tmp_path / "page"
    llmnorm("inspect", trained / "checkpoints/step_00000006", trained, "--rows", "8", "--out", out)
    one, other = found(out)
    assert [one["name"], other["name"]] == ["deep, step 6", "deep, step 12"]
    assert one["figures"]["removal"]["loss"]["mean"] > other["figures"]["removal"]["loss"]["mean"]
    name = "mlp.up_proj.weight"
    states = [state_of(trained, step) for step in (6, 12)]
    before, after = (state[f"model.model.layers.1.{name}"] for state in states)
    distance = other["figures"]["weight_distance"]
    expected = float((after - before).norm() / before.norm())
    assert distance["matrices"][name][1] == pytest.approx(expected, rel=1e-6)
    assert 0 < distance["block"][1] < 1 and "weight_distance" not in one["figures"]
    llmnorm("inspect", trained, "--ema", "--rows", "2", "--out", out)
    assert found(out)[0]["name"] == "deep, step 12, moving average"


def test_pictures_show_what_was_not_measured_as_nothing(inspected) -> None:
    """Oracle: a model without branches, norms, entropy and law can be drawn and told of."""
    (model,) = found(inspected)
    figures, nothing = model["figures"], [None] * 3
    figures["branch_ratio"] = {"mixer": nothing, "mlp": nothing}
    figures["attention_entropy"] = dict.fromkeys(figures["attention_entropy"], nothing)
    for part in ("mixer", "mlp"):
        figures["removal"][part] = {"mean": nothing, "standard_error": nothing}
    figures["gains"] = {}
    del figures["variance_law"]
    reasons = ("mixer", "mlp", "attention_entropy", "gains", "variance_law")
    model["absent"] = {key: f"no {key} & so on" for key in reasons}
    html = page([model], pictures([model]))
    for key in reasons:
        assert f"no {key} &amp; so on" in html


def test_mistakes_are_one_line(trained, exported, tmp_path, capsys) -> None:
    """Oracle: the messages."""
    assert "there is no directory" in mistake(capsys, tmp_path / "none")
    assert "neither config.yaml (a run) nor config.json" in mistake(capsys, tmp_path)
    assert "there is no directory" in mistake(capsys, trained, tmp_path / "none")
    assert "name the text by --data CONFIG_OR_RUN" in mistake(capsys, exported)
    assert "settings such as 'data.seed=1' need --data" in mistake(capsys, exported, "data.seed=1")
    assert "inspect reads the sections data," in mistake(capsys, trained, "model.norm=layer")
    assert "--ema: " in mistake(capsys, exported, "--ema", "--data", trained)
    assert "expected a whole number of at least 1" in mistake(capsys, trained, "--rows", "0")
    file = tmp_path / "file"
    file.touch()
    assert "cannot be written" in mistake(capsys, trained, "--rows", "1", "--out", file / "page")
    encoder = stock(tmp_path / "bert", "bert", trained, intermediate_size=24)
    assert "earlier logits depend on later tokens" in mistake(capsys, encoder, "--data", trained)
    llama = stock(tmp_path / "llama", "llama", trained, intermediate_size=24)
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    said = mistake(capsys, llama, "--data", trained)
    assert "holds no tensor 'model.layers.1.mlp.up_proj.weight'" in said
    (llama / "model.safetensors").write_bytes(b"nothing")
    assert "llama" in mistake(capsys, llama, "--data", trained)
    (llama / "model.safetensors").unlink()
    assert "llama" in mistake(capsys, llama, "--data", trained)
    (llama / "tokenizer.json").unlink()
    assert "has no tokenizer (no tokenizer.json)" in mistake(capsys, llama, "--data", trained)
    (llama / "config.json").write_text('{"model_type": "unheard"}')
    assert "unheard" in mistake(capsys, llama, "--data", trained)


def test_sizes_that_the_weights_do_not_have_are_refused_before_a_model_is_made(
    trained: Path, tmp_path: Path, capsys
) -> None:
    """Oracle: the key, in a model of so many layers or tokens as no memory holds."""
    for key, value in (("num_hidden_layers", 10**8), ("vocab_size", 2**62)):
        directory = stock(tmp_path / key, "llama", trained)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        (directory / "config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
        said = mistake(capsys, directory, "--data", trained)
        assert f"config.json: {key} is {value}, which is more than the weights have" in said
