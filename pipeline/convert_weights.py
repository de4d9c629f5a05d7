"""Weights of taming-transformers (.ckpt) or CLIP-GEN (.pt) into folders for --vqgan and --prior.

    python pipeline/convert_weights.py vqgan_imagenet_f16_16384.ckpt --out models/vqgan
    python pipeline/convert_weights.py vqgan_coco.pt --out models/vqgan
    python pipeline/convert_weights.py gpt_coco.pt --out models/prior

What the file is shows in its tensors. Nothing that it pickles is run. Every tensor must find its place; those of losses
and discriminators are dropped and counted. Written are config.json and model.safetensors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline.model.convert import convert


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the .ckpt or .pt file")
    parser.add_argument("--out", type=Path, required=True, help="folder that is made")
    parser.add_argument("--resolution", type=int, default=256, help="side in pixels a VQGAN was trained on")
    args = parser.parse_args()
    try:
        made = convert(args.file, resolution=args.resolution)
        made.model.save(args.out)
    except ValueError as error:
        print(f"convert_weights.py: error: {error}", file=sys.stderr)
        return 2
    dropped = ", ".join(f"{count} of {name.rstrip('.')}" for name, count in made.dropped.items()) or "none"
    print(
        f"{made.format} -> {args.out}: {len(made.model.state_dict())} tensors, dropped: {dropped}\n{made.model.config}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
