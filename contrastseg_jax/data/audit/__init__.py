"""Whether a data set is sound: each example, a split, the report."""
