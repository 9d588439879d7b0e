"""What training, evaluation and networks share."""
