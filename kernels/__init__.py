"""Triton kernels and their launchers: tensors in, tensors out. No nn.Module, no autograd, no registration.

A block is an image block, a Triton tile a tile: its sides are TILE_*, but for attention's BLOCK_M queries and BLOCK_N
keys, which are the field's names. M, N: rows and columns of a matmul; H, W: of an image; SPEC: what a kernel is
compiled for; `# [TILE_ROWS, TILE_C]` is the shape of a tile, `# (rows, C)` of what a pointer points to.
"""
