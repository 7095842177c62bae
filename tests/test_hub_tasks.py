"""Readers of data sets of the hub, on rows in their form; the data themselves where a mirror is."""

import json
from pathlib import Path

from learnware_jax.dock.hub_tasks import CHARACTERS, HUB_TASKS, OPTIONS_CHARACTERS
from learnware_jax.dock.labelled import LABELLED

TASKS = {task.name: task for task in HUB_TASKS}


def read(name, rows, tmp_path: Path):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [(example.text, example.answer) for example in TASKS[name].read([file])]


def test_labels_of_numbers_names_and_lists(tmp_path):
    rows = [{"text": "rates up", "label": 1}, {"text": "unnamed topic", "label": 18}]
    assert read("topic-markets", rows, tmp_path) == [("rates up", "rates")]
    rows = [
        {"text": "grow", "labels": ["sustaining proliferative signaling"]},
        {"text": "both", "labels": ["resisting cell death", "inducing angiogenesis"]},
        {"text": "nothing", "labels": ["none"]},
    ]
    assert read("topic-hallmarks", rows, tmp_path) == [("grow", "growth")]
    rows = [{"input": "What are the symptoms of  X ?", "output": "Itching."}]
    rows += [{"input": "How is X treated ?", "output": "By rest."}]
    assert read("section-patients", rows, tmp_path) == [("Itching.", "symptoms")]


def test_the_first_name_of_a_sentence_stands_before_it(tmp_path):
    tokens = ["In", "New", "York", "John", "Doe", "said", "no"]
    rows = [
        # place of two words, then a person of two
        {"gold_token": tokens, "gold_label": [0, 3, 4, 1, 2, 0, 0]},
        {"gold_token": ["Apple", "fell"], "gold_label": [5, 0]},
        {"gold_token": ["It", "fell"], "gold_label": [0, 0]},
        # Two names of one word each, side by side: the second begins its own.
        {"gold_token": ["Apple", "Google"], "gold_label": [5, 5]},
    ]
    assert read("entity-news", rows, tmp_path) == [
        ("New York: In New York John Doe said no", "place"),
        ("Apple: Apple fell", "company"),
        ("Apple: Apple Google", "company"),
    ]


def test_a_disease_behind_the_cut_is_not_named(tmp_path):
    # 9 words of 15 letters with blanks are 143 characters: the cut leaves 8.
    words = ["x" * 15] * 9
    rows = [
        {"tokens": words, "ner_tags": [0] * 7 + [1, 0]},
        {"tokens": words, "ner_tags": [0] * 8 + [1]},
    ]
    found = read("mention-diseases", rows, tmp_path)
    assert [answer for _, answer in found] == ["yes", "no"]
    assert {len(text) for text, _ in found} == {8 * 15 + 7} and 127 < CHARACTERS < 143


def test_options_are_lettered_and_long_questions_left_out(tmp_path):
    row = {"Problem": "1 + 1", "options": "A ) 1 , B ) 2 , C ) 3,000 , D ) 4 , E ) 5"}
    rows = [row | {"correct": "b"}, row | {"Problem": "9 " * OPTIONS_CHARACTERS, "correct": "a"}]
    rows += [row | {"options": "A ) 1 , B ) 2", "correct": "a"}]
    assert read("letters-mathematics", rows, tmp_path) == [
        ("1 + 1 A. 1 B. 2 C. 3,000 D. 4 E. 5", "B")
    ]
    rows = [{"question": "Which?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 3}]
    assert read("letters-medicine", rows, tmp_path) == [("Which? A. w B. x C. y D. z", "D")]


def test_operations_sentences_and_subjects(tmp_path):
    rows = [
        {"body": "Ann has 3 pens.", "question": "She finds 4. How many?", "answer": "7 (pens)"},
        {"body": "Ann has 3 pens.", "question": "How many are 2 and 4?", "answer": "9 (pens)"},
    ]
    found = read("operation-asdiv", rows, tmp_path)
    assert found == [("Ann has 3 pens. She finds 4. How many?", "add")]
    rows = [{"question": "Each of 3 boys has 5 .", "answer": 15.0}]
    assert read("operation-mawps", rows, tmp_path) == [("Each of 3 boys has 5 .", "multiply")]
    rows = [
        {"sentences": ["We try.", "It works.", "2019."], "labels": ["method", "result", "other"]}
    ]
    wanted = [("We try.", "method"), ("It works.", "result")]
    assert read("role-abstracts", rows, tmp_path) == wanted
    rows = [{"question": "What is a rule?", "subject": "jurisprudence"}]
    assert read("subject-law", rows, tmp_path) == [("What is a rule?", "theory")]


def test_tasks_of_one_set_of_labels_share_their_instruction():
    asked = {}
    for task in LABELLED.values():
        if task.role in ("hub", "sentiment"):
            asked.setdefault(task.name.split("-")[0], []).append(task.instruction)
    assert {family: len(asked[family]) for family in ("sentiment", "entity", "operation")} == {
        "sentiment": 11,
        "entity": 2,
        "operation": 2,
    }
    for family in ("sentiment", "entity", "operation"):
        assert len(set(asked[family])) == 1, family
    # Others differ in the labels that they name.
    assert len(set(asked["topic"])) == len(asked["topic"]) == 4
