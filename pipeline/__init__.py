"""Neural Tuning: tune a frozen LLaMA for four multimodal tasks at once. Entry scripts stand at the top of this package."""
