"""The programs and launchers in train/ and eval/, which start the command on a cluster."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PROGRAMS = {
    "train/pretrain.py": "pretrain nothing/there",
    "eval/score.py": "score nothing/there --suite core --out scores",
    "eval/analyze.py": "analyze nothing/there --out report",
}
TPU = {"train/tpu_pod.sh": "train/pretrain.py", "eval/tpu_pod.sh": "eval/score.py"}
SLURM = {
    "train/slurm.sbatch": "srun .venv/bin/python train/pretrain.py {} --distributed",
    "eval/slurm_array.sbatch": ".venv/bin/python eval/score.py {} --part auto",
}
AWKWARD = ["amber_7b", "--run", "a folder/$HOME", "it's"]


@pytest.mark.parametrize(("program", "command"), PROGRAMS.items(), ids=PROGRAMS)
def test_a_program_is_the_command_from_any_folder(program, command, tmp_path):
    run = lambda *arguments: subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    theirs = run(sys.executable, "-m", "fineline_jax.cli", *command.split())
    ours = run(sys.executable, str(CHECKOUT / program), *command.split()[1:])
    assert ours.returncode == theirs.returncode == 2
    assert ours.stderr == theirs.stderr and re.match("fineline: .*nothing/there", ours.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("launcher", "program"), TPU.items(), ids=TPU)
def test_a_pod_gets_the_arguments_as_they_were_given(launcher, program, tmp_path):
    done = launched(tmp_path, "gcloud", launcher, "pod", "us-central2-b", *AWKWARD)
    *ssh, remote = done
    assert ssh == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone", "us-central2-b", "--worker", "all", "--command"]
    assert shlex.split(remote) == ["cd", "fineline_jax", "&&", ".venv/bin/python", program, *AWKWARD, "--distributed"]


@pytest.mark.parametrize("launcher", TPU)
def test_a_pod_launcher_without_arguments_says_how_it_is_called(launcher):
    done = subprocess.run(["bash", str(CHECKOUT / launcher)], capture_output=True, text=True)
    assert done.returncode == 2 and f"{launcher} TPU_NAME ZONE" in done.stderr


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
