"""The workdir of a run: config, checkpoints, metrics, log."""
