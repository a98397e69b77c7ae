"""Metrics: from predictions and examples to a value, a count and, where it exists, a value for each example.

Every value is a fraction (0 to 1) or a correlation (-1 to 1), except BLEU (0 to 100), as their own papers print them.
"""

from benchmark_suite.metrics import numbers, ranking, texts
from benchmark_suite.metrics.score import Kind, Metric, Score

#: Metric name → what it is for, and how it is computed.
METRICS: dict[str, Metric] = {
    "exact_match": Metric("generate", texts.exact_match),
    "squad_em": Metric("generate", texts.squad_em),
    "squad_f1": Metric("generate", texts.squad_f1),
    "rouge1": Metric("generate", texts.rouge("rouge1")),
    "rouge2": Metric("generate", texts.rouge("rouge2")),
    "rougeL": Metric("generate", texts.rouge("rougeL")),
    "bleu": Metric("generate", texts.bleu, scale=1.0, reward=texts.sentence_bleu, combine=texts.bleu_of_counts),
    "option_accuracy": Metric("generate", texts.option_accuracy, choices=True),
    "final_number": Metric("generate", numbers.final_number),
    "last_number": Metric("generate", numbers.last_number),
    "pearson": Metric("generate", numbers.pearson, reward=numbers.closeness, combine=numbers.pearson_of_sums),
    "spearman": Metric("generate", numbers.spearman, reward=numbers.closeness),
    "acc": Metric("rank", ranking.acc, choices=True),
    "acc_norm": Metric("rank", ranking.acc_norm, choices=True),
    "f1": Metric("rank", ranking.f1, reward=ranking.correct, choices=True, combine=ranking.f1_of_counts),
    "mcc": Metric("rank", ranking.mcc, reward=ranking.correct, choices=True, combine=ranking.mcc_of_counts),
}

__all__ = ["METRICS", "Kind", "Metric", "Score"]
