"""The files in deploy/: they parse, their flags are ours, and the Slurm script does what it says.

The dry run puts an `srun` and a `scontrol` on the PATH that do on this machine what Slurm does on a cluster: `srun`
runs its command and passes signals on to it, `scontrol` knows the machines' names and notes what is requeued.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import PATIENCE
from tinylm.commandline.settings import parse_settings
from tinylm.server.settings import ServeSettings
from tinylm.trainer.train_pretrain import PretrainSettings

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE, UNIT = ROOT / "deploy" / "Dockerfile", ROOT / "deploy" / "tinylm.service"
SLURM = ROOT / "deploy" / "slurm.sbatch"
RECIPE = "tinylm/trainer/train_pretrain.py"
OUR_ENVIRONMENT = {"OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}


def kubernetes() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8"))


def skypilot() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "skypilot.yaml").read_text(encoding="utf-8"))


def torchrun_words(script: str) -> list[str]:
    """The words of the one torchrun command in a shell script."""
    lines = re.sub(r"^\s*#.*$", "", script, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if RECIPE in line]
    words = shlex.split(line.rstrip(" &"))
    return words[next(i for i, word in enumerate(words) if Path(word).name == "torchrun") :]


def commands() -> dict[str, list[str]]:
    """torchrun's words in each file."""
    container = kubernetes()["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    return {
        "slurm": torchrun_words(SLURM.read_text(encoding="utf-8")),
        "kubernetes": [*container["command"], *container["args"]],
        "skypilot": torchrun_words(skypilot()["run"]),
    }


# --- read, not run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slurm", "kubernetes", "skypilot"])
def test_the_flags_are_ours_and_torchruns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A renamed flag would otherwise be found on the cluster, after an hour in the queue."""
    from torch.distributed.run import parse_args

    words = commands()[name]
    place = words.index(RECIPE)
    ours = [word for word in words[place + 1 :] if word != "$@"]
    settings = parse_settings(PretrainSettings, ours, "tinylm pretrain", "")
    assert settings.resume, "a job that comes back must go on"
    assert settings.timeout < PretrainSettings.timeout, "a lost machine is to be noticed soon"
    values = {"SLURM_JOB_NUM_NODES": "2", "NPROC_PER_NODE:-gpu": "2", "SKYPILOT_NUM_NODES": "2"}
    values |= {"SKYPILOT_NUM_GPUS_PER_NODE": "2", "SLURM_JOB_ID": "7", "SKYPILOT_TASK_ID": "7"}
    values |= {"head_node": "host", "port": "29500", "is_host": "true"}

    def filled(word: str) -> str:
        return re.sub(r"\$\{?([A-Za-z_]+(?::-gpu)?)\}?", lambda found: values[found[1]], word)

    arguments = parse_args([*map(filled, words[1:place]), str(ROOT / RECIPE)])
    if name != "kubernetes":  # there the operator says all this
        assert (arguments.nnodes, arguments.max_restarts, arguments.rdzv_backend) == ("1:2", 3, "c10d")
        assert arguments.rdzv_id == "7" and arguments.rdzv_endpoint == "host:29500"


def test_the_pytorchjob_is_elastic_and_shares_its_disk() -> None:
    job = kubernetes()
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    elastic, worker = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]
    assert elastic["rdzvBackend"] == "c10d"
    assert 1 == elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    assert set(spec["pytorchReplicaSpecs"]) == {"Worker"}, "an elastic job has no master"
    assert worker["restartPolicy"] == "OnFailure"
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    shared = next(volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume)
    (mount,) = [each["mountPath"] for each in container["volumeMounts"] if each["name"] == shared["name"]]
    assert f"--output_dir={mount}/out/pretrain" in container["args"]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    assert set(given) == OUR_ENVIRONMENT and all(isinstance(value, str) for value in given.values())
    assert int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]


def test_the_skypilot_task_shares_its_disk() -> None:
    task = skypilot()
    known = {"name", "num_nodes", "resources", "workdir", "volumes", "envs", "setup", "run"}
    assert set(task) == known
    assert task["num_nodes"] > 1 and set(task["envs"]) == OUR_ENVIRONMENT
    (mount,) = task["volumes"]
    assert f"--output_dir {mount}/" in task["run"]


def test_no_file_names_somebodys_cluster() -> None:
    for path in (ROOT / "deploy").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/home/|/Users/|/root\b|~/", text), path.name
        assert "CHANGE" in text, f"{path.name}: what is to be filled in must be marked"


def checker_of(name: str) -> str:
    """Where a checker from requirements-dev.txt is."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed; requirements-dev.txt has it")
    return found


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([checker_of("hadolint"), DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_container_serves_as_nobody() -> None:
    """Its words are flags of ours, what it copies exists, and its port is the one that is asked for health."""
    lines = re.sub(r"^#.*$", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    steps = {line.split()[0]: line.partition(" ")[2] for line in lines if line.strip()}
    command, *words = json.loads(steps["ENTRYPOINT"]) + json.loads(steps["CMD"])
    assert (command, words.pop(0)) == ("tinylm", "serve")
    settings = parse_settings(ServeSettings, words, "tinylm serve", "")
    assert settings.model_path == "/model" and f"127.0.0.1:{settings.port}/health" in steps["HEALTHCHECK"]
    assert int(steps["EXPOSE"]) == settings.port and not settings.is_local
    assert int(steps["USER"].partition(":")[0]) > 0
    for line in lines:
        for name in line.split()[1:-1] if line.startswith("COPY") else ():
            assert (ROOT / name).exists(), name
    assert "CMD" in steps and "TINYLM_API_KEY" in DOCKERFILE.read_text()


def test_the_unit_drains_before_it_kills() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    command, name, *words = shlex.split(service["ExecStart"])
    assert Path(command).name == "tinylm" and name == "serve"
    settings = parse_settings(ServeSettings, words, "tinylm serve", "")
    assert settings.is_local and int(service["TimeoutStopSec"]) > settings.drain_timeout + 5
    assert service["DynamicUser"] == service["NoNewPrivileges"] == "yes" and "install" in UNIT.read_text()
    if checker := shutil.which("systemd-analyze"):
        done = subprocess.run([checker, "verify", UNIT], capture_output=True, text=True)
        complaints = [line for line in done.stderr.splitlines() if "is not executable" not in line]
        assert complaints == []


@pytest.mark.parametrize("name", ["slurm.sbatch", "skypilot.yaml"])
def test_shellcheck_finds_nothing(name: str, tmp_path: Path) -> None:
    checker = checker_of("shellcheck")
    script = SLURM
    if name == "skypilot.yaml":
        script = tmp_path / "run.sh"
        script.write_text("#!/bin/bash\n" + skypilot()["setup"] + skypilot()["run"])
    done = subprocess.run([checker, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- the Slurm script, run -------------------------------------------------------------------------------------------

SRUN = """\
#!/bin/bash
# As srun: run the command after the options, pass signals on to it, end with its status.
while [ "${1#--}" != "$1" ]; do shift; done
"$@" &
step=$!
trap 'kill -TERM $step' TERM
while kill -0 $step 2>/dev/null; do wait $step; status=$?; done
exit "$status"
"""
SCONTROL = """\
#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo localhost; else echo "$*" >> "$REQUEUED"; fi
"""

SLOW_RECIPE = """\
import sys
sys.path[:0] = {paths}
from recorded_recipe import main
sys.exit(main([{folder!r}, "pretrain", *sys.argv[1:]]))
"""
NUM_STEPS = 80


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script on a Slurm made of paper."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    torchrun = f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", torchrun)):
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(1000 + os.getpid() % 30000), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "x[1]"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PET_"))}
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    return {
        **inherited, **slurm, "PATH": path, "NPROC_PER_NODE": "2", "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1", "REQUEUED": str(tmp_path / "requeued"),
    }  # fmt: skip


@pytest.fixture
def job(tmp_path: Path) -> Iterator[list[str]]:
    """The script as Slurm would start it, from a folder that has the recipe but no .venv; with a minute model.

    The recipe is one whose steps take SECONDS_PER_STEP: the signal must come before the last of them, on the busiest
    machine.
    """
    recipe = tmp_path / "checkout" / RECIPE
    recipe.parent.mkdir(parents=True)
    recipe.write_text(SLOW_RECIPE.format(paths=[str(ROOT), str(ROOT / "tests" / "distributed")], folder=str(tmp_path)))
    shutil.copy(SLURM, tmp_path / "checkout")
    words = "--preset tiny --hidden_size 32 --num_hidden_layers 1 --num_attention_heads 4 --num_key_value_heads 2 "
    words += "--device cpu --dtype float32 --max_seq_len 64 --batch_size 1 --log_interval 1 --eval_interval 0 "
    words += f"--tinyworld_documents 64 --max_steps {NUM_STEPS} --save_interval 1000"
    yield ["bash", "slurm.sbatch", *words.split(), "--output_dir", str(tmp_path / "out")]


def steps_done(folder: Path) -> list[int]:
    with contextlib.suppress(OSError, json.JSONDecodeError):
        lines = [line for path in folder.glob("pretrain_*_metrics.jsonl") for line in path.read_text().splitlines()]
        return [json.loads(line)["step"] for line in lines]
    return []


def run_and_signal(job: list[str], cluster: dict[str, str], folder: Path, number: int) -> tuple[int, str]:
    """Start the job, send the batch script a signal in mid-run; returns the script's status and what it said."""
    with (folder / "said").open("w+") as said:
        script = subprocess.Popen(job, cwd=folder / "checkout", env={**cluster, "SECONDS_PER_STEP": "2"}, stdout=said,
                                  stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            deadline = time.monotonic() + PATIENCE
            while f"1/{NUM_STEPS}" not in (folder / "said").read_text():
                assert time.monotonic() < deadline and script.poll() is None, (folder / "said").read_text()
                time.sleep(0.1)
            os.kill(script.pid, number)
            status = script.wait(timeout=PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError):  # what a script that failed has left behind
                os.killpg(script.pid, signal.SIGKILL)
    return status, (folder / "said").read_text()


@pytest.mark.slow
def test_preemption_saves_and_requeues_and_the_next_start_goes_on(cluster, job, tmp_path) -> None:
    """torchrun ends at USR1 and leaves its processes behind, so the script passes TERM on instead."""
    status, said = run_and_signal(job, cluster, tmp_path, signal.SIGUSR1)
    found = re.search(r"stopped after step ([\d,]+), which is saved", said)
    assert found and status not in (0, 137), said
    assert (tmp_path / "requeued").read_text().split() == ["requeue", cluster["SLURM_JOB_ID"]]
    step = int(found[1].replace(",", ""))
    assert step < NUM_STEPS
    fewer = {**cluster, "NPROC_PER_NODE": "1"}  # the job comes back with one GPU
    done = subprocess.run(job, cwd=tmp_path / "checkout", env=fewer, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert f"from step {step:,}" in done.stdout
    assert steps_done(tmp_path / "out")[-1] == NUM_STEPS
    assert (tmp_path / "requeued").read_text().count("requeue") == 1, "a finished run stays out of the queue"


@pytest.mark.long
def test_scancel_saves_and_does_not_come_back(cluster, job, tmp_path) -> None:
    status, said = run_and_signal(job, cluster, tmp_path, signal.SIGTERM)
    assert "which is saved" in said and status not in (0, 137), said
    assert not (tmp_path / "requeued").exists()
