"""What stands in for the spawned process behind distributed checkpoints."""

from __future__ import annotations

import multiprocessing
from functools import cache

from nemo_tiedlora.platform.cuda import no_cuda
from nemo_tiedlora.platform.patch import Restore, patch


@patch(needed=no_cuda)
def checkpoint_results_queue(restore: Restore) -> None:
    """megatron-core spawns a process to hold one queue, which re-imports the whole program: seconds per first save.

    It spawns because forking a process that uses CUDA is not safe. Without CUDA a fork does: same queue, same files,
    and scripts need no `if __name__ == "__main__"` guard.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    managers = []
    restore.callback(lambda: [manager.shutdown() for manager in managers])

    @cache
    def results_queue():
        managers.append(multiprocessing.get_context("fork").Manager())
        return managers[0].Queue()

    restore.set(filesystem_async, "_get_write_results_queue", results_queue)
