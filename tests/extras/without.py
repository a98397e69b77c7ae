"""python without.py MODULE,MODULE… SCRIPT ARGUMENTS: run a script, or -m and a module, without modules."""

import runpy
import sys

missing = set(sys.argv[1].split(","))


class Finder:
    """One of Python's, which finds no missing module."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        """As the finder's."""
        return None if name.partition(".")[0] in missing else self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
del sys.argv[:2]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
