"""Package metadata; tools are configured in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

CUDA = ["jax[cuda13]>=0.10.2,<0.13"]
TORCH = ["torch>=2.6"]  # Only for pytorch_model*.bin and for parity tests.
DATA = ["pyarrow>=17", "tensorflow-datasets>=4.9.8"]
NOTEBOOKS = ["ipykernel>=6", "nbclient>=0.10", "nbformat>=5.10"]
DEV = ["hypothesis>=6.100", "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12", *NOTEBOOKS]

setup(
    name="mil_jax",
    version="0.1.0",
    description="The Mamba in the Llama in JAX: distil hybrids, decode them fast",
    long_description=(Path(__file__).parent / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mil_jax*", "pallas_kernels*"]),
    package_data={"mil_jax": ["assets/*/*"]},
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",
        "flax>=0.12,<0.13",
        "grain>=0.2.12",
        "huggingface_hub>=1.0",
        "jax>=0.10.2,<0.13",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12,<0.13",
        "rich>=13",
        "safetensors>=0.6",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tiktoken>=0.9",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "transformers>=5.0,<6",
    ],
    extras_require={
        "cuda": CUDA,
        "torch": TORCH,
        "data": DATA,
        "notebooks": NOTEBOOKS,
        "dev": DEV,
    },
)
