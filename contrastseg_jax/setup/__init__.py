"""What a config means, checked and resolved."""
