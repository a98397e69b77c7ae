"""The most memory that a block of code held."""

import threading
from pathlib import Path


class PeakMemory:
    """On a GPU, what torch allocated there at most; else the largest resident size of this process, looked at often.

    Attributes:
        bytes: after the block.
    """

    def __enter__(self):
        import torch

        self.bytes = 0
        self._cuda = torch.cuda.is_available() and torch.cuda.device_count() > 0
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._over = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self):
        import resource

        page = resource.getpagesize()
        while not self._over.wait(0.05):
            self.bytes = max(self.bytes, int(Path("/proc/self/statm").read_text().split()[1]) * page)

    def __exit__(self, *_):
        if self._cuda:
            import torch

            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self._over.set()
            self._thread.join()
