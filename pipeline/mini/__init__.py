"""The mini world: drawn scenes in MMUD's schema, and the tiny foundation models trained on them."""
