"""The package: its commands, its bounded dependencies and one extra for each environment.

`requirements/*.txt` are resolved from this file, fully pinned and with hashes: `make lock`.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "trainer/__init__.py").read_text())[1]

CORE = [
    "absl-py>=2.1,<3",
    "bokeh>=3.6,<4",
    "google-cloud-storage>=2.18,<4",
    "google-crc32c>=1.5,<2",
    "jinja2>=3.1,<4",
    "keras>=3.12,<4",
    "numpy>=1.26,<3",
    "protobuf>=5.28,<8",
    "pydantic>=2.12,<3",
    "pyarrow>=17,<27",
    "safetensors>=0.4.3,<1",
    "scikit-learn>=1.5,<2",
    "scipy>=1.13,<2",
    "tensorboard>=2.20,<2.22",
    "tensorflow-datasets>=4.9.7,<5",
    "tokenizers>=0.22,<0.24",
    "tqdm>=4.66,<5",
    "transformers>=5,<6",
]
EXTRAS = {
    # Three distributions of the same import, tensorflow: install one of them.
    "cpu": ["tensorflow-cpu>=2.20,<2.22"],
    "gpu": ["tensorflow[and-cuda]>=2.20,<2.22"],
    # TensorFlow 2.20 speaks version 0.72 of PJRT, and this libtpu 0.73, the nearest one; 0.0.31
    # speaks 0.82, and TensorFlow aborts next to 0.0.34 and newer ones.
    "tpu": ["tensorflow-tpu>=2.20,<2.21", "libtpu>=0.0.20,<0.0.21"],
    # `--runner`: the same commands as Apache Beam pipelines.
    "beam": ["apache-beam[gcp]>=2.70,<3"],
    # `export --formats=onnx`.
    "onnx": ["onnx>=1.19,<2"],
    # `score` in bfloat16 and int8 on CPUs; onnx describes the encoder to OpenVINO.
    "openvino": ["openvino>=2025.3,<2027", "onnx>=1.19,<2"],
    # `submit tpu`, `submit vertex` and `jobs`.
    "cloud": ["google-cloud-aiplatform>=1.148,<2", "google-cloud-tpu>=1.24,<2"],
    # The compiler for TPUs that launch/tpu_compiler.py runs. tensorflow-tpu aborts next to a libtpu
    # this new, so it has an environment of its own. It uses parts of jax that only a lock holds
    # still, hence the narrow bounds.
    "preflight": ["jax>=0.10.2,<0.11", "libtpu>=0.0.52,<0.0.60"],
    # What benchmarks and tests compare against, beside torch itself, and draw with.
    "peers": [
        "torch==2.13.0",
        "accelerate>=1.10,<2",
        "onnx>=1.19,<2",
        "onnxruntime>=1.22,<2",
        "onnxscript>=0.5,<1",
    ],
    "dev": [
        "cryptography>=43,<51",
        "datasets>=4,<6",
        "hypothesis>=6.100,<7",
        "import-linter>=2.7,<3",
        "mypy>=1.15,<3",
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",
        "ruff>=0.12,<0.18",
        "selenium>=4.20,<5",
        "uv>=0.8,<0.14",
    ],
}


class BuildWithLocks(build_py):
    """Puts the locks that jobs on other machines install into the package as well."""

    def run(self) -> None:
        """As of any build."""
        super().run()
        if self.editable_mode:  # The clone itself, where they lie already.
            return
        target = Path(self.build_lib) / "launch" / "requirements"
        target.mkdir(parents=True, exist_ok=True)
        for name in ("beam.txt", "cpu.txt", "gpu.txt", "tpu.txt"):
            shutil.copy(ROOT / "requirements" / name, target / name)


setup(
    name="multihot",
    version=VERSION,
    description="Multi-label BERT training and scoring, from a laptop to a TPU pod",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["launch", "launch.*", "trainer", "trainer.*"]),
    package_data={
        "launch": ["*.json"],
        "launch.machine": ["*.sh"],
        "trainer.reporting": ["templates/*"],
    },
    cmdclass={"build_py": BuildWithLocks},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["multihot=trainer.cli:main"]},
)
