"""``python -m nemo_tiedlora``: the ``tiedlora`` command, for launchers that take a module."""

from nemo_tiedlora import console, extras


def main() -> None:
    """Entry point: the command, which itself comes with an extra."""
    try:
        from nemo_tiedlora import cli
    except ModuleNotFoundError as error:
        if not (known := extras.lacking(error)):
            raise
        console.refuse(known)
    cli.main()


if __name__ == "__main__":
    main()
