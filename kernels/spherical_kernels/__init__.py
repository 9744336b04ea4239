"""The spherical page format: PyTorch reference and Triton kernels. Imports torch and triton, never
sglang."""
