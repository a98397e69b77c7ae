"""Packaging of nemo_tiedlora; the exact versions it is tested with are in requirements.txt."""

from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
#: What a user copies is at the top of the checkout, and in the package once that is installed.
SCRIPTS = {"nemo_tiedlora.conf": "conf", "nemo_tiedlora.examples": "examples"}

setup(
    name="nemo_tiedlora",
    version=run_path(str(HERE / "nemo_tiedlora" / "__init__.py"))["__version__"],
    description="Tied, shared and conditional low-rank adapters for NVIDIA NeMo and Megatron",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=[
        *find_packages(include=["nemo_tiedlora", "nemo_tiedlora.*", "benchmark_suite", "benchmark_suite.*"]),
        *SCRIPTS,
    ],
    package_dir=SCRIPTS,
    package_data={
        "benchmark_suite": ["py.typed", "tasks/*.yaml", "variants/*.yaml", "report/templates/*"],
        "nemo_tiedlora": ["py.typed"],
        "nemo_tiedlora.conf": ["*.yaml"],
        "nemo_tiedlora.embedded": ["base.safetensors", "tokenizer.model"],
    },
    entry_points={"console_scripts": ["tiedlora = nemo_tiedlora.cli:main"]},
    # The code fits these; requirements.txt says exactly what it is tested with, and what NeMo needs besides.
    install_requires=[
        "torch>=2.6",
        "nemo_toolkit>=2.4,<2.5",
        "megatron-core>=0.13,<0.14",
        "lightning>=2.4,<2.5",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "datasets<4",
        "gymnasium>=1.0",
        "jinja2",
        "matplotlib",
        "numpy<2",
        "packaging",
        "pyarrow",
        "pybind11",
        "pyyaml",
        "rich",
        "rouge_score",
        "ruamel.yaml",
        "sacrebleu",
        "safetensors",
        "scikit-learn",
        "scipy",
        "sentencepiece",
        "tensorboard",
        "tokenizers",
        "transformers>=4.51,<5",
        "typer>=0.12.5",
    ],
    extras_require={
        "gguf": ["gguf>=0.17"],  # for quantised weights in GGUF files, smollm2's among them
        "lm_eval": ["lm_eval>=0.4.13,<0.5"],
        "test": ["pytest", "pytest-xdist", "mypy", "ruff", "peft", "lm_eval", "gguf>=0.17", "trl"],
    },
)
