"""MEMORY OF PREFIXES: SGLang's radix tree, whose nodes know the precision of their pages."""
