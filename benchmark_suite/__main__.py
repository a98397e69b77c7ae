"""``python -m benchmark_suite``."""

from benchmark_suite.cli import main

if __name__ == "__main__":
    main()
