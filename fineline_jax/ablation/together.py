"""Runs that differ only in the arguments of their step, trained as one program: `jax.vmap` over the runs.

Each run is a thread with the loop, folder and observers of `training.loop`. Its training step waits for those of the
others, whatever step of its own each is at; the last to come takes the step of all. A run that has ended keeps its
place in the program, so that nothing is compiled again.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from fineline_jax.ablation.sweep import Trial
from fineline_jax.recipe import Recipe
from fineline_jax.training.programs import Programs
from fineline_jax.training.stop import stop_requests

Outcome = TypeVar("Outcome")


def run_together(
    trials: Sequence[Trial], programs: Programs, run_one: Callable[[Trial, Programs, int], Outcome]
) -> list[Outcome]:
    """What `run_one(trial, programs, how many)` gives for each of `trials`, each on a thread of its own.

    Signals stop all of them. An error of one does not end the others; it is raised when all have ended.
    """
    common = Together(len(trials), programs)

    def on_thread(number: int) -> Outcome:
        with common.seat(number) as own:
            return run_one(trials[number], own, len(trials))

    with stop_requests(), ThreadPoolExecutor(len(trials)) as threads:
        return list(threads.map(on_thread, range(len(trials))))


class Together:
    """The common step of `count` runs; each is given the `Programs` of its seat."""

    def __init__(self, count: int, programs: Programs):
        self.programs, self.here = programs, set(range(count))
        self.changed, self.one_at_a_time = threading.Condition(), threading.Lock()
        self.waiting: dict[int, tuple] = {}
        """Arguments of the steps that wait, by seat."""
        self.last: dict[int, tuple] = {}
        """Arguments of the last step of every seat; those of runs that have ended are given again."""
        self.results: dict[int, Any] = {}
        """Metrics that their run has not fetched yet, or what went wrong in the step of all."""
        self.states: Any = None
        """`training.step.State` of all seats in `last`, ascending; every array has an axis of seats before its own."""

    @contextlib.contextmanager
    def seat(self, number: int) -> Iterator[Programs]:
        """Context of the thread of one run; when it ends, the others no longer wait for it."""
        try:
            yield _Seat(self, number)
        finally:
            with self.changed:
                self.here.discard(number)
                self.changed.notify_all()

    def step(self, number: int, step_of_all: Callable, arguments: tuple) -> tuple[Any, Any]:
        """The state and the metrics of a run after its step; returns when all runs have taken one."""
        with self.changed:
            self.waiting[number] = arguments
            self.changed.notify_all()
            self.changed.wait_for(lambda: number in self.results or self.waiting.keys() == self.here)
            if number not in self.results:
                self._take(step_of_all)
            metrics = self.results.pop(number)
        if isinstance(metrics, BaseException):
            raise metrics
        return _State(self, number), metrics

    def _take(self, step_of_all: Callable) -> None:
        self.last |= self.waiting
        seats, self.waiting = sorted(self.last), {}
        states, *given = zip(*(self.last[seat] for seat in seats), strict=True)
        try:
            if self.states is None:
                self.states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            self.states, metrics = step_of_all(self.states, *given)
        except BaseException as error:  # every run ends with it
            metrics = [error] * len(seats)
        self.results = {seat: of_seat for seat, of_seat in zip(seats, metrics, strict=True) if seat in self.here}
        self.changed.notify_all()


class _Seat(Programs):
    """The programs of one run: the training step is that of all, the others are called by one run at a time."""

    def __init__(self, together: Together, number: int):
        self.together, self.number = together, number

    def __call__(self, name: str, recipe: Recipe, mesh: jax.sharding.Mesh, make: Callable) -> Any:
        together = self.together
        made = together.programs(name, recipe, mesh, make)
        if name == "step":
            step_of_all = together.programs("step of all", recipe, mesh, lambda: _vmapped(made))
            return lambda *arguments: together.step(self.number, step_of_all, arguments)

        def alone(*arguments: Any) -> Any:
            with together.one_at_a_time:
                return made(*arguments)

        return alone


class _State(Mapping):
    """The state of one run, cut out of those of all when it is read: at saves."""

    def __init__(self, together: Together, number: int):
        self.together, self.index = together, sorted(together.last).index(number)

    def __getitem__(self, item: str) -> Any:
        return jax.tree.map(lambda leaf: leaf[self.index], self.together.states[item])

    def __iter__(self) -> Iterator[str]:
        return iter(self.together.states)

    def __len__(self) -> int:
        return len(self.together.states)


def _vmapped(one: Callable) -> Callable:
    """The step of all runs from that of one; the metrics of each are apart, so that none waits to have them cut out."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(states: Any, *given: tuple) -> tuple[Any, list]:
        states, metrics = jax.vmap(one)(states, *map(jnp.stack, given))
        return states, [jax.tree.map(lambda values, i=i: values[i], metrics) for i in range(len(given[0]))]

    return step
