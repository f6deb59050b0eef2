"""Gold solutions of tasks whose official metric needs generated text (gsm8k, humaneval, triviaqa, …).

What is scored is the solution after the task's own prompt, in the form in which the prompt's solved examples show one:
lm-eval's target of the document rendered as if it were a solved example, after the delimiter of the solved examples.
Where lm-eval's target is not a solution (a test program, only the final number, a defect) the field that holds it is
named here. Several gold answers are all scored; the first is the one that solved examples would show.
"""

import contextlib
import fnmatch
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

from fineline_jax.errors import UserError
from fineline_jax.scoring import lm_eval_compat

Doc = Mapping[str, Any]
_SOLUTIONS: dict[str, tuple[Callable[[Doc], Any], str | None]] = {
    # prompt is the head of a function; the target of lm-eval is the test
    "humaneval*": (lambda doc: doc["canonical_solution"], ""),
    # as its solved examples end; the target of lm-eval is the tests
    "mbpp": (lambda doc: f"{doc['code']}\n[DONE]", None),
    # solved examples show the whole solution, the target of lm-eval is its last box
    "hendrycks_math*": (lambda doc: doc["solution"], None),
    # lm-eval joins the keys of a record, without a space before them; answers are tuples of spans
    "drop": (lambda doc: [", ".join(answer) for answer in doc["answers"]], " "),
}
"""Task -> (its solutions, its delimiter; None: that of lm-eval)."""
# By this minerva_math distinguishes solved examples from the document that is asked.
_SHOWN = {"few_shot": "1"}
_CHECKERS = ("math_verify", "antlr4", "sympy", "sympy.parsing", "sympy.parsing.latex")


def continuations(name: str, definition: Any, doc: Doc, prefix: str | None) -> tuple[tuple[str, str], ...]:
    """(delimiter + solution, solution) for each distinct gold solution of `doc`, the first first.

    prefix: what lm-eval has put before the answer (its gen_prefix). Raises UserError if the task names no text.
    """
    rule, delimiter = next((value for glob, value in _SOLUTIONS.items() if fnmatch.fnmatch(name, glob)), (None, None))
    if rule is None and definition.config.unsafe_code:
        raise UserError(f"task {name!r} names test programs instead of solutions; drop it from the suite")
    target = rule(doc) if rule else _target(definition, {**doc, **_SHOWN})
    solutions = [target] if isinstance(target, str) else target
    if not isinstance(solutions, list) or not all(isinstance(one, str) for one in solutions) or not any(solutions):
        raise UserError(f"task {name!r} generates text and names no gold solution ({target!r}); drop it from the suite")
    distinct = dict.fromkeys(solution for solution in solutions if solution)
    if prefix:
        return tuple((lm_eval_compat.delimited(prefix, one)[len(prefix) :], one) for one in distinct)
    if delimiter is None:
        delimiter = lm_eval_compat.fewshot_config(definition).target_delimiter
    return tuple((f"{delimiter}{one}", one) for one in distinct)


def _target(definition: Any, doc: Doc) -> Any:
    target = lm_eval_compat.target_as_shown(definition, doc)
    if isinstance(target, int) and definition.config.doc_to_choice is not None:
        return definition.doc_to_choice(doc)[target]
    return target


@contextlib.contextmanager
def without_checkers() -> Iterator[None]:
    """Definitions of such tasks load what checks generated answers, from the hub (code_eval) or from packages that
    nothing else needs (math_verify, antlr4, sympy). Nothing is generated here, so stand-ins are loaded."""
    import evaluate

    missing = [name for name in _CHECKERS if importlib.util.find_spec(name.partition(".")[0]) is None]
    absent = {name: types.ModuleType(name) for name in missing}
    for module in absent.values():
        module.__dict__["__getattr__"] = lambda attribute: _Checker()
    version = importlib.metadata.version

    def of_package(name: str) -> str:
        return "4.11" if name == "antlr4-python3-runtime" else version(name)

    with (
        mock.patch.object(evaluate, "load", lambda *args, **options: _Checker()),
        mock.patch.object(importlib.metadata, "version", of_package),
    ):
        sys.modules.update(absent)
        try:
            yield
        finally:
            for name in absent:
                del sys.modules[name]


class _Checker:
    """Stands for a function that checks a generated answer."""

    def compute(self, *args: Any, **options: Any) -> list[dict[str, float]]:
        """Tried by definitions when they are loaded."""
        return [{"pass@1": 0.0}]

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise UserError("generated answers are not checked here; only gold solutions are scored")
