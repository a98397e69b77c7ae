"""Packaging of nemo_tiedlora; the exact versions it is tested with are in requirements.txt."""

from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
#: What a user copies is at the top of the checkout, and in the package once that is installed.
SCRIPTS = {"nemo_tiedlora.conf": "conf", "nemo_tiedlora.examples": "examples"}

#: Methods on torch models, and their files: safetensors writes torch's tensors with numpy.
CORE = ["torch>=2.6", "safetensors", "numpy"]
#: The tiedlora command.
CLI = ["matplotlib", "pyyaml", "rich", "typer>=0.12.5"]
#: Models of transformers: adapters on them, and they as bases. accelerate: for Trainer.
HF = [*CLI, "accelerate>=0.26", "sentencepiece", "tokenizers", "transformers>=4.51,<5"]
#: The benchmark suite.
SUITE = [
    *CLI,
    "datasets<4",
    "gymnasium>=1.0",
    "jinja2",
    "pyarrow",
    "rouge_score",
    "ruamel.yaml",
    "sacrebleu",
    "scikit-learn",
    "scipy",
]
#: NeMo and all that runs on it, the suite among them.
NEMO = [
    *HF,
    *SUITE,
    "nemo_toolkit>=2.4,<2.5",
    "megatron-core>=0.13,<0.14",
    "lightning>=2.4,<2.5",
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.3,<2.4",
    "numpy<2",
    "packaging",
    "pybind11",
    "tensorboard",
]
GGUF = ["gguf>=0.17"]  # for quantised weights in GGUF files, smollm2's among them
LM_EVAL = ["lm_eval>=0.4.13,<0.5"]
PEFT = ["peft>=0.21"]  # for its own methods in the benchmark suite

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
    entry_points={"console_scripts": ["tiedlora = nemo_tiedlora.__main__:main"]},
    # The code fits these; requirements.txt says exactly what it is tested with, and what NeMo needs besides.
    install_requires=CORE,
    extras_require={
        "cli": CLI,
        "hf": HF,
        "suite": SUITE,
        "nemo": NEMO,
        "gguf": GGUF,
        "lm_eval": LM_EVAL,
        "peft": PEFT,
        "test": [*NEMO, *GGUF, *LM_EVAL, *PEFT, "pytest", "pytest-xdist", "mypy", "ruff", "trl"],
    },
)
