"""Package metadata of learnware_jax; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "test": [
        *("pytest>=8.4", "pytest-xdist>=3.6", "beartype>=0.19", "ruff>=0.11", "POT>=0.9.5"),
        *("hypothesis>=6.100", "cryptography>=43", "dp-accounting>=0.6"),
        *("pyright[nodejs]>=1.1.414", "jupytext>=1.16", "nbclient>=0.10", "ipykernel>=6.29"),
        # The documentation, which tests build.
        *("mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"),
        "latex2mathml>=3.77",
    ],
    "privacy": ["dp-accounting>=0.6"],  # private fits in batches
    "sign": ["cryptography>=43"],  # signatures of learnwares
    "fuzz": ["atheris>=3.0"],
    "package": ["build>=1.2", "uv>=0.5"],  # scripts/check_package.py
    "notebooks": ["jupytext>=1.16", "nbclient>=0.10", "ipykernel>=6.29"],
    "interop": ["learnware>=0.4.0.post1", "fast_pytorch_kmeans>=0.2", "peft>=0.18"],
    "parity": ["torch>=2.6", "transformers>=5.17,<6", "llama-cpp-python>=0.3", "peft>=0.18"],
    "eval": ["lm_eval>=0.4.13"],
    # Peers for `make bench`, besides those in parity. The learnware package brings torch.
    "bench": ["goodpoints>=0.6", "coreax>=1.0", "learnware>=0.4.0.post1", "fast_pytorch_kmeans"],
}

setup(
    name="learnware_jax",
    version="0.1.0",
    description="Specifications of what models are for, and docks that rank models by them",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The learnware_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords="learnware, model selection, kernel mean embedding, MMD, LoRA, JAX",
    # Experiments and their configurations are run from a clone: they read its docks and results.
    packages=find_packages(include=["learnware_jax", "learnware_jax.*"]),
    package_data={"learnware_jax": ["py.typed"]},
    install_requires=[
        "absl-py>=2.1",
        "datasets>=4.0",
        "filelock>=3.13",
        "flax>=0.12.8,<0.13",
        "gguf>=0.17",
        "huggingface_hub>=0.30",
        "jax>=0.10.2,<0.13",
        "jaxtyping>=0.3",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "pandas>=2.2",
        "pip>=23",  # dock.materials runs it to fetch models and texts
        "platformdirs>=4",
        "pyyaml>=6",
        "rank-bm25>=0.2.2",
        "rich>=14",
        "safetensors>=0.5",
        "scikit-learn>=1.8",
        "scipy>=1.13",
        "tensorboardX>=2.6",
        "tokenizers>=0.21",
    ],
    extras_require=EXTRAS,
)
