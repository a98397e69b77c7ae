"""How a process computes on a CPU that it may have to share."""

import os


def wait_passively() -> None:
    """Let idle OpenMP threads sleep instead of spin; call it before torch is imported.

    A spinning thread takes a core from the one it waits for: beside any other load, a step of a small model takes
    many times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as libgomp has it: in Turkish, "I" is no capital of "i"


def use_one_thread() -> None:
    """Compute on one thread unless ``OMP_NUM_THREADS`` says otherwise, for models whose operators are too small to
    share, such as the built-in base."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)
