"""Cells on host hf, in this process."""

from dataclasses import replace

from benchmark_suite.backends import backend
from benchmark_suite.backends.protocol import Training  # noqa: F401
from benchmark_suite.runner import sweep as sweeping
from benchmark_suite.runner.runner import Runner
from benchmark_suite.variant_spec import VariantSpec

#: LoRA+ has a part in the optimizer's steps.
LORA_PLUS = VariantSpec(
    name="LoRA+", description="B learns faster.", scheme="tied_lora", ranks=[4],
    settings={"preset": "LoRA", "lr_ratio": 8.0},
)  # fmt: skip


def swept(base, results, variants, tasks, data_root=None, host="hf", precision="32", limit=16, head=None, **recipe):
    """Results and cells of variants, by name or as they are, on tasks; ``recipe`` has what replaces the tasks'."""
    with_data = sweeping.tasks_named(tasks, data_root, limit)
    for task in with_data.values():
        task.spec = replace(task.spec, recipe=replace(task.spec.recipe, **{"val_interval": 4} | recipe))
    on = backend(host, base, precision)
    named = [each if isinstance(each, VariantSpec) else sweeping.variants_named([each], on)[0] for each in variants]
    with Runner(on, results, with_data) as runner:
        cells = sweeping.matrix(with_data, named, on, None, [3], [1e-2], limit, head)
        return sweeping.sweep(runner, cells, show=False), cells
