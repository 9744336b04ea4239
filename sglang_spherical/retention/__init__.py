"""WORTH: which pages keep their precision, and which prefixes are forgotten.

distortion  what reading a page at a level costs, measured once per pair of patterns
ladder      the steps a page may take downwards: cost, distortion, and the hull over them
nodes       what every rank knows of the tree's nodes, as columns
worth       what a node's pages are worth
policy      decides: a prefix gets its budget, memory is made
operations  what a policy may ask for
executor    does it
"""
