"""Make every slip of the tables in a copy of the tree, one at a time, and see whether its tests fail.

    python tests/mutants [--only REGEX] [--jobs 2] [--timeout 300] [--no-baseline]

First the tests run on the code as it is: a test that fails there says nothing. Exit status 0: nothing failed there,
every slip could be made, and every one was noticed.
"""

import argparse
import concurrent.futures
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mutants import FOLDER, ROOT, Mutant, NotApplicable, read

from fineline_jax.text_table import text_table

KILLED, SURVIVED, NOT_APPLICABLE, BROKEN = "killed", "survived", "not applicable", "broken"
ASSERTED, PASSED = 1, 0  # exit statuses of pytest; others mean that no test could be run


class Worker:
    """A copy of the tree, and a process that has imported the libraries and forks for each run of pytest."""

    def __init__(self, root: Path, folder: Path, compiled: Path):
        self.tree = folder / "tree"
        self.log = folder / "output.txt"
        copy_tree(root, self.tree)
        environment = os.environ | {
            "PYTHONPATH": str(self.tree),
            "PYTHONDONTWRITEBYTECODE": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "TMPDIR": str(folder),
        }
        command = [sys.executable, str(FOLDER / "forked.py")]
        self.process = subprocess.Popen(
            command, cwd=self.tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def pytest(self, tests: list[str], timeout: float) -> int | None:
        """pytest's exit status; None: it ran out of time. Its output is in `self.log`."""
        assert self.process.stdin and self.process.stdout
        arguments = ["-x", "--assert=plain", "-m", "not slow", *(f"tests/{test}" for test in tests)]
        self.process.stdin.write(json.dumps([arguments, timeout, str(self.log)]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def try_out(self, mutant: Mutant, timeout: float) -> tuple[str, str]:
        """(verdict, what there is to say)."""
        try:
            changed = mutant.applied(self.tree)
        except NotApplicable as error:
            return NOT_APPLICABLE, str(error)
        path = self.tree / mutant.file
        original = path.read_bytes()
        path.write_text(changed, encoding="utf-8")
        try:
            status = self.pytest(list(mutant.tests), timeout)
        finally:
            path.write_bytes(original)
        if status is None:
            return KILLED, f"after {timeout:.0f} s it had not ended"
        verdict = {ASSERTED: KILLED, PASSED: SURVIVED}.get(status, BROKEN)
        return verdict, "" if verdict == KILLED else self.output()

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]

    def close(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def copy_tree(root: Path, target: Path) -> None:
    """What git tracks or would track; the tests of packages find configs/ where an installation has it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    (target / "fineline_jax" / "configs").symlink_to(target / "configs")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="slips whose name or file this regular expression finds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for the tests of one slip")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests on the code as it is")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree to copy")
    parser.add_argument("--tables", type=Path, default=FOLDER, help="the folder of the tables")
    options = parser.parse_args()
    mutants = read(options.only, options.tables)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the workers are ended, the copies removed
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        compiled = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", folder / "compiled"))
        workers: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        everyone = []
        for number in range(options.jobs):
            (folder / str(number)).mkdir()
            everyone.append(Worker(options.root, folder / str(number), compiled))
            workers.put(everyone[-1])
        try:
            bad_tests = {} if options.no_baseline else baseline(mutants, workers, options)
            verdicts = try_all(mutants, workers, options)
        finally:
            for worker in everyone:
                worker.close()
    print(table(mutants, verdicts))
    print(f"{len(mutants)} slips in {(time.monotonic() - started) / 60:.1f} min, {options.jobs} at a time")
    for file in bad_tests:
        print(f"tests/{file} fails on the code as it is: what it says of a slip means nothing")
    return 0 if not bad_tests and all(v == KILLED for v in verdicts.values()) else 1


def on_workers(jobs: list, work, workers: queue.SimpleQueue, count: int):
    """(job, what work(worker, job) returned), as they end."""

    def run(job):
        worker = workers.get()
        try:
            return job, work(worker, job)
        finally:
            workers.put(worker)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        for done in concurrent.futures.as_completed([pool.submit(run, job) for job in jobs]):
            yield done.result()


def baseline(mutants: list[Mutant], workers: queue.SimpleQueue, options) -> dict[str, str]:
    """The files of tests that fail, or cannot be run, on the code as it is, and what pytest said."""
    by_file = defaultdict(set)
    for mutant in mutants:
        for test in mutant.tests:
            by_file[test.partition("::")[0]].add(test)

    def work(worker: Worker, file: str) -> tuple[float, str]:
        began = time.monotonic()
        status = worker.pytest(sorted(by_file[file]), 6 * options.timeout)
        return time.monotonic() - began, "" if status == PASSED else worker.output()

    bad = {}
    for file, (seconds, output) in on_workers(sorted(by_file), work, workers, options.jobs):
        print(f"as it is: {file} {'FAILS' if output else 'passes'} ({seconds:.0f} s)\n{output}", end="", flush=True)
        if output:
            bad[file] = output
    return bad


def try_all(mutants: list[Mutant], workers: queue.SimpleQueue, options) -> dict[str, str]:
    verdicts = {}

    def work(worker: Worker, mutant: Mutant) -> tuple[float, tuple[str, str]]:
        began = time.monotonic()
        tried = worker.try_out(mutant, options.timeout)
        return time.monotonic() - began, tried

    for mutant, (seconds, (verdict, said)) in on_workers(mutants, work, workers, options.jobs):
        verdicts[mutant.name] = verdict
        print(f"{verdict}: {mutant.name} ({seconds:.0f} s)", flush=True)
        if verdict != KILLED:
            print(f"  {mutant.file}: {mutant.why}\n  tests: {' '.join(mutant.tests)}\n  {said}", flush=True)
    return verdicts


def table(mutants: list[Mutant], verdicts: dict[str, str]) -> str:
    kinds = (KILLED, SURVIVED, NOT_APPLICABLE, BROKEN)
    rooms = defaultdict(Counter)
    for mutant in mutants:
        rooms[mutant.room][verdicts[mutant.name]] += 1
    rooms = {**dict(sorted(rooms.items())), "all": sum(rooms.values(), Counter())}
    head = ["room", "slips", *kinds]
    rows = [[room, str(counts.total()), *(str(counts[kind]) for kind in kinds)] for room, counts in rooms.items()]
    return text_table([head, *rows])


if __name__ == "__main__":
    sys.exit(main())
