"""Everything that knows NeMo: adapters, their configs, and the jobs that train and use them."""
