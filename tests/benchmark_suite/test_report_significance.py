"""The tests between variants against independent computations."""

from itertools import product
from types import SimpleNamespace

import numpy
import pytest
import scipy.stats
from report_results import metric, write

from benchmark_suite.example import Example
from benchmark_suite.metrics import METRICS
from benchmark_suite.report.cells import load
from benchmark_suite.report.comparisons import compare
from benchmark_suite.report.pareto import front
from benchmark_suite.report.section import sections
from benchmark_suite.report.significance import bootstrap, holm, permutation, t_test


def resampled(differences, resamples=20_000):
    """Textbook draws: of examples by their indices; of what seeds change, Student's t around the observed mean.

    Args:
        differences: (seeds, examples).
    """
    generator = numpy.random.default_rng(99)
    values = numpy.atleast_2d(numpy.array(differences, dtype=float))
    seeds, number = values.shape
    drawn = [values[:, generator.integers(number, size=number)].mean() for _ in range(resamples)]
    spread = scipy.stats.sem(values.mean(1)) if seeds > 1 else 0.0
    found = numpy.array(drawn) + spread * scipy.stats.t.rvs(max(1, seeds - 1), size=resamples, random_state=generator)
    p = (abs(found - values.mean()) >= abs(values.mean()) - 1e-12).mean()
    return p, *numpy.quantile(found, [0.025, 0.975])


def means(differences):
    """What ``bootstrap`` takes for a mean of differences, (seeds, examples)."""
    values = numpy.atleast_2d(differences).T
    return numpy.column_stack([values, numpy.ones(len(values))]), lambda sums: sums[:, :-1] / sums[:, -1:]


@pytest.mark.parametrize("kind", ["binary", "continuous", "equal", "seeds"])
def test_bootstrap_agrees_with_drawing_indices(kind):
    generator = numpy.random.default_rng(5)
    differences = {
        "binary": generator.choice([-1, 0, 1], size=80, p=[0.1, 0.6, 0.3]),
        "continuous": generator.normal(0.1, 0.5, size=60),
        "equal": numpy.zeros(10),
        "seeds": generator.choice([-1, 0, 1], size=(4, 80), p=[0.1, 0.6, 0.3]) + generator.normal(0, 0.1, size=(4, 1)),
    }[kind]
    found = bootstrap(*means(differences))
    p, low, high = resampled(differences)
    examples, seeds = differences.shape[-1], len(numpy.atleast_2d(differences))
    assert found.difference == pytest.approx(differences.mean()) and (found.examples, found.seeds) == (examples, seeds)
    assert found.p == pytest.approx(p, abs=0.01)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert bootstrap(*means(differences)) == found


def test_where_all_examples_agree_it_is_the_t_test_over_seeds():
    by_seed = numpy.array([3.0, 20.0, 37.0])
    found = bootstrap(*means(numpy.repeat(by_seed[:, None], 50, axis=1)))
    expected = scipy.stats.ttest_1samp(by_seed, 0)
    interval = expected.confidence_interval()
    assert found.p == pytest.approx(expected.pvalue, abs=1e-3) and found.p > 0.15
    assert (found.low, found.high) == (pytest.approx(interval.low, rel=0.01), pytest.approx(interval.high, rel=0.01))


def test_bootstrap_of_a_certain_difference_is_the_least_that_resamples_can_tell():
    assert bootstrap(*means([1.0] * 50)).p == 1 / 10_001


@pytest.mark.parametrize("seeds", [1, 3])
def test_bootstrap_rarely_finds_what_is_not_there(seeds):
    """Runs of one method, whose seeds differ by some points in truth; each as a method of its own."""
    generator = numpy.random.default_rng(1)
    spread = 0.05 if seeds > 1 else 0.0
    found = []
    for _ in range(200):
        right = generator.random((2, seeds, 200)) < 0.6 + generator.normal(0, spread, size=(2, seeds, 1))
        found.append(bootstrap(*means(1.0 * right[0] - right[1])).p < 0.05)
    assert sum(found) <= 20


def test_bootstrap_finds_what_is_there():
    generator = numpy.random.default_rng(1)
    right = generator.random((2, 3, 400)) < numpy.array([0.7, 0.5])[:, None, None]
    assert bootstrap(*means(1.0 * right[0] - right[1])).p < 0.05


def test_permutation_is_mcnemar_s_exact_test_of_right_and_wrong():
    for better, worse in ((3, 0), (7, 1), (8, 8), (5, 2)):
        differences = [1.0] * better + [-1.0] * worse + [0.0] * 100
        expected = scipy.stats.binomtest(better, better + worse).pvalue
        assert permutation(differences) == pytest.approx(expected)
    assert permutation([0.0] * 5) == 1.0 and permutation([1.0] * 17) is None


def test_permutation_agrees_with_scipy_on_values_of_any_size():
    values = numpy.random.default_rng(8).normal(0.4, 1, size=9)
    expected = scipy.stats.permutation_test(
        (values, numpy.zeros(9)), lambda a, b: numpy.mean(a - b), permutation_type="samples"
    )
    assert permutation(values) == pytest.approx(expected.pvalue)


def test_t_test_agrees_with_the_formula():
    first, second = [3.0, 4.5, 5.1], [2.0, 4.0, 4.9]
    differences = numpy.subtract(first, second)
    t = differences.mean() / (differences.std(ddof=1) / 3**0.5)
    assert t_test(first, second) == pytest.approx(2 * scipy.stats.t.sf(abs(t), 2))
    assert t_test([1.0], [2.0]) is None and t_test([1.0, 2.0], [2.0, 3.0]) is None


def test_holm_by_hand():
    # 0.01·4, then 0.02·3, then 0.03·2 = 0.06 (not below the one before), then 0.04·1 raised to 0.06
    assert holm([0.04, 0.01, None, 0.03, 0.02]) == pytest.approx([0.06, 0.04, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([None]) == [None] and holm([]) == []


@pytest.mark.parametrize("higher", [True, False])
def test_pareto_front_agrees_with_brute_force(higher):
    generator = numpy.random.default_rng(2)
    sign = 1 if higher else -1
    for _ in range(50):
        points = [(int(size), int(score)) for size, score in generator.integers(1, 8, size=(12, 2))]
        settings = [
            SimpleNamespace(mean=lambda _, size=size: size, score=SimpleNamespace(mean=score), higher_is_better=higher)
            for size, score in points
        ]
        expected = sorted(
            (size, score)
            for size, score in points
            if not any(
                other <= size and sign * better >= sign * score and (other, better) != (size, score)
                for other, better in points
            )
        )
        assert sorted((at.mean(""), at.score.mean) for at in front(settings)) == expected
    assert front([]) == []


def comparison(folder):
    (section,) = sections(load(folder).cells, "LoRA")
    (found,) = compare(section.reported, "LoRA")
    return found


def test_examples_are_paired_over_the_seeds_that_both_have(tmp_path):
    generator = numpy.random.default_rng(3)
    examples = {key: generator.integers(0, 2, size=40) for key in product(("LoRA", "TL6"), (0, 1, 2))}
    for (variant, seed), of in examples.items():
        if (variant, seed) != ("LoRA", 2):
            write(tmp_path / f"{variant}{seed}", of.tolist(), variant=variant, seed=seed)
    found = comparison(tmp_path)
    percent = {variant: 100 * (examples[variant, 0] + examples[variant, 1]) / 2 for variant in ("LoRA", "TL6")}
    by_seed = [100 * (examples["TL6", seed] - examples["LoRA", seed]) for seed in (0, 1)]
    p, low, high = resampled(by_seed)
    assert found.seeds == (0, 1) and found.bootstrap.examples == 40
    assert found.difference == pytest.approx((percent["TL6"] - percent["LoRA"]).mean())
    assert found.bootstrap.difference == pytest.approx(found.difference)
    assert found.bootstrap.p == pytest.approx(p, abs=0.02) and found.bootstrap.low == pytest.approx(low, rel=0.15)
    sides = [[100 * examples[variant, seed].mean() for seed in (0, 1)] for variant in ("TL6", "LoRA")]
    assert found.t_test_p == pytest.approx(scipy.stats.ttest_rel(*sides).pvalue)


def test_three_examples_that_differ_prove_nothing(tmp_path):
    write(tmp_path / "a", [1] * 40 + [0] * 3, variant="LoRA")
    write(tmp_path / "b", [1] * 43, variant="TL6")
    found = comparison(tmp_path)
    assert found.bootstrap.p == pytest.approx(0.25), "one exchange of eight is as extreme, and its mirror image"
    assert found.seeds == (0,) and found.t_test_p is None


def test_why_there_is_no_bootstrap(tmp_path):
    write(tmp_path / "a", [1, 0, 1], variant="LoRA")
    other = write(tmp_path / "b", [1, 0, 0], variant="TL6")
    predictions = other / "predictions.jsonl"
    lines = predictions.read_text()
    for text, reason in {
        lines.replace('"id": 2', '"id": 7'): "different test examples",
        lines.replace("exact_match", "f1"): "no 'exact_match' per example",
        lines.replace("100}", "0}"): "examples and score disagree",
        lines.splitlines()[0]: "1 predictions for 3 examples",
        lines.replace('"id": 2', '"id": 1'): "2 predictions for 3 examples",
        "{": "broken predictions",
    }.items():
        predictions.write_text(text)
        found = comparison(tmp_path)
        assert found.bootstrap is None and found.why_not == reason
        assert found.difference == pytest.approx(-100 / 3)
    predictions.unlink()
    assert comparison(tmp_path).why_not == "no predictions"


def test_scores_of_no_example_at_all_are_not_compared(tmp_path):
    write(tmp_path / "a", [1, 0, 1], variant="LoRA")
    write(tmp_path / "b", variant="TL6", metrics={"exact_match": metric(0.0, count=0)})
    assert comparison(tmp_path).why_not == "broken predictions"


@pytest.mark.parametrize("metric_name", ["mcc", "f1", "pearson", "bleu"])
def test_metrics_of_a_corpus_are_resampled_as_such(tmp_path, metric_name):
    """Against drawing indices and asking the metric itself."""
    generator = numpy.random.default_rng(4)
    kind, count = METRICS[metric_name], 40
    examples, predicted = corpus(metric_name, generator, count)
    computed = {key: kind.compute(predictions, examples) for key, predictions in predicted.items()}
    for (variant, seed), score in computed.items():
        value, each = {metric_name: metric(score.value, count)}, [list(one) for one in score.per_example]
        write(tmp_path / f"{variant}{seed}", each, variant=variant, seed=seed, primary=metric_name, metrics=value)
    found = comparison(tmp_path).bootstrap

    def difference(drawn):
        of = {
            key: kind.compute([own[at] for at in drawn], [examples[at] for at in drawn]).value
            for key, own in predicted.items()
        }
        return of["TL6", 0] - of["LoRA", 0]

    observed = difference(range(count))
    drawn = numpy.array([difference(generator.integers(count, size=count)) for _ in range(400)])
    scale = 100 if metric_name == "bleu" else 1
    assert found.difference == pytest.approx(observed)
    assert found.low == pytest.approx(numpy.quantile(drawn, 0.025), abs=0.05 * scale)
    assert found.high == pytest.approx(numpy.quantile(drawn, 0.975), abs=0.05 * scale)
    assert found.p == pytest.approx((abs(drawn - observed) >= abs(observed)).mean(), abs=0.06)


def corpus(metric_name, generator, count):
    """Examples, and predictions of two variants: one mostly right, one less so."""

    def noisy(seed, variant):
        return generator.random(count) < (0.8 if variant == "TL6" else 0.6)

    keys = [("LoRA", 0), ("TL6", 0)]
    if metric_name in ("mcc", "f1"):
        labels = generator.integers(0, 2, size=count)
        choices = ("no", "yes")
        examples = [Example("", "", "", (), choices, int(label)) for label in labels]
        right = {key: noisy(*reversed(key)) for key in keys}
        answers = {key: numpy.where(right[key], labels, 1 - labels) for key in keys}
        return examples, {key: [[float(a == 0), float(a == 1)] for a in own] for key, own in answers.items()}
    if metric_name == "pearson":
        truth = generator.normal(2.5, 1, size=count)
        examples = [SimpleNamespace(references=(str(number),)) for number in truth]
        spread = {"LoRA": 1.5, "TL6": 0.7}
        return examples, {
            key: [str(number) for number in truth + generator.normal(0, spread[key[0]], size=count)] for key in keys
        }
    words = numpy.array("the a cat dog sat ran on under mat tree quickly".split())
    sentences = [list(generator.choice(words, size=9)) for _ in range(count)]
    examples = [SimpleNamespace(references=(" ".join(sentence),)) for sentence in sentences]
    rate = {"LoRA": 0.35, "TL6": 0.15}
    return examples, {
        key: [
            " ".join(generator.choice(words) if generator.random() < rate[key[0]] else word for word in sentence)
            for sentence in sentences
        ]
        for key in keys
    }
