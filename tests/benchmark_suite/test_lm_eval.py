"""Prompts, choices and scores against lm-evaluation-harness, on the same rows and log-likelihoods."""

from functools import cache
from pathlib import Path
from random import Random

import pytest
from suite_rows import ROWS

import benchmark_suite

lm_eval = pytest.importorskip("lm_eval")

#: Task → the harness's own declaration of it.
RANKED = {
    "boolq-v1": "super_glue/boolq/default.yaml",
    "piqa-v1": "piqa/piqa.yaml",
    "siqa-v1": "siqa/siqa.yaml",
    "hellaswag-v1": "hellaswag/hellaswag.yaml",
    "winogrande-v1": "winogrande/default.yaml",
    "arc-easy-v1": "arc/arc_easy.yaml",
    "arc-challenge-v1": "arc/arc_easy.yaml",
    "openbookqa-v1": "openbookqa/openbookqa.yaml",
    "sst2-v1": "glue/sst2/default.yaml",
    "mrpc-v1": "glue/mrpc/default.yaml",
    "cola-v1": "glue/cola/default.yaml",
    "qnli-v1": "glue/qnli/default.yaml",
    "rte-v1": "glue/rte/default.yaml",
    "qqp-v1": "glue/qqp/default.yaml",
    "mnli-v1": "glue/mnli/default.yaml",
}


def harness(declaration, rows):
    """The harness's task over given rows instead of a download."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config = dict(_declared(declaration))
    data = {split: Dataset.from_list(rows) for split in ("train", "validation", "validation_matched", "test")}
    for name in ("tag", "dataset_path", "dataset_name"):
        config.pop(name, None)
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: data})


@cache
def _declared(declaration):
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(Path(lm_eval.__file__).parent / "tasks" / declaration)


@pytest.mark.parametrize("id", RANKED)
def test_ranked_tasks_are_the_harness_own(id, data_root):
    ours = benchmark_suite.load_task(id, data_root)
    rows = ROWS[ours.spec.source.name]
    if id == "boolq-v1":  # the harness reads the SuperGLUE copy
        rows = [row | {"label": int(row["answer"])} for row in rows]
    theirs = harness(RANKED[id], rows)
    draw, predictions, results = Random(id), [], {name: [] for name in ours.spec.metrics}
    for example, row in zip(ours.examples(), theirs.validation_docs(), strict=True):
        context = theirs.doc_to_choice(row) if theirs.multiple_input else theirs.doc_to_text(row)
        instances = theirs.construct_requests(row, context)
        assert [instance.args for instance in instances] == list(example.queries)
        likelihoods = [draw.uniform(-9, -1) for _ in example.choices]
        predictions.append(likelihoods)
        found = theirs.process_results(row, [(value, False) for value in likelihoods])
        for name in results:
            results[name].append(found[name])
    scores = ours.score(predictions)
    for name, values in results.items():
        assert scores[name].value == pytest.approx(theirs.aggregation()[name](values)), name


def test_gsm8k_is_the_harness_own(data_root):
    ours = benchmark_suite.load_task("gsm8k-v1", data_root)
    theirs = harness("gsm8k/gsm8k.yaml", ROWS["gsm8k"])
    rows = list(theirs.test_docs())
    texts = ["#### 1200", "so $1,200.", "", "3, then 1,200", "-2", "#### -2", "#### 2", "a\n#### 1,200\n5"]
    for example, row in zip(ours.examples(), rows, strict=True):
        assert example.prompt == theirs.doc_to_text(row) and example.target == theirs.doc_to_target(row)
        for text in texts:
            for metric, chosen in (("final_number", "strict-match"), ("last_number", "flexible-extract")):
                extract = next(each for each in theirs._filters if each.name == chosen)
                answer = extract.filters[0]().apply([[text]], [row])[0][0]
                expected = theirs.process_results(row, [answer])["exact_match"]
                task = benchmark_suite.load_task("gsm8k-v1", data_root)
                score = benchmark_suite.metrics.METRICS[metric].compute([text], [example])
                assert score.value == expected, (metric, text, task.spec.id)


def test_translation_prompt_follows_the_harness(data_root):
    example = benchmark_suite.load_task("iwslt2017-de-en-v1", data_root).examples()[0]
    config = _declared("translation/iwslt2017_ar-en.yaml")
    template = config["doc_to_text"].replace("Arabic", "German").replace('"ar"', '"de"')
    from lm_eval.utils import apply_template

    assert example.prompt == apply_template(template, ROWS["iwslt2017_de_en"][0])
