"""The configuration: overrides, messages, the saved tree, the schema, no torch."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from llmnorm.config.docs import describe_parts, json_schema, key_paths
from llmnorm.config.file import load
from llmnorm.config.saved import differences, to_tree, to_yaml
from llmnorm.config.tree import RunConfig
from llmnorm.config.yaml_text import read_yaml
from llmnorm.part import InputError

SMOKE = Path("configs/smoke.yaml")
SHIPPED = sorted(Path("configs").rglob("*.yaml"))
DEFAULTS = Path(
    "configs/finetune/defaults.yaml"
)  # of a command: no run by itself, as a size is none


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


MINIMAL = "data: {sources: default}\ntraining: {steps: 10}\n"


# The five that defeat common configuration libraries.


def test_short_form_then_its_key() -> None:
    config = load(SMOKE, ["schedule=wsd", "schedule.decay=0.3", "optimizer=adamw"]).config
    assert (config.schedule.name, config.schedule.decay) == ("wsd", 0.3)
    config = load(SMOKE, ["optimizer=adamw", "optimizer.lr=1e-3"]).config
    assert (config.optimizer.name, config.optimizer.lr) == ("adamw", 1e-3)


def test_long_form_of_the_name() -> None:
    assert load(SMOKE, ["schedule.name=linear"]).config.schedule.name == "linear"


def test_key_of_a_part_in_short_form() -> None:
    config = load(SMOKE, ["model.norm=layer", "model.norm.eps=1e-4"]).config
    assert (config.model.norm.name, config.model.norm.eps) == ("layer", 1e-4)
    assert load(SMOKE, ["model.norm.eps=1e-4"]).config.model.norm.eps == 1e-4


@pytest.mark.parametrize("text", ["2024_01", "007", "1e3", "true", "a #b", "1.50", "null_", "on"])
def test_text_stays_as_it_was_typed(text: str) -> None:
    assert load(SMOKE, [f"run_dir={text}"]).config.run_dir == Path(text)


def test_index_of_a_list() -> None:
    config = load(SMOKE, ["data.sources.0.weight=3"]).config
    assert [source.weight for source in config.data.sources] == [3, 1]


def test_a_part_in_a_list_is_a_part() -> None:
    """Oracle: the old part's keys are gone, the new one's are set."""
    config = load(
        SMOKE,
        [
            "model.mixer=[{name: nala, lam: 2.0}, softmax]",
            *("model.mixer.0=linear", "model.mixer.0.gate=true"),
        ],
    ).config
    first, second = config.model.mixer
    assert (first.name, first.gate, second.name) == ("linear", True, "softmax")


@pytest.mark.parametrize(
    ("mixer", "key"), [("matrix", "model.mixer"), ("[softmax, matrix]", "model.mixer.1")]
)
def test_a_part_in_a_part(mixer: str, key: str) -> None:
    """Oracle: what is refused is the key of the part that was named, not of the default."""
    given = [f"model.mixer={mixer}", f"{key}.family=toeplitz"]
    with pytest.raises(InputError, match=f"{key}.family.qk_dim: unknown key; valid: name, data_d"):
        load(SMOKE, [*given, f"{key}.family.qk_dim=3"])
    with pytest.raises(InputError, match=f"{key}.family.data_dependent: unknown key; valid: name"):
        more = [f"{key}.family.data_dependent=false", f"{key}.family=dense"]
        load(SMOKE, [*given, *more, f"{key}.family.data_dependent=true"])


# Merging.


def test_a_changed_name_drops_the_old_keys_and_says_so() -> None:
    loaded = load(SMOKE, ["schedule.final=0.5", "schedule=linear"])
    assert loaded.config.schedule.final == 0.0
    assert loaded.notes == [
        "schedule.final was dropped: a later override chose another part",
    ]


def test_a_key_without_a_name_keeps_the_base_part(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "schedule: {name: wsd, decay: 0.4}\n", "base.yaml")
    path = write(tmp_path, "base: base.yaml\nschedule: {warmup: 2}\nseed: 3\n")
    config = load(path).config
    assert (config.schedule.name, config.schedule.decay, config.schedule.warmup) == ("wsd", 0.4, 2)
    assert config.seed == 3


def test_bases_apply_in_order_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "sizes").mkdir()
    write(tmp_path / "sizes", MINIMAL + "seed: 1\nmodel: {hidden_size: 128}\n", "a.yaml")
    write(tmp_path / "sizes", "seed: 2\n", "b.yaml")
    path = write(tmp_path, "base: [sizes/a.yaml, sizes/b.yaml]\n")
    config = load(path).config
    assert (config.seed, config.model.hidden_size) == (2, 128)


def test_a_base_that_leads_back_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: run.yaml\n", "other.yaml")
    with pytest.raises(InputError, match="leads back"):
        load(write(tmp_path, "base: other.yaml\n"))


def test_the_environment_is_expanded_before_its_type_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_SEED", "17")
    path = write(tmp_path, MINIMAL + 'seed: ${THE_SEED}\nrun_dir: "r/${THE_SEED}"\n')
    config = load(path).config
    assert (config.seed, config.run_dir) == (17, Path("r/17"))


def test_import_path_is_imported_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_part.py").write_text(
        "from llmnorm.nn.norms.settings import NormSettings\n"
        "class MyNorm(NormSettings):\n    eps: float = 0.5\n    def build(self, hidden_size): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = load(SMOKE, ["model.norm=own_part:MyNorm", "model.norm.eps=0.25"]).config
    assert type(config.model.norm).__name__ == "MyNorm"
    assert to_tree(config)["model"]["norm"] == {"name": "own_part:MyNorm", "eps": 0.25}
    with pytest.raises(
        InputError, match=r"command line: model.norm.epss: unknown key; did you mean 'eps'"
    ):
        load(SMOKE, ["model.norm=own_part:MyNorm", "model.norm.epss=0.25"])


# Messages: tests/test_mistakes.py holds them; here what only `load` knows.


def test_several_mistakes_are_a_line_each() -> None:
    with pytest.raises(InputError) as error:
        load(SMOKE, ["model.nrom=rms", "training.steps=-4"])
    assert str(error.value).splitlines() == [
        "command line: model.nrom: unknown key; did you mean 'norm'?",
        "command line: training.steps: must be at least 1, got -4",
    ]


def test_a_word_that_is_no_override_is_refused() -> None:
    with pytest.raises(InputError, match="'nonsense' is not an override; write key.sub=value"):
        load(SMOKE, ["nonsense"])


# The saved tree.


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_the_saved_tree_reads_back_the_same(tmp_path: Path, path: Path) -> None:
    if "training" not in yaml.safe_load(path.read_text()) and "base" not in path.read_text():
        pytest.skip("a size, to be used as a base")
    config = load(path).config
    again = load(write(tmp_path, to_yaml(config))).config
    assert differences(to_tree(config), to_tree(again)) == {}


def test_what_is_derived_is_not_saved_unless_it_was_written() -> None:
    assert "head_dim" not in to_tree(load(SMOKE).config)["model"]
    assert to_tree(load(SMOKE, ["model.head_dim=8"]).config)["model"]["head_dim"] == 8


def test_keys_without_a_value_are_not_saved() -> None:
    # Oracle: the settings that are read back; a value that was given is saved and told apart.
    rope = to_tree(load(SMOKE).config)["model"]["rope_parameters"]
    assert rope == {"rope_type": "default", "rope_theta": 10_000.0}
    yarn = ["rope_type=yarn", "factor=2", "original_max_position_embeddings=64"]
    words = [f"model.rope_parameters.{word}" for word in yarn]
    plain = load(SMOKE, words).config
    changed = load(SMOKE, [*words, "model.rope_parameters.beta_fast=16"]).config
    assert differences(to_tree(plain), to_tree(changed)) == {
        "model.rope_parameters.beta_fast": (None, 16.0)
    }


def test_differences_are_named_by_their_key() -> None:
    one, other = load(SMOKE).config, load(SMOKE, ["optimizer.lr=1", "seed=4"]).config
    assert differences(to_tree(one), to_tree(other)) == {
        "seed": (0, 4),
        "optimizer.lr": (3e-3, 1.0),
    }


# Documentation.


def test_the_committed_schema_is_the_current_one() -> None:
    committed = json.loads(Path("configs/config.schema.json").read_text())
    if committed != json_schema():  # an assertion would print pages of difference
        pytest.fail("it is old; run: llmnorm config --schema > configs/config.schema.json")


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_every_shipped_configuration_validates_and_names_the_schema(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    marker = "# yaml-language-server: $schema="
    assert first.startswith(marker), f"{path}: its first line must be `{marker}...`"
    assert (path.parent / first.removeprefix(marker)).resolve() == Path(
        "configs/config.schema.json"
    ).resolve()
    jsonschema.Draft202012Validator(json_schema()).validate(read_yaml(path))


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": {"nrm": "rms"}},
        {"model": {"norm": "foo"}},
        {"optimizer": {"lrr": 1}},
        {"seed": "x"},
        {"optimizer": {"name": "muon", "momentum": 1}},
        {"optimizer": {"name": "muon", "momentum": {"from": 0.9, "to": 0.95, "steps": 0}}},
    ],
)
def test_the_schema_refuses(wrong: dict) -> None:
    assert not jsonschema.Draft202012Validator(json_schema()).is_valid(wrong)


@pytest.mark.parametrize(
    "right",
    [
        {"model": {"norm": "a.b:Norm", "mixer": ["softmax"], "vocab_size": "auto"}},
        {"optimizer": {"name": "muon", "momentum": {"from": 0.85, "to": 0.95, "steps": 300}}},
        {"seed": "${SEED}", "base": ["a.yaml"], "optimizer": {"weight_decay": 0.1}},
    ],
)
def test_the_schema_accepts_short_forms_auto_and_import_paths(right: dict) -> None:
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(right)


def test_every_field_is_documented() -> None:
    undocumented = [
        f"{name}.{key}"
        for name, schema in json_schema()["$defs"].items()
        for key, value in schema["properties"].items()
        if "description" not in value
    ]
    assert undocumented == []


def test_parts_lists_every_part_and_refuses_an_unknown_one() -> None:
    text = describe_parts()
    for name in (
        *("rms:", "layer:", "softmax:", "adamw:", "cosine:", "wsd:", "weight_decay = 0.1"),
        *("model.mixer.family:", "toeplitz:", "quasiseparable:"),
    ):
        assert name in text
    muon = describe_parts("muon")
    for line in ("momentum = 0.95", "{from: 0.85, to: 0.95, steps: 300}", "variant = 'jordan'"):
        assert line in muon
    assert "lr = (depends on other settings)" in muon and "Undefined" not in text
    with pytest.raises(InputError, match="did you mean 'adamw'"):
        describe_parts("adam")


def test_key_paths_cover_the_parts() -> None:
    assert {
        *("model.norm", "model.norm.eps", "model.mixer.family.qk_dim"),
        *("optimizer.auxiliary.lr", "training.steps"),
        *("optimizer.momentum", "optimizer.momentum.from", "optimizer.momentum.steps"),
    } <= set(key_paths())


def test_no_torch_is_loaded_by_any_shipped_configuration() -> None:
    code = (
        "import sys, pathlib\n"
        "from llmnorm.config.file import load\n"
        "from llmnorm import cli\n"
        f"for path in {[str(p) for p in SHIPPED if 'models' not in p.parts and p != DEFAULTS]!r}:\n"
        "    load(pathlib.Path(path))\n"
        "cli.main(['config', 'configs/smoke.yaml'])\n"
        "cli.main(['train', 'configs/smoke.yaml', 'training.stepz=1'])\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(SMOKE).config.seed = 1  # type: ignore[misc]
    assert isinstance(load(SMOKE).config, RunConfig)
