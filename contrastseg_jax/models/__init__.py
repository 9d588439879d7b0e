"""Networks. The only package, besides `structs`, that imports Flax."""
