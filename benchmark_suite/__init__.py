"""The benchmark suite: every variant of the adapters on the papers' tasks, and the report on what came out."""
