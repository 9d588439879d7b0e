"""The folder of a run: config, checkpoints, numbers, log."""
