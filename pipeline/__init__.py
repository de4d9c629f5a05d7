"""Neural Tuning: a frozen LLaMA tuned for four multimodal tasks at once. Entry scripts stand at this package's top."""
