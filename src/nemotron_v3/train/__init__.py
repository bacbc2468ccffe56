"""A run of training, from a configuration to a checkpoint."""
