"""New tokens into hot pages; the reference is codec.pages.code_directions."""
