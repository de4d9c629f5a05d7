"""Installs the packages `pipeline` and `sparse_kernels`: `pip install -e .` to use them, `pip install -e .[dev]` to
work on them.

Packages are listed by hand: a bare `find_packages()` would install `tests` and `kernels` as top-level names, and both
names belong to packages that our dependencies look for (torch_fidelity installs `tests`, transformers probes
`kernels`).
"""

from setuptools import setup

CORE = [
    "torch>=2.11",
    "torchvision>=0.26",
    "deepspeed>=0.19",
    "ninja>=1.11",  # DeepSpeed compiles a small C++ op at its first start
    "transformers>=5",
    "accelerate>=1.1",  # transformers asks for it to load a model in ZeRO-3's pieces
    "open_clip_torch>=3.2",
    "taming-transformers==0.0.1",  # taming.modules only; the release pulls pytorch-lightning and omegaconf
    "webdataset>=1.0",
    "fsspec>=2024.2",  # shards behind URLs; s3:// wants s3fs besides, gs:// gcsfs
    "filelock>=3.12",
    "safetensors>=0.5",
    "pycocotools>=2.0.8",
    "scipy>=1.11",
    "mlflow>=3",
    "numpy>=1.26",
    "pillow>=10.1",
    "matplotlib>=3.8",
    "pyyaml>=6",
    "psutil>=5.9",
    "tqdm>=4.66",
]
# Needed to score, not to train: pycocoevalcap is 104 MB of Java archives, torch-fidelity installs a top-level `tests`.
EVAL = ["pycocoevalcap>=1.2", "torchmetrics>=1.9", "torch-fidelity>=0.4"]
DEMO = ["gradio>=6"]
QUANT = ["bitsandbytes>=0.48; platform_system == 'Linux'", "accelerate>=1.1"]  # --base_quant
LIGER = ["liger-kernel>=0.8; platform_system == 'Linux'"]  # --liger
EXTRAS = {
    "eval": EVAL,
    "gpu": ["triton>=3.6; platform_system == 'Linux'", *LIGER, *QUANT],
    "quant": QUANT,
    "demo": DEMO,
    "baselines": ["peft>=0.18"],
    "dev": [
        *EVAL,
        *DEMO,
        *QUANT,
        *LIGER,
        "peft>=0.18",
        "selenium>=4.20",  # drives the page in a real browser
        "pytest>=8",
        "pytest-timeout>=2.3",
        "hypothesis>=6.100",
        "ruff>=0.12",
        "mypy>=1.15",
        "types-PyYAML",
        "types-tqdm",
        "types-psutil",
    ],
}

setup(
    name="neural-tuning",
    version="0.1.0",
    description="Neural Tuning: one frozen LLM, four multimodal tasks, a sparse task network",
    license="MIT",
    python_requires=">=3.10",
    packages=[
        "pipeline",
        "pipeline.data",
        "pipeline.model",
        "pipeline.runtime",
        "pipeline.scoring",
        "pipeline.assembly",
        "pipeline.inference",
        "pipeline.mini",
        "pipeline.settings",
        "pipeline.planning",
        "sparse_kernels",
    ],
    package_dir={"": ".", "sparse_kernels": "kernels/sparse_kernels"},
    install_requires=CORE,
    extras_require=EXTRAS,
)
