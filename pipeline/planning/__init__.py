"""What a run needs and how long it takes, worked out before it starts: GPUs, operations, memory, communication."""
