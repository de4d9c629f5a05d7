"""The tuned model: frozen backbone and vision tower, sparse networks, new tokens, projector, decoders, losses."""
