"""A run of two processes whose directory is an address, against a real S3 server."""

from functools import partial
from pathlib import Path

from llmnorm.remote.objects import open_store
from tests.distributed.processes import command, launch_environment, run
from tests.remote.served import Line, environment
from tests.running import SMOKE, assert_same_run


def test_two_processes_go_on_elsewhere_as_one_run(
    address: str, line: Line, smoke_data: Path, tmp_path: Path
) -> None:
    """Oracle: the same two processes without a store; a refusal reaches both of them."""
    found = {**launch_environment("launch/accelerate/ddp.yaml"), **environment(line.port)}
    settings = ["training.steps=6", "checkpoint.every=3", "evaluation.samples=0"]
    common = ["train", str(SMOKE), f"data.dir={smoke_data}", *settings]

    def train(name: str, *words: str) -> list[tuple[int, str, str]]:
        scenario = partial(command, words=[*common, *words])
        answers = run(scenario, tmp_path / f"processes-{name}", environment=found)
        assert all(isinstance(answer, list) for answer in answers), answers
        return [(code, out, err) for code, out, err in answers]

    refused = train("refused", "run_dir=s3://no-bucket/x", f"checkpoint.local={tmp_path / 'x'}")
    assert [code for code, _, _ in refused] == [2, 2]
    assert "there is no bucket no-bucket" in refused[0][2] and not (tmp_path / "x").exists()

    whole = train("whole", f"run_dir={tmp_path / 'whole'}")
    assert [code for code, _, _ in whole] == [0, 0], whole
    first = train("first", f"run_dir={address}", f"checkpoint.local={tmp_path / 'first'}")
    assert [code for code, _, _ in first] == [0, 0], first
    store = open_store(address, "run_dir")
    store.remove([*store.names("checkpoints/step_00000006"), "DONE"])  # as after a kill
    second = train("second", f"run_dir={address}", f"checkpoint.local={tmp_path / 'second'}")
    assert [code for code, _, _ in second] == [0, 0], second
    assert "fetching step 3 (" in second[0][2]
    assert_same_run(tmp_path / "whole", tmp_path / "second", 6)
