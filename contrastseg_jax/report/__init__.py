"""Pages and curves: numbers and pictures in, files out."""
