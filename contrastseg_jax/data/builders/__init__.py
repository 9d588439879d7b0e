"""One TFDS builder per data set; a module's name is the data set's name in the config."""
