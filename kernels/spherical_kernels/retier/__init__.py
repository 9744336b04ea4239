"""Pages re-encoded at a lower level; the reference is codec.pages: decode, then encode."""
