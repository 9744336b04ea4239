"""Attention of several new tokens at once: over coded prefixes as decoding reads them, and dense
among themselves."""
