"""Many devices and many processes as one run."""
