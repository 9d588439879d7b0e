"""HTML pages and curves of a run."""
