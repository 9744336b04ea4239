"""The spherical page format in plain PyTorch: the reference that every kernel must agree with.

patterns  how many bits each band of channels gets, and the table of patterns a slice may use
slices    the bytes of one slice (page, layer, KV head, keys or values): offsets, packing
frames    where the angles are measured: centre, weight, channel order, rotation
pages     tokens to slices and back
"""
