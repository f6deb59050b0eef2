"""Documents of every task of the shipped suites, in the columns of its data set on the hub, for --benchmarks.

Columns and types were read from the cards of the data sets; texts are random. White space, empty strings and
characters of several bytes are where the originals have them.
"""

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from scoring_examples import WORDS, sentence

Row = dict[str, Any]
HAN = "我们的学校在北京今天考试题目正确答案是否因为所以"
LETTERS = "ABCDE"
NO_ANSWER = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": []}


def write_documents(folder: Path, tasks: list[tuple[str, str | None, tuple[str, ...]]], each: int = 7) -> Path:
    """FOLDER/<id>/<config>/<split>.parquet for each (id, config, splits); solved examples of `dev` are five."""
    for number, (identity, config, splits) in enumerate(sorted(tasks, key=str)):
        rng = random.Random(number)
        place = folder / identity.replace("/", "__") / (config if config not in (None, "default") else "")
        place.mkdir(parents=True, exist_ok=True)
        for split in splits:
            # of different sizes, so that groups weighted by size are told from plain means; enough to draw 25 shots
            count = {"dev": 5, "train": 27}.get(split, each + rng.randrange(4))
            rows = [_maker(identity, config)(rng, i) for i in range(count)]
            pq.write_table(pa.Table.from_pylist(rows), place / f"{split}.parquet")
    return folder


def _maker(identity: str, config: str | None) -> Callable[[random.Random, int], Row]:
    found = MAKERS.get(f"{identity}/{config}") or MAKERS.get(identity)
    if found is None and identity.startswith("hails/agieval"):
        found = agieval
    assert found is not None, f"no documents for {identity}, {config}"
    return found


def text(rng: random.Random, low: int = 1, high: int = 12) -> str:
    return sentence(rng, low, high)


def chinese(rng: random.Random, low: int = 3, high: int = 14) -> str:
    return "".join(rng.choices(HAN, k=rng.randint(low, high)))


def piqa(rng: random.Random, i: int) -> Row:
    return {"goal": text(rng), "sol1": text(rng), "sol2": text(rng) + " ", "label": rng.randint(0, 1)}


def arc(rng: random.Random, i: int) -> Row:
    labels = list(LETTERS[: rng.choice([3, 4, 4, 5])]) if i % 3 else ["1", "2", "3", "4"]
    choices = {"text": [text(rng, 1, 5) for _ in labels], "label": labels}
    return {"id": str(i), "question": text(rng), "choices": choices, "answerKey": rng.choice(labels)}


def openbookqa(rng: random.Random, i: int) -> Row:
    choices = {"text": [text(rng, 1, 5) for _ in range(4)], "label": list("ABCD")}
    # the answers of the original carry white space in places
    answer = (" " if i == 2 else "") + rng.choice("ABCD")
    return {"id": str(i), "question_stem": text(rng), "choices": choices, "answerKey": answer}


def commonsense(rng: random.Random, i: int) -> Row:
    choices = {"label": list(LETTERS), "text": [text(rng, 1, 3) for _ in LETTERS]}
    question = f" {text(rng)} "
    return {"id": str(i), "question": question, "question_concept": "cat", "choices": choices,
            "answerKey": rng.choice(LETTERS)}  # fmt: skip


def siqa(rng: random.Random, i: int) -> Row:
    answers = {f"answer{letter}": text(rng, 1, 5) for letter in "ABC"}
    return {"context": text(rng), "question": text(rng) + "?", **answers, "label": rng.choice("123")}


def hellaswag(rng: random.Random, i: int) -> Row:
    a, b = text(rng) + " [title] " + text(rng) + ".", text(rng).upper() if i % 2 else ""
    endings = [f"{text(rng, 3, 9)} [step] {text(rng, 2, 5)}." for _ in range(4)]
    return {"ind": i, "activity_label": text(rng, 1, 2), "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}",
            "endings": endings, "source_id": "activitynet~v", "split": "val", "split_type": "indomain",
            "label": str(rng.randrange(4))}  # fmt: skip


def winogrande(rng: random.Random, i: int) -> Row:
    return {"sentence": f"{text(rng)} _ {text(rng)}.", "option1": text(rng, 1, 2), "option2": text(rng, 1, 2),
            "answer": rng.choice("12")}  # fmt: skip


def sciq(rng: random.Random, i: int) -> Row:
    wrong = {f"distractor{k}": text(rng, 1, 3) for k in (3, 1, 2)}
    support = f" {text(rng)}\n" if i % 3 else ""
    return {"question": text(rng), **wrong, "correct_answer": text(rng, 1, 3), "support": support}


def boolq(rng: random.Random, i: int) -> Row:
    return {"question": text(rng), "passage": f"{text(rng)} -- {text(rng, 9, 20)}", "idx": i,
            "label": rng.randint(0, 1)}  # fmt: skip


def copa(rng: random.Random, i: int) -> Row:
    return {"premise": text(rng).capitalize() + ".", "choice1": text(rng).capitalize() + ".",
            "choice2": text(rng).capitalize() + ".", "question": rng.choice(["cause", "effect"]), "idx": i,
            "label": rng.randint(0, 1)}  # fmt: skip


def wsc(rng: random.Random, i: int) -> Row:
    words = rng.choices(["the", "cat", "dog", "saw", "house"], k=8)
    words[5] = "it"
    return {"text": " ".join(words) + " .", "span1_index": 1, "span2_index": 5, "span1_text": words[1],
            "span2_text": "it", "idx": i, "label": rng.randint(0, 1)}  # fmt: skip


def lambada(rng: random.Random, i: int) -> Row:
    return {"text": f"{text(rng, 5, 20)} {rng.choice(['cat', 'ice', 'then!'])}"}


def mmlu(rng: random.Random, i: int) -> Row:
    return {"question": f" {text(rng)}\n{text(rng)}", "subject": "s", "choices": [text(rng, 1, 5) for _ in range(4)],
            "answer": rng.randrange(4)}  # fmt: skip


def agieval(rng: random.Random, i: int) -> Row:
    k = rng.choice([4, 5])
    options = [f"({letter}){text(rng, 1, 5)}" for letter in LETTERS[:k]]
    query = f"Q: {text(rng)} Answer Choices: {' '.join(options)}\nA: Among A through {LETTERS[k - 1]}, the answer is"
    return {"query": query, "choices": options, "gold": [rng.randrange(k)]}


def cmmlu(rng: random.Random, i: int) -> Row:
    options = {letter: chinese(rng, 1, 6) for letter in "ABCD"}
    return {"Question": f"{chinese(rng)}____。", **options, "Answer": rng.choice("ABCD")}


def ceval(rng: random.Random, i: int) -> Row:
    options = {letter: chinese(rng, 1, 6) for letter in "ABCD"}
    return {"id": i, "question": f"{chinese(rng)}____。", **options, "answer": rng.choice("ABCD"), "explanation": ""}


def race(rng: random.Random, i: int) -> Row:
    problems = [
        {
            "question": f"{text(rng)}  _  ." if k % 2 else f"{text(rng)}?",
            "answer": rng.choice("ABCD"),
            "options": [text(rng, 1, 6) for _ in range(4)],
        }
        for k in range(rng.randint(1, 4))
    ]
    return {"article": f"{text(rng)}\n\n{text(rng)}", "problems": repr(problems)}


def logiqa(rng: random.Random, i: int) -> Row:
    return {"label": rng.choice("abcd") + " ", "context": text(rng), "question": text(rng) + "?",
            "options": [text(rng, 1, 6) for _ in range(4)]}  # fmt: skip


def xstorycloze(rng: random.Random, i: int, write: Callable[..., str] = text) -> Row:
    sentences = {f"input_sentence_{k}": write(rng) + "." for k in range(1, 5)}
    quizzes = {f"sentence_quiz{k}": write(rng) + "." for k in (1, 2)}
    return {"story_id": str(i), **sentences, **quizzes, "answer_right_ending": rng.randint(1, 2)}


def xwinograd(rng: random.Random, i: int) -> Row:
    return {"sentence": f"{chinese(rng)}_{chinese(rng)}。", "option1": chinese(rng, 1, 2),
            "option2": chinese(rng, 1, 2), "answer": rng.choice("12")}  # fmt: skip


def xcopa(rng: random.Random, i: int) -> Row:
    return {"premise": chinese(rng) + "。", "choice1": chinese(rng) + "。", "choice2": chinese(rng) + "。",
            "question": rng.choice(["cause", "effect"]), "label": rng.randint(0, 1), "idx": i,
            "changed": False}  # fmt: skip


def crows_pairs(rng: random.Random, i: int) -> Row:
    return {"sent_more": text(rng) + ".", "sent_less": text(rng) + ".", "stereo_antistereo": "stereo",
            "bias_type": rng.choice(["age", "gender"])}  # fmt: skip


def triviaqa(rng: random.Random, i: int) -> Row:
    aliases = [text(rng, 1, 3) for _ in range(rng.randint(1, 4))]
    answer = {"aliases": aliases, "normalized_aliases": [a.lower() for a in aliases], "value": aliases[-1],
              "normalized_value": aliases[-1].lower(), "type": "WikipediaEntity"}  # fmt: skip
    return {"question": text(rng), "question_id": str(i), "answer": answer}


def nq_open(rng: random.Random, i: int) -> Row:
    return {"question": text(rng), "answer": [text(rng, 1, 3) for _ in range(rng.randint(1, 3))]}


def drop(rng: random.Random, i: int) -> Row:
    kinds: list[Row] = [
        NO_ANSWER | {"number": str(rng.randrange(99))},
        NO_ANSWER | {"spans": [text(rng, 1, 3) for _ in range(2)]},
        NO_ANSWER | {"date": {"day": "1", "month": "May", "year": "1900"}},
    ]
    others = rng.choices(kinds, k=2)
    validated = {key: [other[key] for other in others] for key in ("number", "date", "spans")}
    return {"section_id": "s", "query_id": str(i), "passage": text(rng, 8, 20), "question": text(rng) + "?",
            "answer": kinds[i % 3], "validated_answers": validated}  # fmt: skip


def bbh(rng: random.Random, i: int) -> Row:
    return {"input": f"{text(rng)}\nOptions:\n(A) {text(rng)}", "target": rng.choice(["(A)", "True", "cat dog", "12"])}


def gsm8k(rng: random.Random, i: int) -> Row:
    n = rng.randrange(90)
    return {"question": text(rng), "answer": f"{text(rng)} <<{n}*1={n}>>{n}.\n#### {n}"}


def hendrycks_math(rng: random.Random, i: int) -> Row:
    solution = f"{text(rng)} so $x=\\frac{{1}}{{{i + 1}}}$.\n\nThus \\boxed{{\\frac{{1}}{{{i + 1}}}}}."
    return {"problem": f"{text(rng)} $x^{i}$", "level": "Level 2", "type": "Algebra", "solution": solution}


def humaneval(rng: random.Random, i: int) -> Row:
    return {"task_id": f"HumanEval/{i}", "prompt": f'def f{i}(a):\n    """{text(rng)}"""\n',
            "canonical_solution": f"    return a + {i}\n\n", "test": f"def check(c):\n    assert c({i})",
            "entry_point": f"f{i}"}  # fmt: skip


def mbpp(rng: random.Random, i: int) -> Row:
    return {"task_id": i, "text": text(rng), "code": f"def f{i}(a):\r\n  return a", "test_setup_code": "",
            "test_list": [f"assert f{i}({k}) == {k}" for k in range(3)], "challenge_test_list": []}  # fmt: skip


MAKERS: dict[str, Callable[[random.Random, int], Row]] = {
    "baber/piqa": piqa,
    "allenai/ai2_arc": arc,
    "allenai/openbookqa": openbookqa,
    "tau/commonsense_qa": commonsense,
    "lighteval/siqa": siqa,
    "Rowan/hellaswag": hellaswag,
    "allenai/winogrande": winogrande,
    "allenai/sciq": sciq,
    "aps/super_glue/boolq": boolq,
    "aps/super_glue/copa": copa,
    "aps/super_glue/wsc.fixed": wsc,
    "EleutherAI/lambada_openai": lambada,
    "cais/mmlu": mmlu,
    "haonan-li/cmmlu": cmmlu,
    "ceval/ceval-exam": ceval,
    "EleutherAI/race": race,
    "EleutherAI/logiqa": logiqa,
    "juletxara/xstory_cloze/en": xstorycloze,
    "juletxara/xstory_cloze/zh": functools.partial(xstorycloze, write=chinese),
    "Muennighoff/xwinograd": xwinograd,
    "cambridgeltl/xcopa": xcopa,
    "jannalu/crows_pairs_multilingual": crows_pairs,
    "mandarjoshi/trivia_qa": triviaqa,
    "google-research-datasets/nq_open": nq_open,
    "EleutherAI/drop": drop,
    "SaylorTwift/bbh": bbh,
    "openai/gsm8k": gsm8k,
    "EleutherAI/hendrycks_math": hendrycks_math,
    "openai/openai_humaneval": humaneval,
    "google-research-datasets/mbpp": mbpp,
}
"""Data set, or data set/config -> its row"""
assert WORDS
