"""Spherical KV: a compressed, tiered KV cache for SGLang."""

__version__ = "0.1.0"
