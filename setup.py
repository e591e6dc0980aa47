"""wan_jax: Wan2.1 video generation in JAX. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FACE = (ROOT / "wan_jax" / "__init__.py").read_text(encoding="utf-8")
GCS = "gcsfs>=2024.6"
VERSION = re.search(r'__version__ = "(.+)"', FACE)
assert VERSION is not None

setup(
    name="wan_jax",
    version=VERSION.group(1),
    description="Wan2.1 video generation in JAX and Flax, for GPUs and TPUs",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["wan_jax", "wan_jax.*"]),
    # Folders that are links are packaged as what they point to.
    package_data={"wan_jax": ["assets/*", "assets/*/*", "assets/*/*/*"]},
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12,<0.13",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12.8,<0.13",
        "numpy>=2.0",
        "absl-py>=2.1",
        "etils[epath]>=1.9",
        "ftfy>=6.1",
        "huggingface_hub>=1.0",
        "imageio[ffmpeg]>=2.34",
        "pillow>=10.3",
        "safetensors>=0.5",
        "tokenizers>=0.20",
        "tqdm>=4.66",
        "zstandard>=0.22",  # jax packs compiled programs with it; with zlib that takes seconds
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2,<0.13", "nvidia-cudnn-cu13>=9.19"],
        "tpu": ["jax[tpu]>=0.10.2,<0.13", GCS],
        "gcs": [GCS],  # gs:// paths
        "train": ["tensorboardX>=2.6"],  # --tensorboard
        # torch is pinned to the release with a CPU build that the parity bounds were set on.
        "test": [
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "torch==2.13.0",
            "diffusers==0.42.1",
            "accelerate==1.15.0",
            "peft==0.21.2",  # with which diffusers loads LoRAs
            "transformers==5.23.0",
            "gcsfs==2026.10.1",
            "tensorboardX==2.6.5",
            'libtpu==0.0.52; sys_platform == "linux"',
        ],
    },
)
