"""Loss, optimizer, checkpoints, metrics and the training loop."""
