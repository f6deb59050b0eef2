"""Text and questions of the world agree: both are parsed here and held against what is true in it."""

import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from fineline_jax.world import commonsense, language, names, reading
from fineline_jax.world.catalogue import TASKS
from fineline_jax.world.generate import SHARES, generate, make_subjects
from fineline_jax.world.subject import Question, Subject, ask, collect, held_out

SUBJECTS = make_subjects(4)


def sentences(domain: str, documents: int = 3000) -> list[str]:
    rng = Random(f"{domain} text")
    return [s for _ in range(documents) for s in re.split(r"(?<=\.) ", SUBJECTS[domain].write(rng))]


def asked(task: str) -> Iterator[tuple[Question, str]]:
    for question in SUBJECTS[TASKS[task].domain].questions[task]:
        yield question, question.choices[question.answer]


def test_there_are_240_questions_with_as_many_choices_as_their_chance_says() -> None:
    found = {task: questions for subject in SUBJECTS.values() for task, questions in subject.questions.items()}
    assert found.keys() == TASKS.keys()
    for task, questions in found.items():
        assert len(questions) == (160 if task == "world_counting" else 240) == TASKS[task].documents
        choices = {len(q.choices) for q in questions}
        if task == "world_cloze":  # one request; without the story only the places are known
            assert choices == {1} and {q.choices[0] for q in questions} == set(reading.PLACES)
            choices = {len(reading.PLACES)}
        assert choices == {round(1 / TASKS[task].chance)}
    assert {domain: set(subject.questions) for domain, subject in SUBJECTS.items()} == {
        domain: {name for name, task in TASKS.items() if task.domain == domain} for domain in SHARES
    }


# ---- language

NUMBER = {word: number for pair in language.NOUNS for number, word in enumerate(pair)}
FORM = {word: (pair, number) for pair in language.VERBS for number, word in enumerate(pair)}
LEMMA = {word: pair[0] for pair in language.NOUNS for word in pair}


def test_verbs_agree_with_their_subject_and_no_pair_of_a_question_is_written() -> None:
    written = set()
    for text in sentences("language"):
        words = text.rstrip(".").split()
        noun = next(word for word in words if word in NUMBER)
        [verb] = [word for word in words if word in FORM]
        assert FORM[verb][1] == NUMBER[noun], text
        written.add((LEMMA[noun], FORM[verb][0]))
    assert len(written) > 300
    for task in ("world_agreement", "world_agreement_distant"):
        for question, right in asked(task):
            nouns = [word for word in question.question.split() if word in NUMBER]
            assert set(question.choices) == set(FORM[right][0]) and FORM[right][1] == NUMBER[nouns[0]]
            assert (LEMMA[nouns[0]], FORM[right][0]) not in written
            assert len(nouns) == (1 if task == "world_agreement" else 2)
            assert len({NUMBER[noun] for noun in nouns}) == len(nouns)  # the other noun has the other number


def test_the_wrong_order_is_the_sentence_with_two_neighbours_exchanged() -> None:
    noun, verb = "|".join(NUMBER), "|".join(FORM)
    sees = "|".join(word for pair in language.TRANSITIVE for word in pair)
    one = rf"the (?:(?:{'|'.join(language.ADJECTIVES)}) )?(?:{noun})"
    near = "|".join(language.PREPOSITIONS)
    other = rf" (?:{near}) the (?:{noun})| that (?:{sees}) the (?:{noun})| that the (?:{noun}) (?:{sees})"
    grammar = re.compile(rf"{one}(?:{other})? (?:{verb})(?: (?:{'|'.join(language.ADVERBS)}))?\.", re.IGNORECASE)
    for question, right in asked("world_word_order"):
        [wrong] = set(question.choices) - {right}
        a, b = (text.lower().rstrip(".").split() for text in (right, wrong))
        at = [i for i in range(len(a)) if a[i] != b[i]]
        assert grammar.fullmatch(right) and not grammar.fullmatch(wrong) and question.question == ""
        assert len(at) == 2 and at[1] == at[0] + 1 and a[at[0]] == b[at[1]] and a[at[1]] == b[at[0]]


# ---- reading

MOVE = re.compile(r"(\w+) \w+ (put|moved) the (\w+) into the (\w+)\.")


def test_the_place_of_a_thing_is_the_last_it_was_put_into() -> None:
    written = set()
    for seed in range(2000):
        text = SUBJECTS["reading"].write(Random(seed))
        if " calls: " in text:
            said = re.fullmatch(r"(\w+) calls: ([\w ]+)\. (\w+) answers: ([\w ]+)\.", text)
            assert said and said[1] != said[3] and said[2] == said[4] and 5 <= len(said[2].split()) <= 11
            continue
        place = {}
        for person, _, thing, where in MOVE.findall(text):
            place[thing] = where
            written.add((person, thing, where))
        told = re.findall(r"found the (\w+) in the (\w+)\.", text) + re.findall(r"The (\w+) is in the (\w+)\.", text)
        assert sorted(told) == sorted([*place.items()] * 2)
    for task, moves in (("world_cloze", 0), ("world_tracking", 1)):
        for question, right in asked(task):
            story = MOVE.findall(question.question)
            thing = re.search(r"(?:found the|The) (\w+)(?: is)? in the$", question.question)[1]
            places = [where for _, _, what, where in story if what == thing]
            assert right == places[-1] and sum(verb == "moved" for _, verb, _, _ in story) == moves
            person = next(person for person, _, what, where in story if (what, where) == (thing, right))
            assert (person, thing, right) not in written
            assert len({where for *_, where in story}) == len(story)  # no place twice
            if moves:
                others = {where for _, _, what, where in story if what != thing}
                wrong = set(question.choices) - {right}
                assert places[-2] in wrong and len(wrong & others) == 1
                [unmentioned] = wrong - others - {places[-2]}
                assert unmentioned in reading.PLACES and unmentioned not in question.question


# ---- knowledge and what follows from it

PHRASES = {
    "town": r"^(.+) lives in|^The home of (.+) is in|^You can visit (.+) in the town of|^(.+) has a house in",
    "job": r"^(.+) works as a|^The trade of (.+) is that of a|^(.+) earns money as a|^People pay (.+) to be a",
    "pet": r"^(.+) owns a|^The pet of (.+) is a|^At night (.+) feeds a|^(.+) takes care of a",
    "land": r"^(.+) is a citizen of|^The homeland of (.+) is|^(.+) pays taxes to|^(.+) holds a passport of",
    "of town": r"^(.+) lies in|^The town of (.+) belongs to|^On the map (.+) is part of",
}


def fact(text: str) -> tuple[str, str, int]:
    """(relation, subject, phrasing) of a statement or question."""
    for relation, pattern in PHRASES.items():
        if found := re.match(pattern, text):
            number = next(i for i, group in enumerate(found.groups()) if group)
            return relation, found[number + 1], number
    raise AssertionError(text)


def known() -> tuple[dict[tuple[str, str], str], set[tuple[str, str, int]], Counter]:
    """(relation, subject) -> value, every phrasing that is written, and how often each person is."""
    values, written, count = {}, set(), Counter()
    texts = sentences("knowledge", 8000) + [t for t in sentences("reasoning", 8000) if "sleeps" not in t]
    for text in texts:
        if re.search(r"on the island|wakes up", text):
            continue
        key = fact(text)
        value = text.rstrip(".").split()[-1]
        assert values.setdefault(key[:2], value) == value, text
        written.add(key)
        if key[0] in ("town", "job", "pet"):
            count[key[1]] += 1
    return values, written, count


@pytest.fixture(scope="module")
def facts() -> tuple[dict, set, Counter]:
    return known()


def test_facts_are_asked_in_the_phrasing_that_is_not_written(facts) -> None:
    values, written, count = facts
    ranks = [name for name, _ in count.most_common()]
    for task in ("world_knowledge_common", "world_knowledge_rare"):
        unknown = 0
        for question, right in asked(task):
            relation, name, phrasing = fact(question.question)
            unknown += (relation, name) not in values
            assert values.get((relation, name), right) == right
            assert (relation, name, phrasing) not in written
            same = {value for (kind, _), value in values.items() if kind == relation}
            assert set(question.choices) <= same and len(set(question.choices)) == 4
        assert unknown <= (0 if task == "world_knowledge_common" else 30)
    common = {fact(q.question)[1] for q, _ in asked("world_knowledge_common")}
    rare = {fact(q.question)[1] for q, _ in asked("world_knowledge_rare")}
    assert len(common) == 80 and 140 < len(rare) <= 160 and not common & rare
    assert set(ranks[:30]) <= common and not rare & set(ranks[:80])


def test_people_are_written_about_in_proportion_to_one_over_their_rank(facts) -> None:
    count = facts[2]
    total, harmonic = sum(count.values()), sum(1 / rank for rank in range(1, 321))
    assert len(count) == 320
    for rank, (_, found) in enumerate(count.most_common(8), start=1):
        expected = total / rank / harmonic
        assert abs(found - expected) < 5 * expected**0.5


def test_the_land_of_a_person_is_that_of_the_town(facts) -> None:
    values, _, _ = facts
    citizens = {name: land for (kind, name), land in values.items() if kind == "land"}
    for name, land in citizens.items():
        assert values["of town", values["town", name]] == land
    lands = set(citizens.values())
    assert len(lands) == 6 and Counter(v for (kind, _), v in values.items() if kind == "of town") == dict.fromkeys(
        lands, 4
    )
    people = {name for kind, name in values if kind == "town"}
    assert 0.25 < 1 - len(citizens) / len(people) < 0.45  # never written of 35 %
    for question, right in asked("world_two_hop_memory"):
        _, name, _ = fact(question.question)
        assert name not in citizens and values["of town", values["town", name]] == right
        assert set(question.choices) <= lands


def test_a_traveller_wakes_up_on_the_island_of_the_village() -> None:
    def chains(text: str) -> dict[str, tuple[str, str]]:
        islands = dict(re.findall(r"(\w+) is on the island of (\w+)\.", text))
        return {who: (village, islands[village]) for who, village in re.findall(r"(\w+ \w+) sleeps in (\w+)\.", text)}

    written = set()
    for seed in range(2000):
        text = SUBJECTS["reasoning"].write(Random(seed))
        if "sleeps" in text:
            found = chains(text)
            assert dict(re.findall(r"(\w+ \w+) wakes up on (\w+)\.", text)) == {w: i for w, (_, i) in found.items()}
            written |= {(who.split()[0], *rest) for who, rest in found.items()}
    for question, right in asked("world_two_hop_context"):
        found = chains(question.question)
        who = re.search(r"(\w+ \w+) wakes up on$", question.question)[1]
        [other] = set(found) - {who}
        assert found[who][1] == right and found[other][1] in set(question.choices) - {right}
        assert (who.split()[0], *found[who]) not in written and len(set(question.choices)) == 4


# ---- common sense

KIND = {thing: i for i, things in enumerate(commonsense.THINGS.values()) for thing in things}
FRIENDLY = re.compile(r"(\w+)(?: and | is fond of | admires | cares for )(\w+)(?: are friends)?\.")
HOSTILE = re.compile(r"(\w+)(?: and | is cross with | envies | despises )(\w+)(?: are rivals)?\.")


def outcome(text: str) -> tuple[str, str, str] | None:
    """(thing, event, what must follow)."""
    found = re.match(r"(?:When|After) the (\w+) (.+), it|The (\w+) (.+), and it", text)
    thing, event = (found[1] or found[3], found[2] or found[4]) if found else (None, None)
    return (thing, event, commonsense.OUTCOMES[event][KIND[thing]]) if found else None


def test_things_do_what_things_of_their_kind_do_and_pairs_of_questions_are_not_written() -> None:
    written, kinds = set(), list(commonsense.THINGS)
    for text in sentences("commonsense"):
        if case := outcome(text):
            assert text.rstrip(".").split()[-1] == case[2]
            written.add(case[:2])
        elif made := re.match(r"The (\w+) is made of (\w+)\.", text):
            assert kinds[KIND[made[1]]] == made[2]
    assert len(written) > 350
    for question, right in asked("world_physical"):
        thing, event, expected = outcome(question.question)
        assert right == expected and (thing, event) not in written
        assert set(question.choices) <= set(commonsense.OUTCOMES[event])


def test_sizes_follow_one_scale_and_pairs_of_questions_are_not_written() -> None:
    written, rank = set(), commonsense.SIZES.index
    compared = re.compile(r"Next to the (\w+), the (\w+) is(?: (\w+)\.)?")
    for text in sentences("commonsense"):
        if found := compared.fullmatch(text):
            assert found[3] == ("bigger" if rank(found[2]) > rank(found[1]) else "smaller")
            written.add(frozenset(found.groups()[:2]))
    assert len(written) > 200
    for question, right in asked("world_size"):
        first, second = compared.fullmatch(question.question).groups()[:2]
        assert right == ("bigger" if rank(second) > rank(first) else "smaller")
        assert set(question.choices) == {"bigger", "smaller"} and {first, second} not in written


def test_friends_share_what_happens_and_rivals_do_not() -> None:
    def case(text: str) -> tuple[str, str, bool]:
        tie, happened, felt = re.split(r"(?<=\.) ", text)
        friends = FRIENDLY.fullmatch(tie) if "rivals" not in tie else None
        first, second = (friends or HOSTILE.fullmatch(tie)).groups()
        who, event = happened.rstrip(".").split(" ", 1)
        assert who == second and felt.startswith(f"{first} felt") and first != second
        shape = tie.replace(first, "A").replace(second, "B")
        return shape, event, bool(friends) == (event in commonsense.GOOD)

    written = set()
    for seed in range(3000):
        for told in re.findall(r"[^.]+\. [^.]+\. \w+ felt \w+\.", SUBJECTS["commonsense"].write(Random(seed))):
            shape, event, glad = case(told.strip())
            assert told.rstrip(".").split()[-1] in (commonsense.GLAD if glad else commonsense.SAD)
            written.add((shape, event))
    for question, right in asked("world_social"):
        shape, event, glad = case(question.question)
        assert right in (commonsense.GLAD if glad else commonsense.SAD) and (shape, event) not in written
        assert any(c in commonsense.GLAD for c in question.choices) and any(
            c in commonsense.SAD for c in question.choices
        )


# ---- arithmetic


def test_every_sum_series_comparison_and_remainder_is_right_and_none_is_asked_that_is_written() -> None:
    written: dict[str, set] = {"larger": set(), "+": set(), "Count": set(), "leaves": set()}
    for text in sentences("arithmetic", 6000):
        numbers = [int(n) for n in re.findall(r"\d+", text)]
        kind = next(word for word in written if word in text)
        if kind == "larger":
            assert numbers[2] == max(numbers[:2])
        elif kind == "+":
            assert numbers[0] + numbers[1] == numbers[2]
        elif kind == "Count":
            step, *series = numbers
            assert series == [series[0] + i * step for i in range(4)]
        else:
            assert divmod(numbers[0], numbers[1])[1] == numbers[2]
        written[kind].add(tuple(numbers[:2] if kind in ("Count", "leaves") else sorted(numbers[:2])))
    for task, kind in (("comparison", "larger"), ("addition", "+"), ("counting", "Count"), ("remainder", "leaves")):
        for question, right in asked(f"world_{task}"):
            a, b = [int(n) for n in re.findall(r"\d+", question.question)][:2]
            wrong = [int(c) for c in question.choices if c != right]
            if task == "comparison":
                assert int(right) == max(a, b) and wrong == [min(a, b)]
            elif task in ("addition", "counting"):
                assert {abs(n - int(right)) for n in wrong} == {1, 10} and len(wrong) == 3
            else:
                assert int(right) == a % b and all(0 <= n < b for n in wrong)
            if task == "counting":
                assert int(right) == b + 3 * a
            assert (tuple(sorted((a, b))) if task in ("comparison", "addition") else (a, b)) not in written[kind]


# ---- what is written


def test_a_world_has_the_documents_asked_for_in_the_shares_of_its_domains(tmp_path: Path) -> None:
    world = generate(tmp_path, 4, 2000)
    train, validation = (
        [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in (world.text, world.validation_text)
    )
    assert (len(train), len(validation)) == (2000, 500)
    assert not set(validation) & set(train)  # text of its own
    marks = {
        "arithmetic": r"\d", "reading": r" calls: | found the ",
        "commonsense": r" felt |Next to the| made of |, it |, and it ",
        "reasoning": r"wakes up|lies in|belongs to|part of|citizen|homeland|taxes|passport",
        "knowledge": r" (lives|house) in| home of |You can visit|works as|trade of|earns|People pay|owns a|[Pp]et of"
        r"|At night|takes care",
    }  # fmt: skip
    counts = Counter(next((d for d, mark in marks.items() if re.search(mark, text)), "language") for text in train)
    assert sum(SHARES.values()) == pytest.approx(1) and counts.keys() == SHARES.keys()
    shares = {"language": 13, "reading": 22, "knowledge": 17, "commonsense": 16, "arithmetic": 18, "reasoning": 14}
    for domain, percent in shares.items():
        share = percent / 100
        assert abs(counts[domain] / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5, domain
    defaults = inspect.signature(generate).parameters
    assert (defaults["seed"].default, defaults["documents"].default) == (0, 100_000)


def test_the_tokenizers_settings_are_llamas_and_files_are_replaced_whole(tmp_path: Path) -> None:
    generate(tmp_path, 0, 1)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}
    world = generate(tmp_path, 0, 1)
    assert len(before) == 2 + 16 + 2 and all(path.stat().st_ino != inode for path, inode in before.items())
    assert not list(tmp_path.rglob(".*"))
    settings = json.loads((world.tokenizer / "tokenizer_config.json").read_text())
    assert settings == {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }  # fmt: skip


def test_questions_are_collected_once_each_and_too_few_are_an_error() -> None:
    rng = Random(0)
    found = collect(rng, lambda r: ask(r, f"q{r.randrange(30)}", "a", ["b", "c"]) if r.random() < 0.5 else None, 20)
    assert len({q.question for q in found}) == len(found) == 20
    assert all(q.choices[q.answer] == "a" and set(q.choices) == {"a", "b", "c"} for q in found)
    assert {q.answer for q in found} == {0, 1, 2}
    with pytest.raises(RuntimeError, match="only 1 of 2"):
        collect(rng, lambda r: ask(r, "q", "a", ["b"]), 2)


def test_what_is_held_out_depends_on_the_words_and_their_order_alone() -> None:
    decided = [held_out(0.3, "x", i, "y") for i in range(300)]
    assert decided == [held_out(0.3, "x", str(i), "y") for i in range(300)]
    assert decided != [held_out(0.3, "y", i, "x") for i in range(300)]
    assert all(held_out(0.6, "x", i, "y") for i in range(300) if decided[i])  # a larger share holds out more


@pytest.mark.parametrize("seed", range(4))
def test_no_name_is_given_twice(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of the people in stories but what the text at hand says."""
    given: list[str] = []
    real = names.invent

    def invent(*arguments: object) -> tuple[str, ...]:
        given.extend(made := real(*arguments))
        return made

    monkeypatch.setattr(names, "invent", invent)
    make_subjects(seed)
    assert len(set(given)) == len(given) == 32 + 32 + 24 + 6 + 320 + 16 + 8


def test_a_subject_is_its_writer_and_its_questions() -> None:
    assert all(isinstance(subject, Subject) for subject in SUBJECTS.values())
    assert list(SUBJECTS) == list(SHARES)
