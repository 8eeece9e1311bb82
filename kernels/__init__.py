"""Triton kernels and their launchers: tensors in, tensors out. No nn.Module, no autograd, no registration."""
