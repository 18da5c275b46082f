"""A stand-in for Slurm's sbatch, srun and scontrol, on one machine, as their manual pages say.

    python slurm.py sbatch|srun|scontrol WORDS

What it holds to: the script is a copy and runs on the first node; a signal of `--signal=B:` reaches
the batch shell alone; srun hands signals on to its tasks, which are no children of the shell's
session; a step takes its CPUs from SRUN_CPUS_PER_TASK; with --kill-on-bad-exit the first task that
fails ends the others; a requeued job is ended (SIGTERM, then SIGKILL) and starts at the script's
beginning, with the same number and SLURM_RESTART_COUNT, which is not set before.

The clock is a file: where `warn` appears in the directory SLURM_STANDIN, the job's time is nearly
up. `log.jsonl` there lists what has happened.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PLACE = Path(os.environ.get("SLURM_STANDIN", "."))
KILL_WAIT = 30  # seconds from SIGTERM to SIGKILL: slurm.conf's default
FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


def note(what: str, **more: Any) -> None:
    with (PLACE / "log.jsonl").open("a") as file:
        file.write(json.dumps({"what": what, **more}) + "\n")


def options_of(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options `--key=value` or `--key`, and the words that follow them."""
    options = {}
    while words and words[0].startswith("--"):
        key, _, value = words.pop(0)[2:].partition("=")
        options[key] = value
    return options, words


def hostnames(text: str) -> list[str]:
    """`a[1-3],b` -> a1, a2, a3, b."""
    names = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\])?", text):
        head, _, ranges = part.partition("[")
        for each in ranges.rstrip("]").split(",") if ranges else [""]:
            first, _, last = each.partition("-")
            numbers = range(int(first), int(last or first) + 1) if first else [""]
            names += [f"{head}{number}" for number in numbers]
    return names


def sbatch(words: list[str]) -> int:
    given, (script, *arguments) = options_of(words)
    text = Path(script).read_text()
    lines = re.findall(r"^#SBATCH (.*)$", text, re.M)
    options, _ = options_of(" ".join(lines).split())
    options |= given
    job = str(4000 + len(list(PLACE.glob("job*"))))
    directory = PLACE / f"job{job}"
    directory.mkdir()
    copy = directory / "slurm_script"
    shutil.copy(script, copy)
    copy.chmod(0o755)
    print(f"Submitted batch job {job}", flush=True)
    if os.fork() == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(nothing, descriptor)
        control(job, options, copy, arguments)
        os._exit(0)
    return 0


def control(job: str, options: dict[str, str], script: Path, arguments: list[str]) -> None:
    """What slurmctld does for a job."""
    nodes = int(options["nodes"])
    environment = {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": f"127.0.0.[1-{nodes}]" if nodes > 1 else "127.0.0.1",
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_SUBMIT_DIR": os.getcwd(),
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"],
    }
    warning = re.fullmatch(r"B:(\w+)@(\d+)", options["signal"])
    assert warning and int(warning[2]) < 60 * 60 * int(options["time"].split(":")[0])
    restarts = 0
    while True:
        mode = "ab" if options.get("open-mode") == "append" else "wb"
        more = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        with Path(f"slurm-{job}.out").open(mode) as out:
            batch = subprocess.Popen(
                [script, *arguments],
                env={**os.environ, **environment, **more},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        note("started", restarts=restarts)
        while batch.poll() is None and not (PLACE / "requeue").exists():
            if (PLACE / "warn").exists():
                (PLACE / "warn").unlink()
                note("warned")
                batch.send_signal(getattr(signal, f"SIG{warning[1]}"))
            time.sleep(0.05)
        if not (PLACE / "requeue").exists():
            note("ended", code=batch.returncode)
            return
        assert "requeue" in options, "a job without --requeue is not requeued"
        end(batch)
        (PLACE / "requeue").unlink()
        restarts += 1


def end(batch: subprocess.Popen[bytes]) -> None:
    """End a job that is requeued: its steps and its shell."""
    tasks = [int(path.name) for path in (PLACE / "tasks").glob("*")]
    note("requeued", tasks=len(tasks))
    for number in (signal.SIGCONT, signal.SIGTERM):
        for process in [*tasks, batch.pid]:
            signalled(process, number)
    until = time.monotonic() + KILL_WAIT
    while time.monotonic() < until and (batch.poll() is None or list((PLACE / "tasks").glob("*"))):
        time.sleep(0.05)
    for process in [*tasks, batch.pid]:
        signalled(process, signal.SIGKILL)
    batch.wait()


def signalled(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def srun(words: list[str]) -> int:
    options, command = options_of(words)
    tasks: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def forward(number: int, _: object) -> None:
        early.append(number)
        for task in tasks:
            if task.poll() is None:
                task.send_signal(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    (PLACE / "tasks").mkdir(exist_ok=True)
    nodes = int(os.environ["SLURM_NNODES"])
    for node in range(nodes):
        environment = {**os.environ, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}
        environment |= {"SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}
        environment.pop("SLURM_CPUS_PER_TASK", None)
        if "SRUN_CPUS_PER_TASK" in os.environ:
            environment["SLURM_CPUS_PER_TASK"] = os.environ["SRUN_CPUS_PER_TASK"]
        task = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=plain,
        )
        (PLACE / "tasks" / str(task.pid)).touch()
        tasks.append(task)
    for number in early:
        forward(number, None)
    failed_at = 0.0
    while any(task.poll() is None for task in tasks):
        if "kill-on-bad-exit" in options and any(task.returncode for task in tasks):
            late = failed_at and time.monotonic() > failed_at + KILL_WAIT
            if late or not failed_at:
                failed_at = failed_at or time.monotonic()
                for task in tasks:
                    if task.poll() is None:
                        task.send_signal(signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.05)
    for task in tasks:
        (PLACE / "tasks" / str(task.pid)).unlink(missing_ok=True)
    return max(code if code >= 0 else 128 - code for code in (task.returncode for task in tasks))


def plain() -> None:
    """A task has the signals' default dispositions, not srun's."""
    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)


def scontrol(words: list[str]) -> int:
    match words:
        case ["show", "hostnames", names]:
            print("\n".join(hostnames(names)))
        case ["requeue", job] if (PLACE / f"job{job}").is_dir():
            (PLACE / "requeue").touch()
        case _:
            print(f"scontrol: {words}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
