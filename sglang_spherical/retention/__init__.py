"""WORTH: which pages keep their precision. Policy decides, operations say it, the executor does
it."""
