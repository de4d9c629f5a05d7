"""What runs a job: ranks, the DeepSpeed engine, checkpoints, tracking, the training loop."""
