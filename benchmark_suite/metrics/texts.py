"""Metrics of generated text."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from benchmark_suite.example import Example
from benchmark_suite.metrics.score import Compute, Score, mean

if TYPE_CHECKING:
    import numpy


def exact_match(predictions: Sequence[str], examples: Sequence[Example]) -> Score:
    """Whether the prediction is one of the references, blanks around it aside."""
    return mean([_pair(_same, *pair) for pair in zip(predictions, examples, strict=True)])


def squad_em(predictions: Sequence[str], examples: Sequence[Example]) -> Score:
    """Exact match of SQuAD v1.1's official script (Rajpurkar et al., arXiv:1606.05250), as a fraction."""
    return mean([_pair(squad_match, *pair) for pair in zip(predictions, examples, strict=True)])


def squad_f1(predictions: Sequence[str], examples: Sequence[Example]) -> Score:
    """Word overlap of SQuAD v1.1's official script, as a fraction."""
    return mean([_pair(squad_overlap, *pair) for pair in zip(predictions, examples, strict=True)])


def squad_normalised(answer: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks."""
    lowered = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lowered).split())


def squad_match(prediction: str, reference: str) -> bool:
    """Whether two answers are the same to SQuAD."""
    return squad_normalised(prediction) == squad_normalised(reference)


def squad_overlap(prediction: str, reference: str) -> float:
    """F1 of the words of two answers; 0 where they have none in common, even if both are empty."""
    predicted, expected = squad_normalised(prediction).split(), squad_normalised(reference).split()
    common = sum((Counter(predicted) & Counter(expected)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def rouge(kind: str) -> Compute:
    """ROUGE F-measure (Lin, 2004) by Google's ``rouge_score`` with stemming; the best of several references."""

    def compute(predictions: Sequence[str], examples: Sequence[Example]) -> Score:
        scorer = _rouge_scorer(kind)
        values = [
            scorer.score_multi(example.references, prediction)[kind].fmeasure
            for prediction, example in zip(predictions, examples, strict=True)
        ]
        return mean(values, f"{kind}|f-measure|stemmer:yes|rouge_score:{_version('rouge_score')}")

    return compute


def bleu(predictions: Sequence[str], examples: Sequence[Example]) -> Score:
    """Corpus BLEU (Papineni et al., 2002) by sacrebleu with its defaults, 0 to 100."""
    from sacrebleu.metrics import BLEU

    most = max(len(example.references) for example in examples)
    references = [[_at(example.references, number) for example in examples] for number in range(most)]
    scorer = BLEU()
    # Its types do not say so, but sacrebleu takes None for a reference that a sentence does not have.
    value = scorer.corpus_score(list(predictions), references).score  # type: ignore[arg-type]
    single = [_sentence_bleu(*pair) for pair in zip(predictions, examples, strict=True)]
    counts = tuple((*one.counts, *one.totals, one.sys_len, one.ref_len) for one in single)
    return Score(value, len(examples), counts, str(scorer.get_signature()))


def bleu_of_counts(sums: "numpy.ndarray") -> "numpy.ndarray":
    """Corpus BLEU from matches and totals of 1- to 4-grams and the two lengths, each summed over sentences."""
    import numpy
    from sacrebleu.metrics import BLEU

    def value(row: list[int]) -> float:
        return BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score

    return numpy.array([value(row) for row in sums.astype(int).tolist()])


def sentence_bleu(prediction: str, example: Example) -> float:
    """BLEU of a single sentence, smoothed as sacrebleu does, 0 to 100."""
    return _sentence_bleu(prediction, example).score


def _sentence_bleu(prediction: str, example: Example):
    return _sentence_scorer().sentence_score(prediction, list(example.references))


@cache
def _sentence_scorer():
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


def option_accuracy(predictions: Sequence[str], examples: Sequence[Example]) -> Score:
    """Whether the first choice named in the text is the right one (LLM-Adapters, Hu et al., arXiv:2304.01933)."""
    return mean(
        [
            first_option(prediction, example.choices) == example.choices[example.right]
            for prediction, example in zip(predictions, examples, strict=True)
        ]
    )


def first_option(text: str, options: Sequence[str]) -> str:
    """The first of ``options`` that stands in ``text``, as it is written; empty if none does."""
    found = re.search("|".join(map(re.escape, options)), text)
    return found.group() if found else ""


def _pair(compare, prediction: str, example: Example) -> float:
    return max(float(compare(prediction, reference)) for reference in example.references)


def _same(prediction: str, reference: str) -> bool:
    return prediction.strip() == reference.strip()


def _at(references: Sequence[str], number: int) -> str | None:
    # sacrebleu's way to say that a sentence has fewer references than another one
    return references[number] if number < len(references) else None


@cache
def _rouge_scorer(kind: str):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=True)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
