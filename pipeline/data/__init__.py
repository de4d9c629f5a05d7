"""From source annotations to shards, and from shards to batches. One direction only; nothing here knows the model."""
