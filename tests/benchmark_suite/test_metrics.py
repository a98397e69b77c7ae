"""Metrics against the official scripts' rules, written out as cases, and against their libraries."""

import pytest
import sacrebleu

from benchmark_suite.example import Example
from benchmark_suite.metrics import METRICS
from benchmark_suite.metrics.numbers import final_answer, last_answer, number
from benchmark_suite.metrics.texts import first_option, squad_match, squad_normalised, squad_overlap


def example(*references, choices=(), label=None):
    return Example("", "", references[0] if references else "", references, choices, label)


def value(metric, predictions, examples):
    return METRICS[metric].compute(predictions, examples).value


@pytest.mark.parametrize(
    ("prediction", "reference", "match", "overlap"),
    [
        ("The Eiffel Tower!", "eiffel tower", True, 1),
        ("an  apple\n", "apple", True, 1),
        ("10,000", "10000", True, 1),
        ("U.S.A.", "usa", True, 1),
        ("theatre", "atre", False, 0),
        ("forty lanterns", "forty", False, 2 / 3),
        ("cat cat", "cat", False, 2 / 3),
        ("", "forty", False, 0),
        ("the", "a", True, 0),  # both empty: the same, but with no word in common
        ("well-known", "well known", False, 0),
        ("£5", "5", False, 0),  # the script knows ASCII punctuation only
    ],
)
def test_squad_normalises_as_its_official_script(prediction, reference, match, overlap):
    assert squad_match(prediction, reference) is match
    assert squad_overlap(prediction, reference) == pytest.approx(overlap)


def test_squad_takes_the_best_of_several_answers():
    asked = example("forty", "forty lanterns")
    assert value("squad_em", ["Forty lanterns."], [asked]) == 1
    assert METRICS["squad_f1"].compute(["forty old lanterns", ""], [asked, asked]).per_example == (0.8, 0)
    assert squad_normalised("A an the THE") == ""


@pytest.mark.parametrize(
    ("text", "final", "last"),
    [
        ("... so 18\n#### 18", "18", "18"),
        ("#### 1,200", "1200", "1200"),
        ("#### -5", "-5", "-5"),
        ("#### 3.50 dollars", "3.50", "3.50"),
        ("#### 18.", "18.", "18"),
        ("#### 7\n#### 8", "7", "8"),
        ("####18", None, "18"),
        ("#### $18", None, "18"),
        ("the answer is $1,024", None, "1024"),
        ("either 3 or 4", None, "4"),
        ("", None, None),
        ("nothing", None, None),
    ],
)
def test_gsm8k_answers_are_extracted_as_by_the_official_script_and_the_harness(text, final, last):
    assert (final_answer(text), last_answer(text)) == (final, last)


def test_gsm8k_scores_compare_text_not_value():
    asked = [example("work\n#### 1,200")] * 4
    score = METRICS["final_number"].compute(["#### 1200", "#### 1,200", "#### 1200.0", "1200"], asked)
    assert score.per_example == (1, 1, 0, 0) and score.value == 0.5 and score.count == 4
    assert value("last_number", ["so $1,200."], asked[:1]) == 1
    assert value("last_number", [""], asked[:1]) == value("final_number", [""], asked[:1]) == 0


def test_bleu_is_sacrebleus_with_its_signature():
    predictions = ["The dog sleeps long today.", "We build a small boat."]
    first, second = ["The dog sleeps long today.", "We are building a small boat."], [None, "We build a tiny boat."]
    expected = sacrebleu.corpus_bleu(predictions, [first, second])
    examples = [example(first[0]), example(first[1], second[1])]
    score = METRICS["bleu"].compute(predictions, examples)
    assert score.value == pytest.approx(expected.score)
    assert "tok:13a" in score.signature and "version:" in score.signature


def test_rouge_is_the_best_reference_and_stems():
    score = METRICS["rougeL"].compute(["dogs run", ""], [example("cats sleep", "a dog runs"), example("x")])
    assert score.per_example == (0.8, 0) and "stemmer:yes" in score.signature
    assert value("rouge2", ["a b c"], [example("a b d")]) == pytest.approx(0.5)


def test_correlations_take_what_is_no_number_for_minus_one():
    examples = [example("1"), example("2"), example("3.0")]
    assert value("pearson", ["1.0", " 2", "3"], examples) == pytest.approx(1)
    assert value("spearman", ["1", "20", "300"], examples) == pytest.approx(1)
    assert value("pearson", ["5", "5", "5"], examples) == 0
    assert [number(text) for text in ("", "five", "nan", "inf", "2.5")] == [-1, -1, -1, -1, 2.5]


def test_ranking_raw_and_per_character():
    asked = example(choices=("no", "yes indeed"), label=1)
    assert value("acc", [(-3.0, -4.0)], [asked]) == 0 and value("acc_norm", [(-3.0, -4.0)], [asked]) == 1
    assert value("acc", [(-3.0, -3.0)], [asked]) == 0  # a tie goes to the first
    examples = [example(choices=("no", "yes"), label=label) for label in (1, 1, 0, 0)]
    said_yes, said_no = (-2.0, -1.0), (-1.0, -2.0)
    assert value("f1", [said_yes, said_no, said_no, said_no], examples) == pytest.approx(2 / 3)
    assert value("mcc", [said_no] * 4, examples) == value("f1", [said_no] * 4, examples) == 0


def test_options_are_found_as_by_llm_adapters():
    options = ("answer1", "answer2")
    assert first_option("the correct answer is answer2, not answer1", options) == "answer2"
    assert first_option("Answer2", options) == "" and first_option("", options) == ""
    assert value("option_accuracy", ["false? true"], [example(choices=("true", "false"), label=1)]) == 1
