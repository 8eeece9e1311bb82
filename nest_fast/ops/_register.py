"""One call registers an operation: schema, launcher, fake, gradient, vmap and FLOPs.

The kernels themselves are in ``csrc/``, where the compiled extension registers them under the schema's name, or in
``kernels/``, imported with Triton at the first launch.
"""

from __future__ import annotations

import importlib
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from nest_fast.ops import _extension, _flops, _modes, _vmap

__all__ = ["operation"]

_LIB = _extension.Library()
_TRITON_KEYS = ("CUDA", "CPU") if _extension.triton_interpreted else ("CUDA",)
# What a launcher takes as it is; a tensor of another class is for the dispatcher.
_FOR_LAUNCHERS = frozenset((Tensor, nn.Parameter, type(None), bool, int, float, str, list, tuple, torch.dtype))


def operation(
    schema: str,
    *,
    fake: Callable[..., Any],
    launch: str = "",
    saved: Sequence[str] = (),
    gradients: Callable[..., dict[str, Tensor | None]] | None = None,
    differentiable: int = 1,
    backward_of: str = "",
    vmap: tuple[int, int] | Callable | None = None,
    flops: Callable[..., int] | None = None,
) -> Any:
    """Register ``nest_fast::<schema>`` and return what calls it; its ``op`` is what the dispatcher knows.

    Args:
        schema: "name(Tensor x, ...) -> (Tensor out, ...)", as PyTorch writes it.
        fake: called with the arguments, returns empty tensors of the outputs' shapes, dtypes and devices.
        launch: "module.function" of ``nest_fast.kernels``, called with the arguments; "" where the extension has it. It
            returns None for an output that was not asked for, and the operation :func:`nothing_like`.
        saved: names of inputs and outputs that the gradient needs.
        gradients: called as ``gradients(kept, dout, ...)``, returns gradients by the names of the arguments; each is
            cast to its argument's dtype. ``kept`` has the ``saved`` tensors and all arguments that are none by their
            names; ``kept.needed``, ``kept.dtypes`` and ``kept.shapes`` say, by the names of the arguments, which
            gradients are asked for, and what the arguments were.
        differentiable: how many of the outputs, the first ones, have a gradient.
        backward_of: the operation whose backward this is; a gradient of this one is refused by its name.
        vmap: (batched, tensors) for :func:`nest_fast.ops._vmap.batching_rule`, or a rule of its own.
        flops: from the arguments' shapes, as ``torch.utils.flop_counter`` calls it.
    """
    name = schema.partition("(")[0]
    qualified = f"nest_fast::{name}"
    _LIB.define(schema)
    op = getattr(torch.ops.nest_fast, name).default
    launcher = _launcher(launch) if launch else None
    if launcher is not None:
        for key in _TRITON_KEYS:
            _LIB.impl(name, launcher, key)
    torch.library.register_fake(qualified, fake, lib=_LIB)
    if gradients is not None:
        setup, backward = _autograd(op, saved, gradients, differentiable)
        torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_LIB)
    elif backward_of:
        torch.library.register_autograd(qualified, _no_double_backward(backward_of), lib=_LIB)
    if vmap is not None:
        rule = _vmap.batching_rule(op, *vmap) if isinstance(vmap, tuple) else vmap
        torch.library.register_vmap(qualified, rule, lib=_LIB)
    if flops is not None:
        _flops.FORMULAS[name] = flops
    return _caller(op, launcher)


def _caller(op: Any, launcher: Callable[..., Any] | None) -> Any:
    """What calls ``op``: past autograd's Python where nothing is recorded, past the dispatcher where nobody listens.

    Both cost more than a kernel's launch, and a layer on a GPU is nine launches.
    """

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or _modes.wants_gradients(args):
            return op(*args)
        if (
            launcher is not None
            and _modes.is_eager()
            and not torch.autograd._profiler_enabled()
            and _FOR_LAUNCHERS.issuperset(map(type, args))
            and not any(isinstance(x, Tensor) and x.is_neg() for x in args)
        ):
            return launcher(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    call.op = op  # type: ignore[attr-defined]
    return call


def _launcher(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(".")
    function: Any = None

    def launch(*args: Any) -> Any:
        nonlocal function
        if function is None:
            function = getattr(importlib.import_module(f"nest_fast.kernels.{module}"), name)
        out = function(*args)
        if not isinstance(out, tuple) or all(x is not None for x in out):
            return out
        first = next(x for x in args if isinstance(x, Tensor))
        return tuple(nothing_like(first) if x is None else x for x in out)  # no two outputs may share memory

    return launch


def nothing_like(x: Tensor) -> Tensor:
    """What an operation returns in the place of an output that was not asked for."""
    return x.new_empty(0, dtype=torch.float32)


def _autograd(op: Any, saved: Sequence[str], gradients: Callable, differentiable: int) -> tuple[Callable, Callable]:
    """``setup_context`` and backward of an operation; ``gradients`` gets and returns its tensors by name."""
    inputs = [argument.name for argument in op._schema.arguments]
    outputs = [output.name for output in op._schema.returns]
    is_tensor = ["Tensor" in str(argument.type) for argument in op._schema.arguments]
    constants = [i for i, tensor in enumerate(is_tensor) if not tensor]
    kept_inputs = [inputs.index(name) for name in saved if name in inputs]
    kept_outputs = [outputs.index(name) for name in saved if name not in inputs]
    names = [*(inputs[i] for i in (*constants, *kept_inputs)), *(outputs[i] for i in kept_outputs)]
    Kept: Any = namedtuple("Kept", [*names, "needed", "dtypes", "shapes"])  # type: ignore[misc]

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        outs = output if isinstance(output, tuple) else (output,)
        ctx.constants = [inputs[i] for i in constants]
        ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in inputs]
        ctx.shapes = [x.shape if isinstance(x, Tensor) else None for x in inputs]
        ctx.save_for_backward(*(inputs[i] for i in kept_inputs), *(outs[i] for i in kept_outputs))
        if len(outs) > differentiable:
            ctx.mark_non_differentiable(*outs[differentiable:])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        douts = douts[:differentiable]
        own = inputs[: len(ctx.needs_input_grad)]  # the last ones are left out where they have their defaults
        if all(dout is None for dout in douts):
            return (None,) * len(own)
        needed = dict(zip(own, ctx.needs_input_grad, strict=True))
        dtypes, shapes = (dict(zip(inputs, values, strict=True)) for values in (ctx.dtypes, ctx.shapes))
        found = gradients(Kept._make([*ctx.constants, *ctx.saved_tensors, needed, dtypes, shapes]), *douts)
        pairs = ((found.get(name), dtypes[name]) for name in own)
        return tuple(dx if dx is None or dx.dtype == dtype else dx.to(dtype) for dx, dtype in pairs)

    return setup, backward


def _no_double_backward(op: str) -> Callable[..., NoReturn]:
    """The autograd formula of a backward kernel: an error, since double backward is not supported."""

    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(
            f"impl: expected 'reference' for a derivative of {op}'s gradients, got a kernel;"
            " in an accelerated model nest_fast.restore(model) gives plain PyTorch back"
        )

    return backward
