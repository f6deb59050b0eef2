"""What `fineline tasks plan` prints: each task planned by itself."""

import numpy as np
from scoring_examples import write_benchmarks, write_tokenizer

from fineline_jax.scoring import pack
from fineline_jax.scoring.plan_table import HEADER, plan_table, taken
from fineline_jax.scoring.prefix_tree import plan_pack, statistics


def test_a_line_says_what_the_plan_of_that_task_alone_would_say(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "bpe", adds_bos=True)
    benchmarks = write_benchmarks(tmp_path / "benchmarks", documents=6)
    both = pack.prepare("piqa@1,arc_easy", tokenizer, tmp_path / "both", benchmarks=benchmarks)
    lines = plan_table(both, 256, 512)
    assert [line[0] for line in lines] == ["piqa", "arc_easy"]
    for name, shots in (("piqa", "@1"), ("arc_easy", "")):
        alone = pack.prepare(name + shots, tokenizer, tmp_path / name, benchmarks=benchmarks)
        found = statistics(plan_pack(alone, 256, row_length=512))
        line = dict(zip(HEADER, next(line for line in lines if line[0] == name), strict=True))
        assert int(line["requests"]) == alone.requests.num_rows
        assert int(line["unique tokens"].replace(",", "")) == found.unique_tokens
        assert float(line["fed / unique"]) == round(found.overhead, 3)


def test_rows_of_a_ragged_array_are_taken_in_the_order_asked():
    ragged = pack.Ragged(np.arange(6), np.array([0, 2, 2, 6]))
    some = taken(ragged, np.array([2, 1, 0]))
    assert [some[i].tolist() for i in range(3)] == [[2, 3, 4, 5], [], [0, 1]]
