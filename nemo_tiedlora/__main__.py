"""``python -m nemo_tiedlora``: the ``tiedlora`` command, for launchers that take a module."""

from nemo_tiedlora.cli import main

if __name__ == "__main__":
    main()
