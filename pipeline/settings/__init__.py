"""The flags of the entry scripts, one dataclass to a module; pipeline.config puts them together."""
