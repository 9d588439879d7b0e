"""Where variables come from: files of PyTorch, folders of weights, checkpoints."""
