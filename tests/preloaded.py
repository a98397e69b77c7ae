"""What a forked process begins with: NeMo, imported as scripts import it, and nothing patched."""

import os

nowhere = os.open(os.devnull, os.O_RDWR)
for stream in (1, 2):  # the import has much to say, and each process gets streams of its own
    os.dup2(nowhere, stream)

from nemo_tiedlora import platform  # noqa: E402

with platform.host():
    import nemo_tiedlora.nemo.hooks
    import nemo_tiedlora.nemo.model
    import nemo_tiedlora.nemo.workbench  # noqa: F401
