"""READ: one plan per batch, then attention over codes in every layer."""
