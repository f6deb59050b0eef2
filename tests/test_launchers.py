"""The programs and launchers in train/ and eval/, which start the command on a cluster."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fineline_jax import cli
from fineline_jax.commands.score import score
from fineline_jax.scoring.job_shard import JobShard, job_shard

CHECKOUT = Path(__file__).resolve().parent.parent
PROGRAMS = {
    "train/pretrain.py": "pretrain nothing/there",
    "eval/score.py": "score a --suite core --out scores --watch-timeout -1",
    "eval/analyze.py": "analyze a --out report --tokens-per-step -1",
}  # refused before anything heavy is imported
TPU = {"train/tpu_pod.sh": "train/pretrain.py", "eval/tpu_pod.sh": "eval/score.py"}
SLURM = {
    "train/slurm.sbatch": "srun .venv/bin/python train/pretrain.py {} --distributed",
    "eval/slurm_array.sbatch": ".venv/bin/python eval/score.py {} --part auto",
}
AWKWARD = ["amber_7b", "--run", "a folder/$HOME", "it's"]


@pytest.mark.parametrize(("program", "command"), PROGRAMS.items(), ids=PROGRAMS)
def test_a_program_is_the_command_from_any_folder(program, command, tmp_path):
    run = lambda *arguments: subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    theirs = run(sys.executable, "-m", "fineline_jax", *command.split())
    ours = run(sys.executable, str(CHECKOUT / program), *command.split()[1:])
    assert ours.returncode == theirs.returncode == 2
    assert ours.stderr == theirs.stderr and re.match(r"fineline: .*(nothing/there|-1\.0 must)", ours.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("program", "command"), PROGRAMS.items(), ids=PROGRAMS)
def test_a_program_gives_its_arguments_to_the_command_and_returns_its_status(program, command, monkeypatch):
    given = []
    monkeypatch.setattr(cli, "main", lambda arguments: given.append(arguments) or 7)
    monkeypatch.setattr(sys, "argv", [program, *AWKWARD])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(CHECKOUT / program), run_name="__main__")
    assert given == [[command.split()[0], *AWKWARD]] and ended.value.code == 7


@pytest.mark.parametrize(("launcher", "program"), TPU.items(), ids=TPU)
def test_a_pod_gets_the_arguments_as_they_were_given(launcher, program, tmp_path):
    done = launched(tmp_path, "gcloud", launcher, "pod", "us-central2-b", *AWKWARD)
    *ssh, remote = done
    assert ssh == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone", "us-central2-b", "--worker", "all", "--command"]
    assert shlex.split(remote) == ["cd", "fineline_jax", "&&", ".venv/bin/python", program, *AWKWARD, "--distributed"]


@pytest.mark.parametrize("launcher", TPU)
def test_a_pod_launcher_without_all_arguments_says_how_it_is_called(launcher, tmp_path):
    for given in ([], ["pod"], ["pod", "us-central2-b"]):
        done = subprocess.run(["bash", str(CHECKOUT / launcher), *given], capture_output=True, text=True)
        comment = [line[2:] for line in (CHECKOUT / launcher).read_text().split("set -euo")[0].splitlines()[1:]]
        said = done.stderr.splitlines()
        assert done.returncode == 2 and said == comment[: len(said)]
        assert said[0] == comment[0] and f"  {launcher} TPU_NAME ZONE " in done.stderr
    assert launched(tmp_path, "gcloud", launcher, "pod", "us-central2-b", "amber_7b")  # three are enough


@pytest.mark.parametrize(("launcher", "program"), [*((name, "gcloud") for name in TPU), ("train/slurm.sbatch", "srun")])
def test_a_launcher_ends_with_the_status_of_what_it_started(launcher, program, tmp_path):
    stand_in = tmp_path / program
    stand_in.write_text("#!/usr/bin/env bash\nexit 7\n")
    stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", str(CHECKOUT / launcher), "a", "b", "c"], env=environment).returncode == 7


@pytest.mark.parametrize("script", [*TPU, *SLURM, ".ci/run"])
def test_a_script_is_correct_shell_and_can_be_started(script):
    path = CHECKOUT / script
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert os.access(path, os.X_OK) == (path.suffix != ".sbatch")  # sbatch reads those


def directives(launcher: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (CHECKOUT / launcher).read_text(), flags=re.M))


def test_a_training_job_is_told_two_minutes_before_its_end_and_requeued():
    assert directives("train/slurm.sbatch") == {
        "signal": "TERM@120",
        "requeue": "",
    }  # TERM to the steps, not the script
    assert "SIGTERM comes two minutes before" in (CHECKOUT / "train/slurm.sbatch").read_text()


def test_a_training_job_has_a_process_per_gpu_as_jax_tells_processes_apart(monkeypatch):
    """The first process of the third node of the four that the launcher's example asks for."""
    text = (CHECKOUT / "train/slurm.sbatch").read_text()
    example = re.search(r"sbatch --nodes (\d) --ntasks-per-node (\d) --gpus-per-node (\d) ", text)
    nodes, tasks, gpus = map(int, example.groups())
    assert tasks == gpus
    clusters = pytest.importorskip("jax._src.clusters")
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[01-04]", "SLURM_NTASKS": str(nodes * tasks)}
    for name, value in (job | {"SLURM_PROCID": str(2 * tasks), "SLURM_LOCALID": "0"}).items():
        monkeypatch.setenv(name, value)
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, None)
    assert found[1:] == (nodes * tasks, 2 * tasks, [0])  # one device, so a process for each


def test_the_tasks_of_a_slurm_array_share_the_checkpoints_among_them():
    text = (CHECKOUT / "eval/slurm_array.sbatch").read_text()
    first, last = map(int, re.search(r"--array=(\d+)-(\d+) ", text).groups())
    assert directives("eval/slurm_array.sbatch") == {"ntasks": "1", "requeue": ""}
    count = last - first + 1
    parts = []
    for task in range(first, last + 1):
        variables = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MIN": first, "SLURM_ARRAY_TASK_COUNT": count}
        # The variables of the single task are there too, and are not asked.
        variables |= {"SLURM_ARRAY_TASK_STEP": 1, "SLURM_PROCID": 0, "SLURM_NTASKS": 1}
        parts.append(job_shard("auto", {name: str(value) for name, value in variables.items()}))
    assert parts == [JobShard(index, 16) for index in range(16)]


def test_the_pods_of_the_kubernetes_job_share_the_checkpoints_among_them():
    job = yaml.safe_load((CHECKOUT / "eval/kubernetes_job.yaml").read_text())
    spec = job["spec"]
    [container] = spec["template"]["spec"]["containers"]
    command = container["command"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert spec["completions"] == spec["parallelism"] == int(command[-1].removeprefix("auto/"))
    parts = [job_shard(command[-1], {"JOB_COMPLETION_INDEX": str(index)}) for index in range(spec["completions"])]
    assert parts == [JobShard(index, 8) for index in range(8)]
    # A pod that fails is made anew by its index, which Kubernetes allows only where pods are not restarted in place.
    assert spec["template"]["spec"]["restartPolicy"] == "Never" and spec["backoffLimitPerIndex"] > 0
    [volume], [mount] = spec["template"]["spec"]["volumes"], container["volumeMounts"]
    assert volume["name"] == mount["name"]
    for option in ("--pack", "--out"):
        assert command[command.index(option) + 1].startswith(mount["mountPath"] + "/"), option
    call = cli.command_line().cli(prog=command[0], args=command[1:])
    assert command[0] == "fineline" and call.func is score and call.keywords["how"].part == "auto/8"


@pytest.mark.parametrize(("launcher", "wanted"), SLURM.items(), ids=SLURM)
def test_a_slurm_job_gets_the_arguments_as_they_were_given(launcher, wanted, tmp_path):
    first, *rest = wanted.split()
    expected = [word for given in rest for word in (AWKWARD if given == "{}" else [given])]
    assert launched(tmp_path, first, launcher, *AWKWARD) == expected


def launched(folder: Path, program: str, launcher: str, *arguments: str) -> list[str]:
    """The arguments with which `program`, put in its place, is called by a launcher."""
    stand_in = folder / program
    stand_in.parent.mkdir(parents=True, exist_ok=True)
    stand_in.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n")
    stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", str(CHECKOUT / launcher), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]
