"""Exports the trained part of a checkpoint as a folder to publish: safetensors, config.json and a model card.

    python pipeline/export.py --checkpoint runs/7b --out exported/mmud-7b --license cc-by-nc-4.0

No model is loaded. `--checkpoint exported/mmud-7b --base ...` of infer.py, demo.py and evaluate_mmud.py reads it, as
does `NeuralTuner.from_pretrained`.
"""

from __future__ import annotations

import sys

from pipeline.assembly.loading import open_checkpoint
from pipeline.config import ExportArguments, parse
from pipeline.inference.export import save_pretrained


def main() -> int:
    """Parse, find the checkpoint, write."""
    (args,) = parse(ExportArguments, description=__doc__)
    try:
        folder = save_pretrained(open_checkpoint(args.checkpoint, {}).folder, args.out, license=args.license)
    except ValueError as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        return 2
    print(f"Exported to {folder}: model.safetensors, config.json, README.md (the model card).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
