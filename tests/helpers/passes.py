"""What the tests of the passes between the matmuls share: the measure, and layouts."""

import math

import torch


def differentiate(function, inputs, douts):
    """Outputs, then gradients of the inputs that are not None for the outputs whose gradient is not None."""
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    asked = [out for out, dout in zip(outs, douts, strict=True) if dout is not None]
    douts = [dout.to(out.dtype) for out, dout in zip(outs, douts, strict=True) if dout is not None]
    given = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(asked, given, douts, allow_unused=True)
    # A parameter that the asked outputs do not depend on has no gradient in one and zeros in another.
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(given, grads, strict=True)]
    return [*(out.detach() for out in outs), *grads]


def assert_accurate(names, ours, plain, golden, outputs, slack=0.0):
    """L2 errors against float64: outputs within 1.25 of plain PyTorch's, gradients within 2.

    ``slack`` more of the golden norm is for tensors so small that plain PyTorch's error is a matter of luck.
    """
    for n, (name, x, y, g) in enumerate(zip(names, ours, plain, golden, strict=True)):
        assert x.dtype == y.dtype, f"{name}: dtype {x.dtype}, expected {y.dtype}"
        assert x.shape == y.shape, f"{name}: shape {tuple(x.shape)}, expected {tuple(y.shape)}"
        error, theirs = (x.double() - g).norm().item(), (y.double() - g).norm().item()
        band = 0.0 if x.dtype == torch.float32 else 2 * torch.finfo(x.dtype).eps * g.abs().max().item()
        bound = (1.25 if n < outputs else 2) * theirs + band + slack * g.norm().item()
        assert error <= bound, f"{name}: error {error:.3e}, plain PyTorch's {theirs:.3e}, allowed {bound:.3e}"


def strided(x):
    """x in other memory: between columns of NaN, every second, and the other way round."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan)
    wide[..., 3::2] = x
    return [wide[..., 3::2], x.mT.contiguous().mT if x.dim() > 1 else x.flip(0).contiguous().flip(0)]
