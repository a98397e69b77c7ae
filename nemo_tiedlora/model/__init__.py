"""A GPT seen from outside: its linear layers, their sizes, and the config in its ``.nemo``. No host is imported."""
