"""What the pages name is there: commands, their options, files, links, functions and their arguments."""

import ast
import contextlib
import functools
import importlib
import inspect
import io
import posixpath
import re

import pytest
from docs_pages import CHECKOUT, PAGES, blocks, page, python_blocks, table, ticked

from fineline_jax.cli import main

COMMANDS = (
    "demo", "data prepare text", "data prepare amber", "data prepare world", "plan", "pretrain", "tasks prepare",
    "tasks plan", "score", "show", "analyze", "ablate", "series", "export", "import", "export-scores", "traces",
)  # fmt: skip
OF_OTHERS = {"--help", "--version", "--tyro-print-completion", "--field.sub"}
OF_BEAM = {
    "--runner", "--flink_master", "--environment_type", "--environment_config", "--direct_running_mode",
    "--direct_num_workers",
}  # fmt: skip
OF_LM_EVAL = {
    "--model", "--model_args", "--tasks", "--include_path", "--num_fewshot", "--limit", "--output_path",
    "--log_samples", "--seed", "--samples", "--apply_chat_template", "--system_instruction",
}  # fmt: skip
FILE = re.compile(r"(?<![\w/])(?:configs|docs|eval|train|tests|benchmarks|fineline_jax)/[\w./-]*\w(?![\w*])")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")
EVERYTHING = (*PAGES, "BENCHMARKS.md", "CONTRIBUTING.md")


@functools.cache
def options(command: str) -> frozenset[str]:
    """All that `fineline COMMAND --help` lists."""
    recipe = ["llama_60m"] if command in ("plan", "pretrain") else []
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        main([*command.split(), *recipe, "--help"])
    if command == "plan":
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            main(["plan", "--score", "llama_60m", "--help"])
    return frozenset(OPTION.findall(out.getvalue()))


def command_lines(name: str) -> list[str]:
    """Lines of code and code in sentences that call `fineline`, or a program of train/ and eval/ that is the same."""
    lines = "\n".join("\n".join(block) for block in blocks(name)).replace("\\\n", "").splitlines()
    sentences = re.sub(r"^```.*?^```$", "", page(name), flags=re.M | re.S)
    lines += [" ".join(code.split()) for code in ticked(sentences)]
    lines = [line.split("  # ")[0] for line in lines]
    lines = [re.sub(r"^(?:\$ )?(?:time )?(?:taskset -c 0 )?(?:[A-Z_]+=\S+ )*", "", line) for line in lines]
    lines = [re.sub(r"^python (?:train|eval)/(\w+)\.py", r"fineline \1", line) for line in lines]
    return [line for line in lines if re.match(r"fineline( |$)", line)]


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_command_that_a_page_calls_exists_and_knows_the_options(name: str) -> None:
    for line in command_lines(name):
        words = line.removeprefix("fineline").strip()
        # lm-eval's own, those of the command itself, and what it prints
        if re.match(r"(lm-eval|--help|--version|--tyro-print-completion|$|\(\{)", words):
            continue
        command = next(
            (known for known in sorted(COMMANDS, key=len)[::-1] if f"{words} ".startswith(f"{known} ")), None
        )
        group = words in ("data", "data prepare", "tasks")
        assert command or group, f"{name}: {line}: no such command"
        outside = re.sub(r'"[^"]*"', "", words)  # Beam's options stand in quotes
        for option in OPTION.findall(outside) if command else ():
            assert option in options(command) | OF_OTHERS, f"{name}: {line}: no option {option}"


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_option_in_a_page_is_one_of_a_command(name: str) -> None:
    known = {option for command in COMMANDS for option in options(command)} | OF_BEAM | OF_LM_EVAL | OF_OTHERS
    for found in set(OPTION.findall(page(name))) - known:
        # The benchmarks' own, XLA's, pip's and those of the machine's tools stand with their program.
        tools = r"XLA_FLAGS=|MUTANTS=|PYTEST=|`…|xla_|sbatch|gcloud|docker|hf download"
        programs = rf"(?:(?:benchmarks|configs/reproduce)/\S+|{tools})"
        theirs = re.findall(rf"{programs}[^`]*{re.escape(found)}", page(name))
        assert theirs or found.startswith("--xla_"), f"{name}: {found} is an option of no command"


def test_lm_evals_options_are_lm_evals() -> None:
    from lm_eval._cli.run import Run  # pyright: ignore[reportMissingImports]

    assert set(OPTION.findall(inspect.getsource(importlib.import_module(Run.__module__)))) >= OF_LM_EVAL


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_file_that_a_page_names_is_in_the_checkout(name: str) -> None:
    text = re.sub(r"`?(?:hf|gs|s3|https?)://\S+", "", page(name))
    made = set(re.findall(r"^`(\S+)`:\n\n    ", text, flags=re.M)) if name.startswith("docs/guides/add_") else set()
    for path in set(FILE.findall(text)) - made:  # the guides show files that the reader writes
        data_of_the_reader = path.startswith("benchmarks/") and path.endswith(".parquet")
        assert data_of_the_reader or (CHECKOUT / path).exists(), f"{name}: {path} is not there"


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_link_leads_to_a_page_and_a_heading(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (CHECKOUT / name).parent / path if path else CHECKOUT / name
        assert file.is_file(), f"{name}: {target}"
        headings = re.findall(r"^#+ (.*)", file.read_text(), flags=re.M) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{name}: {target}"


def test_the_readme_leads_to_every_page() -> None:
    """To those of the root and of docs/ itself directly, to those in folders of docs/ by way of other pages."""
    linked = {name: links(name) for name in (*EVERYTHING, "CHANGELOG.md")}
    assert linked["README.md"] >= {name for name in linked if name.count("/") < 2} - {"README.md"}
    reached, new = set(), {"README.md"}
    while new:
        reached |= new
        new = {target for name in new for target in linked[name]} - reached
    assert reached == set(linked)


def links(name: str) -> set[str]:
    """The pages that a page links to, from the checkout's root."""
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+\.md)(?:#[^)]*)?\)", page(name))
    return {posixpath.normpath(posixpath.join(posixpath.dirname(name), target)) for target in targets}


def test_architecture_names_every_room_and_their_public_functions_exist() -> None:
    rooms = table("ARCHITECTURE.md", "package")
    named = {name.removesuffix("/") for row in rooms for name in ticked(row["package"])}
    there = {path.name for path in (CHECKOUT / "fineline_jax").iterdir() if re.fullmatch(r"[a-z]\w*(\.py)?", path.name)}
    there.discard("configs")  # a link in some checkouts
    assert named == there
    for row in rooms:
        homes = [name.removesuffix("/").removesuffix(".py") for name in ticked(row["package"])]
        for function in ticked(row["its public functions"]):
            path = function.partition("(")[0].replace("_*", "_text").replace("ModelConfig", "config.ModelConfig")
            own = [f"fineline_jax.{home}.{path.removeprefix(home + '.') if home == 'cli' else path}" for home in homes]
            assert any(map(resolves, own)), function


def test_architecture_lists_the_rooms_in_an_order_in_which_each_exists() -> None:
    order = re.search(r"`(cli → .*?)`", page("ARCHITECTURE.md"))
    assert order is not None
    for name in re.findall(r"\w+", order[1]):
        assert resolves(f"fineline_jax.{name}"), name


def resolves(path: str) -> bool:
    """Whether a dotted path leads through modules to an attribute."""
    *parents, last = path.split(".")
    for end in range(len(parents), 0, -1):
        try:
            found = importlib.import_module(".".join(parents[:end]))
        except ImportError:
            continue
        for name in (*parents[end:], last):
            if not hasattr(found, name):
                with contextlib.suppress(ImportError):
                    found = importlib.import_module(f"{found.__name__}.{name}") if inspect.ismodule(found) else None
                    if found is not None:
                        continue
                return False
            found = getattr(found, name)
        return True
    return False


def examples() -> list[tuple[str, str, dict]]:
    """(page, code, what its imports and sentences have named)."""
    from fineline_jax.data import loader, prefetch
    from fineline_jax.models import decoder

    fenced = [(name, code, {"decoder": decoder}) for name in PAGES for code in python_blocks(name)]
    lines = next(block for block in blocks("docs/data.md") if block[0].startswith("batches = open_batches("))
    return [*fenced, ("docs/data.md", "\n".join(lines), vars(loader) | vars(prefetch))]


@pytest.mark.parametrize(("name", "code", "known"), examples(), ids=lambda value: value if ".md" in value else "")
def test_the_functions_of_python_examples_take_the_arguments_given(name: str, code: str, known: dict) -> None:
    tree, checked = ast.parse(code), 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fineline_jax"):
            for one in node.names:
                assert resolves(f"{node.module}.{one.name}"), f"{name}: {node.module}.{one.name}"
                known[one.name] = getattr(importlib.import_module(node.module), one.name)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first, *rest = ast.unparse(call.func).split(".")
        if first in known:
            function = functools.reduce(getattr, rest, known[first])
            inspect.signature(function).bind(*call.args, **{str(word.arg): word.value for word in call.keywords})
            checked += 1
    assert checked
