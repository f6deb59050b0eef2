"""The checkpoints of a run: asynchronous Orbax saves, kept steps for ever, one rolling latest between them.

    FOLDER/<step>/params, opt_state, …   one Orbax checkpointable per key of the state
    FOLDER/<step>/complete.json          written last: metadata and digests (digest_record.py)
    FOLDER/<step>.saving                 empty; there until the record is: distinguishes a killed save from damage
    FOLDER/<step>.damaged                set aside by `latest_intact`; never read again, never deleted

All processes of a run call every function; process 0 alone lists, renames and deletes folders.
"""

import concurrent.futures
import contextlib
import functools
import logging
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from fineline_jax.checkpoints.runs.digest_record import SAVING, check_path, damage, read_record, write_record
from fineline_jax.checkpoints.runs.retention import remove
from fineline_jax.errors import UserError
from fineline_jax.multihost import broadcast_from_process_0

log = logging.getLogger(__name__)

_one_save = threading.Lock()
"""Held from the start of a save to its commit: Orbax mixes up saves that several threads have under way."""

State = Mapping[str, Any]
"""Pytrees of jax.Array by name: `params`, `opt_state`, … Each is saved as an item that can be read alone."""


class CheckpointStore:
    """Saves and restores the states of one run.

    folder: where the step folders are; made if absent. What a killed run left half-written there is removed.
    kept_steps: steps whose checkpoint stays for ever (`Clock.kept_steps`).
    is_rolling: whether the rolling checkpoint is due at a step (`Clock.is_rolling`).
    weights_only: kept steps of which only the item `params` is saved, in that dtype; a rolling checkpoint that is due
    there comes one step later.
    record: what the record of the checkpoint of a step says besides, "tokens" and "recipe" among it.

    Use it as a context manager, or call `wait` at the end.
    """

    def __init__(
        self,
        folder: Path,
        kept_steps: Collection[int],
        *,
        is_rolling: Callable[[int], bool] = lambda _: False,
        weights_only: tuple[Collection[int], str] = ((), "float32"),
        record: Callable[[int], dict[str, Any]] = lambda _: {"tokens": None, "recipe": ""},
    ):
        check_path(folder)
        self.folder = folder.resolve()
        self.kept_steps = frozenset(kept_steps)
        self.is_rolling = is_rolling
        self.weights_only, self.dtype = frozenset(weights_only[0]), weights_only[1]
        self.record = record
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[int] | None = None
        if jax.process_index() == 0:
            self._clean()
        self._steps = _of_process_0(lambda: steps(self.folder))

    def is_due(self, step: int) -> bool:
        """Whether the state of `step` is to be saved, for ever or as the rolling latest."""
        late = step - 1 in self.weights_only and self.is_rolling(step - 1)
        return step in self.kept_steps or self.is_rolling(step) or late

    def maybe_save(self, step: int, state: State, *, force: bool = False) -> bool:
        """Start to save `state`, reached after `step` optimizer steps, if due (or `force`) and not there yet.

        Returns whether it did. Blocks while the save before it is unfinished and while the state is copied to
        the host; the arrays may be donated as soon as it returns. With `force` the whole state is saved, also in place
        of weights alone. Raises UserError if the last save failed.
        """
        if self._pending is not None and self._pending.done():
            self.wait()
        if not (force or self.is_due(step)):
            return False
        self.wait()
        if step in self._steps and not (force and _of_process_0(lambda: self._is_weights_only(step))):
            return False
        metadata = {"step": step, "kept": step in self.kept_steps, **self.record(step)}
        if step in self.weights_only and not force:
            metadata["weights"] = self.dtype
            state = {"params": _cast(state["params"], self.dtype)}
        try:
            path = self.folder / str(step)
            if jax.process_index() == 0:
                if path.exists() and step in self._steps:
                    remove(path)
                elif path.exists():
                    self._set_aside(step, damage(path) or "not known to this run")
                self._marker(step).touch()
            for_orbax = {name: metadata[name] for name in ("step", "tokens", "kept", "recipe")}
            with contextlib.ExitStack() as held, _options():
                held.enter_context(_one_save)
                response = ocp.save_checkpointables_async(str(path), dict(state), custom_metadata=for_orbax)
                commit = self._worker.submit(response.result)
                release = held.pop_all().close
                commit.add_done_callback(lambda _: release())
        except OSError as error:
            raise self._failed(step, error) from error
        written = {item: _shapes_and_dtypes(tree) for item, tree in state.items()}
        self._pending = self._worker.submit(self._finish, step, commit, metadata, written)
        return True

    def wait(self) -> None:
        """Block until the running save is done. Raises UserError if it failed; the series is as before."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._steps = sorted({*self._steps, pending.result()})

    def latest_intact(self) -> int | None:
        """The newest step with a state whose files are all as they were written; None where there is none.

        Reads every byte of that checkpoint, and of newer ones with weights alone. A damaged one is named in a warning
        and renamed to `<step>.damaged`, so that its step can be saved again. Raises UserError if there were checkpoints
        and none is left.
        """
        self.wait()
        if jax.process_index() == 0:
            for step in sorted((int(path.name) for path in self.folder.iterdir() if path.name.isdigit()), reverse=True):
                problem = damage(self.folder / str(step))
                if problem is not None:
                    self._set_aside(step, problem)
                elif not self._is_weights_only(step):
                    break
        self._steps = _of_process_0(lambda: steps(self.folder))
        if not self._steps and _of_process_0(lambda: any(self.folder.glob("*.damaged*"))):
            raise UserError(
                f"{self.folder}: no intact checkpoint is left; restore one from a backup, or remove the"
                " *.damaged folders to train from the start"
            )
        return _of_process_0(lambda: max((s for s in self._steps if not self._is_weights_only(s)), default=None))

    def restore(self, abstract_state: State, step: int | None = None) -> tuple[int, State]:
        """The state of `step` (default: `latest_intact()`) as arrays with the shapes, dtypes and shardings of
        `abstract_state`, a tree of jax.ShapeDtypeStruct that may lie on another mesh than the one that saved.

        Only the items named in `abstract_state` are read. Raises UserError without such a checkpoint, if it
        is damaged, or if its arrays do not fit `abstract_state`.
        """
        if step is None:
            step = self.latest_intact()
            if step is None:
                raise UserError(f"{self.folder}: holds no checkpoint; train first")
        else:
            self.wait()
            check_intact(self.folder / str(step))
        return step, load_items(self.folder / str(step), abstract_state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except UserError as failed:
            if error is None:
                raise
            log.error("%s", failed)  # the first error is the one to report
        finally:
            self._worker.shutdown()

    def _finish(self, step: int, commit: Any, metadata: dict[str, Any], written: dict[str, Any]) -> int:
        """Runs beside training behind `commit`, a future: read back, record, and only then drop the rolling checkpoint
        before this one.

        written: shape and dtype of every array, by item.
        """
        try:
            commit.result()
            if jax.process_index() == 0:
                for item, stored in stored_arrays(self.folder / str(step), written).items():
                    _check_written(_shapes_and_dtypes(stored), written[item], item)
                write_record(self.folder / str(step), metadata)
        except Exception as error:
            raise self._failed(step, error) from error
        if jax.process_index() == 0:
            self._marker(step).unlink(missing_ok=True)
            if "weights" not in metadata:
                self._drop_superseded(step)
        return step

    def _is_weights_only(self, step: int) -> bool:
        return "weights" in (read_record(self.folder / str(step)) or {})

    def _drop_superseded(self, newest: int) -> None:
        for step in steps(self.folder):
            record = read_record(self.folder / str(step))
            if step < newest and step not in self.kept_steps and record is not None and not record["kept"]:
                try:
                    remove(self.folder / str(step))
                except OSError as error:
                    log.warning("%s: not removed (%s); remove it by hand", self.folder / str(step), error.strerror)

    def _failed(self, step: int, error: Exception) -> UserError:
        """The error to show; frees what the failed save has written."""
        if jax.process_index() == 0:
            for path in [self.folder / str(step), *self.folder.glob(f"{step}.orbax-checkpoint-tmp*")]:
                shutil.rmtree(path, ignore_errors=True)
            self._marker(step).unlink(missing_ok=True)
        text = str(error)
        if "No space left" in text or "RESOURCE_EXHAUSTED" in text or "quota" in text.lower():
            text = "no space left on the disk"
        reason = text.strip().splitlines()[0][:300] if text.strip() else type(error).__name__
        return UserError(
            f"{self.folder / str(step)}: the checkpoint could not be written ({reason}); solve that and start"
            " again: the run resumes from the checkpoint before it"
        )

    def _clean(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.orbax-checkpoint-tmp*", "*.deleting"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)
        for marker in self.folder.glob(f"*{SAVING}"):
            path = marker.with_suffix("")
            if path.exists() and read_record(path) is None:
                shutil.rmtree(path)
            marker.unlink()

    def _marker(self, step: int) -> Path:
        return self.folder / f"{step}{SAVING}"

    def _set_aside(self, step: int, problem: str) -> None:
        target, count = self.folder / f"{step}.damaged", 1
        while target.exists():
            count += 1
            target = self.folder / f"{step}.damaged-{count}"
        (self.folder / str(step)).rename(target)
        log.warning(
            "checkpoint %s is damaged (%s); renamed to %s and not used",
            self.folder / str(step),
            problem,
            target.name,
        )


@functools.partial(jax.jit, static_argnums=1)
def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    complete = [path for path in folder.iterdir() if path.name.isdigit() and read_record(path) is not None]
    return sorted(int(path.name) for path in complete)


def check_intact(path: Path, item: str = "") -> None:
    """Raise UserError if the checkpoint folder `path` (or its `item`) is not as it was written."""
    problem = _of_process_0(lambda: damage(path, item))
    if problem is not None:
        raise UserError(f"{path}: the checkpoint is damaged ({problem}); use another one or restore it from a backup")


def load_items(path: Path, abstract_items: State) -> dict[str, Any]:
    """The items of the checkpoint folder `path` that `abstract_items` names, with its dtypes and shardings.

    The others are not read. Raises UserError naming the first array that is missing, unexpected or of another
    shape.
    """
    stored = stored_arrays(path, abstract_items)
    for item, target in abstract_items.items():
        here, wanted = _named(stored[item]), _named(target)
        for name in sorted(here.keys() | wanted.keys()):
            shape, other = (list(side[name].shape) if name in side else "absent" for side in (here, wanted))
            if shape != other:
                raise UserError(
                    f"{path}: {item}.{name} is {shape} here, {other} in the recipe; use the recipe that wrote it"
                )
    with _options():
        return ocp.load_checkpointables(str(path.absolute()), dict(abstract_items))


def stored_arrays(path: Path, items: Collection[str]) -> dict[str, Any]:
    """The trees of items of the checkpoint folder `path`: shape and dtype of each array, as they are stored.

    Raises UserError if the folder lacks one of them, or Orbax cannot read it.
    """
    try:
        with _options():
            stored = ocp.checkpointables_metadata(str(path.absolute())).metadata
    except Exception as error:  # Orbax documents none
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{path}: is no checkpoint that Orbax reads ({reason}); use another one") from error
    for item in items:
        if item not in stored:
            raise UserError(f"{path}: holds no {item}; use a checkpoint that this program wrote")
    return {item: stored[item] for item in items}


def _check_written(stored: Mapping[str, Any], wanted: Mapping[str, Any], item: str) -> None:
    """Raise OSError naming the first array that reads back otherwise than it was."""
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            found, was = stored.get(name, "nothing"), wanted.get(name, "nothing")
            raise OSError(f"{item}.{name} reads back as {found} and was {was}")


def _shapes_and_dtypes(tree: Any) -> dict[str, str]:
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in _named(tree).items()}


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _options() -> ocp.Context:
    """How arrays are stored.

    Uncompressed: zstd takes 7 % off float32 weights and makes a save twice as long or more. Without the
    sharding file: every load names its own shardings.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.enable_write_sharding_file = False
    return context


def _of_process_0(look: Callable[[], Any]) -> Any:
    """`look()` of process 0, on every process. The others do not call it: they may see a shared disk at different
    times, and a folder not at all that process 0 has yet to make."""
    return broadcast_from_process_0(look() if jax.process_index() == 0 else None)
