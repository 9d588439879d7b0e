"""Settings: the schema, files and overrides, rules."""
