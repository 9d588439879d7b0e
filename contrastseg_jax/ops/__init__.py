"""Array operations shared by training, evaluation and networks."""
