"""What a decode step reads, worked out on the GPU from device tensors, once for all layers."""
