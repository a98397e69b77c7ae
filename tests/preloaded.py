"""What a forked process begins with: NeMo, imported as scripts import it, and nothing patched."""

import os

nowhere = os.open(os.devnull, os.O_RDWR)
for stream in (1, 2):  # the import has much to say, and each process gets streams of its own
    os.dup2(nowhere, stream)

from nemo_tiedlora import platform  # noqa: E402

with platform.host():
    pass
