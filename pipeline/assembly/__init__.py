"""From settings to objects: the only modules beside the entry scripts that read pipeline.config."""
