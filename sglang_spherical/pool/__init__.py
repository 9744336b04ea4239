"""SPACE: where pages live, and who owns which bytes.

layout     PageLayout, the only owner of byte offsets: blocks, slices, descriptors
arena      the bytes, and the tables that say which blocks a page owns
order      the stream on which pages change
frames     centres and calibrated frames of every layer, gathered online or loaded
estimate   what errors are expected to do, by what frames gathered online
choice     which patterns heads have at each level, by that or by a file's gradients
kv_pool    SGLang's KVCache interface: writes new tokens into hot pages
allocator  SGLang's allocator interface: logical pages and blocks, counted exactly
"""
