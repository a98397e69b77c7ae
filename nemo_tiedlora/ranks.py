"""What a launcher says of this process, before there is a process group to ask."""

import os


def is_first_rank() -> bool:
    """Whether this process is the first of its job (as NeMo reads it)."""
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        if name in os.environ:
            return int(os.environ[name]) == 0
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return int(node) == int(os.environ.get("LOCAL_RANK", "0")) == 0


def launched() -> int | None:
    """How many processes the job has; None if no launcher says."""
    sizes = (os.environ.get(name) for name in ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    return next((int(size) for size in sizes if size), None)
