"""How a layer, its sub-layers, an aggregation and a patch embedding are computed: decided here and nowhere else.

An operation may compute around a module only if the module would do now just what the operation does: its class is
known, as its library wrote it; nobody listens to it; its weights are ordinary tensors; its own flags say so. These
conditions are the rows of the tables below, each with its reason in words. Where one is broken, the modules are called
as their owner wrote them.

What is known of a class of modules is in its owner's table (``Known``): nest_fast's modules have theirs, and so has the
adapter of each library. Nothing is registered, so no import changes what another model does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as nn_module

from nest_fast import frozen
from nest_fast.ops import (
    _tape,
    add_layer_norm,
    attention_layer,
    block_aggregate,
    block_attention,
    blockify,
    linear,
    mlp_layer,
    patchify,
    projection_mlp,
)
from nest_fast.ops._gelu_linear import gelu_linear
from nest_fast.ops._layer import add_branch
from nest_fast.ops._modes import TENSORS, autocast_dtype, is_eager, under_autocast, wants_gradients
from nest_fast.ops.attention_layer import attended
from nest_fast.ops.attention_layer import chosen as chosen_attention
from nest_fast.ops.bias_gelu import approximation
from nest_fast.ops.linear import linear_gelu
from nest_fast.ops.mlp_layer import chosen as chosen_mlp
from nest_fast.ops.projection_mlp import chosen as chosen_projection
from nest_fast.weights import head_minor_to_major

# --- what is known of a class of modules ------------------------------------------------------------------------------

Rules = tuple[tuple[str, Callable[..., object]], ...]  # reasons, and whether they hold
Scale = float | Tensor  # of a branch: for all samples, or for each one ``(B,)``


class Place(NamedTuple):
    """A place in a layer: which roles its module may have to be computed around, and rules ``(module, x)`` for it.

    An ``optional`` one may be None, or not be there.
    """

    roles: tuple[str, ...]
    rules: Rules = ()
    optional: bool = False


class Attention(NamedTuple):
    """What an attention module computes between its projections, by its current flags."""

    num_heads: int
    scale: float | None = None
    multi_query: bool = False
    head_minor: bool = False
    impl: str = "auto"


class Written(NamedTuple):
    """A class of modules as its library wrote it.

    Attributes:
        role: what its modules are in a layer: "linear", "norm", "dropout", ...
        methods: (class, name, function) of what must not have been replaced.
        rules: ``(module, x)``, what its flags must say.
        rate: the attribute with the probability of what it drops in training.
        parts: of "attention" and "mlp": the names of its modules, and the place of each.
        options: of "attention": reads its :class:`Attention`.
        draw: of "drop_path": ``(x, keep)`` → nonzero for each sample that is kept, as it draws them; None: by
            ``bernoulli_``.
    """

    role: str
    methods: tuple[tuple[type, str, object], ...]
    rules: Rules = ()
    rate: str = ""
    parts: tuple[tuple[str, Place], ...] = ()
    options: Callable[[Any], Attention] | None = None
    draw: Callable[[Tensor, float], Tensor] | None = None


Known = dict[type, Written]
Part = tuple[str, Any, Place]


def as_written(role: str, cls: type, *bases: type, methods: Sequence[str] = ("forward",), **what: Any) -> Written:
    """What is known of ``cls`` as long as its ``methods``, and those of the ``bases`` it replaces, are not patched."""
    return Written(role, tuple((c, name, _written(c, name)) for c in (cls, *bases) for name in methods), **what)


def _written(cls: type, name: str) -> object:
    """The method of ``cls`` if its code is in the class's file; else it was patched already, and nothing matches."""
    owner = next(c for c in cls.__mro__ if name in vars(c))
    function = vars(owner)[name]
    if owner.__module__.startswith(f"{__package__}."):  # ours, asked for as it is defined
        return function
    inner = _unwrapped(function, owner)
    code, file = getattr(inner, "__code__", None), getattr(sys.modules[owner.__module__], "__file__", None)
    own = code is not None and code.co_filename == file and inner.__qualname__ == f"{owner.__qualname__}.{name}"
    return function if own else object()


def _unwrapped(function: Any, owner: type) -> Any:
    """What is inside the wrappers that the library of ``owner`` puts around methods itself, and no one else's."""
    file = getattr(sys.modules[owner.__module__.partition(".")[0]], "__file__", None)
    while file and hasattr(function, "__wrapped__") and function.__code__.co_filename.startswith(os.path.dirname(file)):
        function = function.__wrapped__
    return function


# --- the rules --------------------------------------------------------------------------------------------------------

_CALLS = nn.Module.__call__, nn.Module._call_impl
_FUNCTIONS = torch._C._nn.linear, torch._C._nn.scaled_dot_product_attention, torch._C._nn.gelu, torch.conv2d

# Where one of these holds for the input, every module is called; the second table is for eager mode only.
_EVERYWHERE: Rules = (
    ("its input is no ordinary tensor", lambda x: type(x) not in TENSORS),
    (
        "somebody listens to all modules",
        lambda x: (
            nn_module._global_forward_hooks
            or nn_module._global_forward_pre_hooks
            or nn_module._global_backward_hooks
            or nn_module._global_backward_pre_hooks
        ),
    ),
)
_EVERYWHERE_EAGER: Rules = (
    ("the call of nn.Module was patched", lambda x: (nn.Module.__call__, nn.Module._call_impl) != _CALLS),
    (
        "a function of torch.nn.functional was patched",
        lambda x: (F.linear, F.scaled_dot_product_attention, F.gelu, F.conv2d) != _FUNCTIONS,
    ),
    ("torch.jit is tracing", lambda x: torch._C._get_tracing_state() is not None),
    ("torch.func is transforming", lambda x: torch._C._are_functorch_transforms_active()),
)

# Asked of every module that is computed around; the rules of its class and of its place come on top.
_OTHER = "{name} is a {kind}, which may compute something else"
_PATCHED = "the class of {name}, {kind}, was patched"
_HEARD = "somebody listens to {name}, or patched it"

_ORDINARY = ("a weight of {name} is no ordinary tensor", lambda m, x: _is_strange(m))
_DTYPE = ("{name} has another dtype than its input", lambda m, x: m._parameters["weight"].dtype != x.dtype)
_NORM_DTYPE = (_DTYPE[0], lambda m, x: _goes_with_no(m._parameters, x.dtype))
NORM_RULES: Rules = (
    ("{name} is no affine LayerNorm", lambda m, x: m._parameters.get("bias", m) is None),
    _ORDINARY,
    ("{name} normalises more than the channels", lambda m, x: len(m.normalized_shape) != 1),
)
_CONV: Rules = (
    _ORDINARY,
    ("{name} dilates, or has groups", lambda m, x: m.dilation != (1, 1) or m.groups != 1),
    ("{name} pads otherwise than with zeros", lambda m, x: m.padding_mode != "zeros"),
)

LINEAR = Place(("linear",), (_DTYPE,))
NORM = Place(
    ("norm",), (_NORM_DTYPE, ("{name} is not for its input", lambda m, x: m.normalized_shape[0] != x.shape[-1]))
)
INNER_NORM = Place(("norm",), (_NORM_DTYPE,))
ACTIVATION = Place(("gelu", "gelu_tanh"))
IDENTITY = Place(("identity",))
OPTIONAL_IDENTITY = Place(("identity",), optional=True)
ABSENT = Place((), optional=True)
SILENT = Place(("identity", "dropout"), (("{name} drops", lambda m, x: m.training and getattr(m, "p", 0.0) != 0.0),))
SOFTMAX = Place(("softmax",), (("{name} is over another dimension", lambda m, x: m.dim != -1),))
CONV_3X3 = Place(
    ("conv",),
    (
        _DTYPE,
        (
            "{name} is no 3x3 convolution with padding 1",
            lambda m, x: (m.kernel_size, m.stride, m.padding) != ((3, 3), (1, 1), (1, 1)),
        ),
    ),
)
CONV_OF_PATCHES = Place(
    ("conv",),
    (
        _DTYPE,
        (
            "{name} is no convolution of patches",
            lambda m, x: m.stride != m.kernel_size or m.padding != (0, 0) or m.in_channels != x.shape[1],
        ),
    ),
)
MAX_POOL = Place(("max_pool",))
_DROPOUT = Place(("identity", "dropout"))
_BODY = Place(("attention", "mlp"))
_LAYER = Place(("layer",))
SEQUENTIAL = Place(("sequential",))
_SCALE = Place(("identity", "layer_scale"), optional=True)
PATH = Place(("identity", "drop_path"))

ATTENTION_PARTS = (("qkv", LINEAR), ("attn_drop", SILENT), ("proj", LINEAR), ("proj_drop", SILENT))
# Of q, k and v that have the width of the input each.
QKV = Place(
    LINEAR.roles,
    (
        *LINEAR.rules,
        ("{name} has heads of another width than its input", lambda m, x: m.out_features != 3 * x.shape[-1]),
    ),
)
MLP_PARTS = (("fc1", LINEAR), ("act", ACTIVATION), ("drop1", SILENT), ("fc2", LINEAR), ("drop2", SILENT))


def max_pool_rules(padding: int) -> Rules:
    """For a class of max-pools whose attribute ``padding`` has to be this one."""
    wanted = (3, 3), (2, 2), (padding, padding), (1, 1), False, False

    def is_other(m: Any, x: Tensor) -> bool:
        sizes = (v if isinstance(v, tuple) else (v, v) for v in (m.kernel_size, m.stride, m.padding, m.dilation))
        return (*sizes, m.ceil_mode, m.return_indices) != wanted

    return (("{name} is no 3x3 max-pool with stride 2", is_other),)


# PyTorch's own modules.
TORCH: Known = {
    nn.Linear: as_written("linear", nn.Linear, rules=(_ORDINARY,)),
    nn.LayerNorm: as_written("norm", nn.LayerNorm, rules=NORM_RULES),
    nn.GELU: as_written("gelu", nn.GELU),
    nn.Identity: as_written("identity", nn.Identity),
    nn.Dropout: as_written("dropout", nn.Dropout),
    nn.Conv2d: as_written("conv", nn.Conv2d, methods=("forward", "_conv_forward"), rules=_CONV),
    nn.MaxPool2d: as_written("max_pool", nn.MaxPool2d, rules=max_pool_rules(1)),
    nn.Sequential: as_written("sequential", nn.Sequential),
    nn.Softmax: as_written("softmax", nn.Softmax),
}


class Reason(NamedTuple):
    """Why something is not computed by an operation: the row of a table, and the module that broke it."""

    why: str
    name: str = ""
    module: Any = None

    def __str__(self) -> str:
        return self.why.format(name=self.name, kind=type(self.module).__name__)


def everywhere(x: Tensor) -> Reason | None:
    """Why all modules are called for ``x``, whatever they are; None if no rule says so."""
    for why, holds in _EVERYWHERE if torch.compiler.is_compiling() else _EVERYWHERE + _EVERYWHERE_EAGER:
        if holds(x):
            return Reason(why)
    return None


def why_not(x: Tensor, parts: Iterable[Part], known: Known) -> Reason | None:
    """Why ``parts``, each a name, a module and its place, may not be computed around; None if they may be."""
    for name, module, place in parts:
        if module is None and place.optional:
            continue
        written = known.get(type(module))
        if written is None or written.role not in place.roles:
            return Reason(_OTHER, name, module)
        own = module.__dict__
        for cls, method, function in written.methods:
            if getattr(cls, method) is not function:
                return Reason(_PATCHED, name, module)
            if method in own:
                return Reason(_HEARD, name, module)
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or own.get("_compiled_call_impl")
        ):
            return Reason(_HEARD, name, module)
        for why, holds in written.rules:
            if holds(module, x):
                return Reason(why, name, module)
        for why, holds in place.rules:
            if holds(module, x):
                return Reason(why, name, module)
    return None


def flags(x: Tensor, name: str, module: Any, written: Written) -> Reason | None:
    """Why a module, inside its own forward, may not compute ``x`` around its parts; its own hooks have run already.

    That forward is the first of ``written.methods``; one that was put on the instance has called it.
    """
    own = written.methods[0][0]
    if any(cls is own and getattr(type(module), method) is not function for cls, method, function in written.methods):
        return Reason("{name} has methods of its own", name, module)
    (_, inside, _), *others = written.methods
    if any(method != inside and method in module.__dict__ for _, method, _ in others):
        return Reason("a method of {name} was patched", name, module)
    for why, holds in written.rules:
        if holds(module, x):
            return Reason(why, name, module)
    return None


def is_other(module: Any, name: str, x: Tensor) -> bool:
    """Whether its parameter ``name`` is no ordinary tensor, or has another dtype than ``x``."""
    parameter = module._parameters.get(name)
    return type(parameter) not in TENSORS or parameter.dtype != x.dtype


def _goes_with_no(norm: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether a LayerNorm's parameters are neither of ``dtype`` nor, beside half precision, both float32."""
    weight, bias = norm["weight"].dtype, norm["bias"].dtype
    beside_half = weight == bias == torch.float32 and dtype in (torch.float16, torch.bfloat16)
    return not (weight == bias == dtype or beside_half)


def _is_strange(module: Any) -> bool:
    """Whether its weight or bias is more than a tensor: a subclass, or made anew before every call."""
    own = module._parameters
    if "weight" not in own or "bias" not in own:
        return True
    bias = own["bias"]
    return type(own["weight"]) not in TENSORS or (bias is not None and type(bias) not in TENSORS)


# --- a sub-layer ------------------------------------------------------------------------------------------------------


class Half(NamedTuple):
    """The attention or the MLP sub-layer of a pre-norm layer, ``x + path(scale(body(norm(x))))``.

    Attributes:
        names: of the four modules.
        norm, body, scale, path: the modules: LayerNorm, attention or MLP, LayerScale and stochastic depth where the
            layer has them.
        known: what the layer's owner knows of their classes.
        path_place, scale_place: the places of ``path`` and ``scale``.
        call: ``path(scale(body(norm(x))))`` as the layer's library writes it, where it puts more between them.
        operation: ``(x, half, branch_scale)`` → the sub-layer's output, where the attention is not over the blocks of
            an ``x`` ``(B, T, N, C)``.
        post_norm: it is ``x + path(norm(scale(body(x))))``.
        more: parts of an MLP that are not inside its body.
        inner: the modules inside its body, with their names in the layer.
    """

    names: tuple[str, str, str, str]
    norm: Any
    body: Any
    scale: Any
    path: Any
    known: Known
    path_place: Place = PATH
    scale_place: Place = _SCALE
    call: Callable[[Tensor], Tensor] | None = None
    operation: Callable[[Tensor, Half, Scale], Tensor] | None = None
    post_norm: bool = False
    more: tuple[Part, ...] = ()
    inner: tuple[Part, ...] = ()

    @property
    def written(self) -> Written:
        return self.known[type(self.body)]

    def why_not(self, x: Tensor) -> Reason | None:
        """Why it is not one operation: one of its own modules, or one inside its body."""
        places = NORM, _BODY, self.scale_place, self.path_place
        modules = self.norm, self.body, self.scale, self.path
        why = why_not(x, zip(self.names, modules, places, strict=True), self.known)
        if why is None:
            why = why_not(x, self.parts, self.known)
        return why

    @property
    def parts(self) -> tuple[Part, ...]:
        """The modules inside its body, or that go on with what it does, with their names in the layer."""
        return self.inner + self.more

    def weights(self) -> list[Tensor]:
        """What the weights of the operation are made of: those of its linear layers, and the LayerScale's."""
        linears = [module for _, module, place in self.parts if place.roles == LINEAR.roles]
        return [*(linear.weight for linear in linears), *_gamma(self)]

    def tensors(self) -> list[Tensor | None]:
        """The parameters of all its modules."""
        modules = self.norm, self.body, self.scale, self.path, *[module for _, module, _ in self.parts]
        return [x for module in modules if module is not None for x in module._parameters.values()]

    def settings(self) -> tuple[Hashable, ...]:
        """What it computes with them, where nothing speaks against it and it has no ``operation`` of its own."""
        written = self.written
        if written.options is not None:
            how: Hashable = written.options(self.body)
        else:
            (act,) = self.inside(ACTIVATION)
            how = _activation(act, self)
        return how, self.post_norm, self.norm.eps

    def inside(self, *wanted: Place) -> list[Any]:
        """Those of its parts that have one of these places, in their order."""
        return [module for _, module, place in self.parts if place in wanted]


def _inside(module: Any, name: str) -> Any:
    """The module of this name, with dots for those deeper inside; None where there is none."""
    if "." not in name:
        return module._modules.get(name)
    for one in name.split("."):
        module = None if module is None else module._modules.get(one)
    return module


# The names of the modules of both sub-layers, as most of timm's layers have them: without LayerScale and with it.
HALVES = ("norm1", "attn", "", "drop_path1"), ("norm2", "mlp", "", "drop_path2")
SCALED_HALVES = ("norm1", "attn", "ls1", "drop_path1"), ("norm2", "mlp", "ls2", "drop_path2")


def halves(
    layer: Any,
    known: Known,
    names: tuple[tuple[str, str, str, str], ...] = HALVES,
    post_norm: bool = False,
    **attention: Any,
) -> list[Half]:
    """The attention sub-layer and the MLP sub-layer of a layer whose modules have these ``names``.

    Those may have dots. ``attention`` is what else is to be said of the first sub-layer.
    """
    first, second = names
    return [
        _half(layer, first, known, post_norm=post_norm, **attention),
        _half(layer, second, known, post_norm=post_norm),
    ]


def _half(layer: Any, names: tuple[str, str, str, str], known: Known, **more: Any) -> Half:
    norm, body, scale, path = (_inside(layer, name) for name in names)
    written = known.get(type(body))
    parts = () if written is None else written.parts
    inner = tuple([(f"{names[1]}.{name}", _inside(body, name), place) for name, place in parts])
    return Half(names, norm, body, scale, path, known, inner=inner, **more)


def run(x: Tensor, halves: Iterable[Half]) -> Tensor:
    """Sub-layers of a layer, one after the other, each by one operation, or by its modules."""
    called = everywhere(x)
    for half in halves:
        x = _call(x, half) if called or half.why_not(x) else _fused(x, half)
    return x


def run_on_image(x: Tensor, halves: Iterable[Half]) -> Tensor:
    """The attention sub-layer on an image ``(B, H, W, C)``, the MLP on its tokens ``(B, H * W, C)``, as an image."""
    attention, mlp = halves
    return run(run(x, [attention]).flatten(1, 2), [mlp]).view(x.shape)


def _call(x: Tensor, half: Half) -> Tensor:
    if half.call is not None:
        return x + half.call(x)
    branch = half.body(x if half.post_norm else half.norm(x))
    branch = branch if half.scale is None else half.scale(branch)
    branch = half.norm(branch) if half.post_norm else branch
    return x + (branch if half.path is None else half.path(branch))


def _fused(x: Tensor, half: Half) -> Tensor:
    """One operation; with stochastic depth only for the samples that it keeps, where it is known which these are.

    A tracer does not know, and a GPU would have to be waited for.
    """
    if _drop_rate(half) == 0.0:
        return _operation(x, half, 1.0)
    kept, scale = _kept(x, half), _kept_scale(half)
    if not x.is_cpu or type(x) is FakeTensor or not is_eager():
        return _operation(x, half, kept.mul_(scale))
    kept = kept.nonzero().flatten()
    if len(kept) == x.shape[0]:
        return _operation(x, half, scale)
    return x.index_copy(0, kept, _operation(x.index_select(0, kept), half, scale))


def _operation(x: Tensor, half: Half, branch_scale: Scale, impl: str = "auto") -> Tensor:
    if half.written.role == "mlp":
        return _mlp(x, half, branch_scale, impl)
    if half.operation is None:
        return attention(x, half, branch_scale, impl=impl)
    return half.operation(x, half, branch_scale)


def _mlp(x: Tensor, half: Half, branch_scale: Scale, impl: str) -> Tensor:
    norm, (fc1, act, fc2) = half.norm, half.inside(LINEAR, ACTIVATION)
    fc2_weight, packed = frozen.kept(half.body, x, half.weights, lambda: scaled(fc2.weight, half))
    return _tape.call(
        mlp_layer,
        *(x, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2_weight, scaled(fc2.bias, half)),
        activation=_activation(act, half),
        post_norm=half.post_norm,
        branch_scale=branch_scale,
        eps=norm.eps,
        packed=packed,
        impl=impl,
    )


def chosen(x: Tensor, half: Half, weights: Sequence[Tensor] | None = None) -> str:
    """What "auto" is on a GPU of a sub-layer that nothing speaks against, to be given as ``impl``.

    "triton" has kernels of its own for it, which take a complete sum and return one; "parts" goes into a chain.
    """
    if not x.is_cuda or half.operation is not None:
        return "parts"
    weights = weights_of(half) if weights is None else weights
    drops = _drop_rate(half) != 0.0
    if half.written.role == "mlp":
        return chosen_mlp(x, *weights, half.post_norm, x.new_empty(x.shape[0]) if drops else None)
    if drops:  # attention's kernels have one factor for all samples
        return "parts"
    options = half.written.options(half.body)  # type: ignore[misc]
    return chosen_attention(x, weights, options.num_heads, options.multi_query, half.post_norm)


def weights_of(half: Half) -> tuple[Tensor, ...]:
    """Of its LayerNorm and its two linear layers, with the LayerScale in the last; a projection's as it is."""
    norm, (first, *_, last) = half.norm, half.inside(LINEAR)
    return norm.weight, norm.bias, first.weight, first.bias, scaled(last.weight, half), scaled(last.bias, half)


def _activation(act: Any, half: Half) -> str:
    """PyTorch's GELU says it, those of libraries are a class for each."""
    approximate = getattr(act, "approximate", "tanh" if half.known[type(act)].role == "gelu_tanh" else "none")
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def attention(
    x: Tensor,
    half: Half,
    branch_scale: Scale,
    *,
    qkv: tuple[Tensor | Callable[[], Tensor], Tensor | None] | None = None,
    cosine_scale: Tensor | None = None,
    **within: Any,
) -> Tensor:
    """An attention sub-layer on blocks ``(B, T, N, C)``, or ``within`` the windows of an image and with their bias.

    ``qkv`` is the weight and bias of q, k and v where these are not those of a module; a function returns a weight that
    is made of those of the body's linear layers. ``cosine_scale`` ``(heads,)`` is the scale of attention by cosines.
    """
    norm, body = half.norm, half.body
    *_, proj = half.inside(LINEAR)
    options = half.written.options(body)  # type: ignore[misc]
    given: Any
    given, qkv_bias = (body.qkv.weight, body.qkv.bias) if qkv is None else qkv
    is_made = callable(given)

    def make() -> tuple[Tensor, Tensor]:
        return given() if is_made else given, scaled(_head_major(proj.weight, options), half)

    (qkv_weight, proj_weight), packed = frozen.kept(body, x, half.weights, make, options, is_made)
    return _tape.call(
        attention_layer,
        *(x, norm.weight, norm.bias, qkv_weight, qkv_bias, proj_weight, scaled(proj.bias, half)),
        num_heads=options.num_heads,
        multi_query=options.multi_query,
        scale=options.scale if cosine_scale is None else cosine_scale,
        cosine=cosine_scale is not None,
        post_norm=half.post_norm,
        branch_scale=branch_scale,
        eps=norm.eps,
        packed=packed,
        **within,
    )


def scaled(x: Any, half: Half) -> Any:
    """The weight, or the bias if there is one, of the last linear layer of a sub-layer, with its LayerScale."""
    gamma = _gamma(half)
    return x if x is None or not gamma else x * gamma[0].view(-1, *(1,) * (x.dim() - 1))


def _gamma(half: Half) -> tuple[Tensor, ...]:
    gamma = None if half.scale is None else half.scale._parameters.get("gamma")
    return () if gamma is None else (gamma,)


def _drop_rate(half: Half) -> float:
    """The probability with which stochastic depth drops a sample now."""
    rate = "" if half.path is None else half.known[type(half.path)].rate
    return getattr(half.path, rate) if rate and half.path.training else 0.0


def _kept(x: Tensor, half: Half) -> Tensor:
    """``(B,)``, nonzero for the samples that stochastic depth keeps, drawn as its module draws them."""
    keep, draw = 1.0 - _drop_rate(half), half.known[type(half.path)].draw
    return x.new_empty(x.shape[0]).bernoulli_(keep) if draw is None else draw(x, keep)


def _kept_scale(half: Half) -> float:
    """The factor of those samples."""
    keep = 1.0 - _drop_rate(half)
    return 1.0 / keep if keep > 0.0 and getattr(half.path, "scale_by_keep", True) else 1.0


def _sample_scale(x: Tensor, half: Half) -> Tensor | None:
    """``(B,)``, the factor of each sample's branch, drawn anew; None where none is dropped."""
    return _kept(x, half).mul_(_kept_scale(half)) if _drop_rate(half) else None


def _head_major(proj_weight: Tensor, options: Attention) -> Tensor:
    """The weight for a head-major input: reordering its columns costs far less than reordering every token."""
    return head_minor_to_major(proj_weight, options.num_heads) if options.head_minor else proj_weight


# --- parts of a model -------------------------------------------------------------------------------------------------


def attend(x: Tensor, attn: Any, options: Attention, known: Known) -> Tensor:
    """Attention with its projections, without the dropout of its output: ``(B, T, N, C)`` → the same."""
    heads, impl = options.num_heads, options.impl
    kv_heads = 1 if options.multi_query else heads
    packed = attn.qkv(x)
    packed = packed.view(*x.shape[:-1], heads + 2 * kv_heads, packed.shape[-1] // (heads + 2 * kv_heads))
    q, k, v = packed.split_with_sizes((heads, kv_heads, kv_heads), 3)
    why = why_not(x, [("attn_drop", attn.attn_drop, _DROPOUT)], known)
    drop = 0.0 if why or not attn.attn_drop.training else getattr(attn.attn_drop, "p", 0.0)
    library = impl in ("auto", "reference")
    if why and not library:
        raise RuntimeError(f"impl: {impl!r} cannot run block_attention here: {why}")
    if why or (drop and library and not x.is_cuda):
        out = _attend_by_weights(q, k, v, options.scale, attn.attn_drop)
    else:
        out = block_attention(q, k, v, scale=options.scale, dropout_p=drop, impl=impl)
    if not options.head_minor:
        return attn.proj(out.flatten(-2))
    if everywhere(x) or why_not(x, [("proj", attn.proj, LINEAR)], known):
        return attn.proj(out.transpose(-1, -2).flatten(-2))
    weight = _head_major(attn.proj.weight, options)
    return linear(out.flatten(-2), weight, attn.proj.bias, impl="reference" if impl == "reference" else "auto")


def _attend_by_weights(q: Tensor, k: Tensor, v: Tensor, scale: float | None, attn_drop: Any) -> Tensor:
    """Attention that hands its weights ``(B, heads, T, N, N)`` to a module: laid out as in timm."""
    q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = attn_drop(((q * scale) @ k.transpose(-2, -1)).softmax(-1))
    return (weights @ v).permute(0, 2, 3, 1, 4)


def aggregate(x: Tensor, pool: Any, padding: str, **options: Any) -> Tensor:
    """``block_aggregate`` with the parameters of ``pool.conv`` and ``pool.norm``."""
    conv, norm = pool.conv, pool.norm
    weights = conv.weight, conv.bias, norm.weight, norm.bias
    _, packed = frozen.kept(pool, x, lambda: [conv.weight], lambda: None)
    return block_aggregate(x, *weights, eps=norm.eps, padding=padding, packed=packed, **options)


def embed_patches(x: Tensor, conv: Any, block_size: tuple[int, int], impl: str = "auto") -> Tensor:
    """A convolution of patches as one matmul, in blocks: ``(B, C, H, W)`` → ``(B, T, N, dim)``."""
    patches = patchify(x, conv.kernel_size, block_size, impl=impl)
    return linear(patches, conv.weight.flatten(1), conv.bias, impl=impl)


def cut(image: Tensor, edge: int, pos_embed: Tensor) -> Tensor:
    """``(B, H, W, C)`` → square blocks ``(B, T, N, C)`` with their position embedding."""
    _, H, W, C = image.shape
    if is_one_for_each(pos_embed, (H * W // edge**2, edge**2, C)):
        return blockify(image, edge, pos_embed=pos_embed)
    return blockify(image, edge) + pos_embed


def is_one_for_each(pos_embed: Any, shape: tuple[int, ...]) -> bool:
    """Whether ``pos_embed`` is an ordinary tensor ``(1, *shape)``, so that it broadcasts over the batch only."""
    return type(pos_embed) in TENSORS and tuple(pos_embed.shape) == (1, *shape)


# --- layers in a chain ------------------------------------------------------------------------------------------------


def run_layers(x: Tensor, encoder: Any, known: Known, keep_gelu: bool = True) -> Tensor:
    """Pre-norm layers, one after the other; chained where they are eager on a GPU and nobody listens to one.

    ``keep_gelu``: whether a chain keeps the MLPs' activations for the gradient, or makes them again.
    """
    if not is_chained(x) or everywhere(x) or why_not(x, (("the encoder", encoder, SEQUENTIAL),), known):
        return encoder(x)
    layers = list(encoder)
    if why_not(x, [("a layer", layer, _LAYER) for layer in layers], known):
        return encoder(x)
    pairs = [halves(layer, known) for layer in layers]
    both = [half for pair in pairs for half in pair]
    fused = [half.why_not(x) is None for half in both]
    if all(fused):
        return chained(x, pairs, keep_gelu)
    for half, is_fused in zip(both, fused, strict=True):
        x = _fused(x, half) if is_fused else _call(x, half)
    return x


def is_chained(x: Tensor) -> bool:
    """Whether a residual sum goes into the pass of the LayerNorm after it; a compiler does so itself."""
    return x.is_cuda and not torch.compiler.is_compiling()


def chained(x: Tensor, layers: Iterable[Sequence[Half]], keep_gelu: bool = True) -> Tensor:
    """Layers one after the other, of both sub-layers each: each residual sum in the pass of the LayerNorm after it.

    ``keep_gelu`` is as of :func:`run_layers`. What has kernels of its own, a sub-layer or a layer from its projection
    on, takes a sum that is complete and returns one.
    """
    state: _Chained = (x, None, None)
    modes, keep_gelu = _tape.modes(x), keep_gelu or not torch.is_grad_enabled()
    # In which the matmul after each pass wants its input.
    dtype = autocast_dtype(x) if under_autocast(x) else None
    for pair in layers:
        compute = partial(chained_layer, state, pair, dtype, keep_gelu)
        if modes is None or any(map(_drop_rate, pair)):
            state = compute()
            continue
        first, second = pair
        key = modes, first.settings(), second.settings()
        state = _tape.again(key, [*state, *first.tensors(), *second.tensors()], compute)
    return _sum(*state)


# The residual stream, and the last branch and its scale, which go into the next LayerNorm's pass.
_Chained = tuple[Tensor, Tensor | None, Tensor | None]


def chained_layer(state: _Chained, pair: Sequence[Half], dtype: torch.dtype | None, keep_gelu: bool) -> _Chained:
    """A layer of a chain, of two sub-layers."""
    x, branch, scale = state
    first, second = pair
    weights = weights_of(first), weights_of(second)
    impl = chosen_projection_mlp(x, first, second, *weights)
    if impl == "triton":
        return _projected(_sum(x, branch, scale), first, second, *weights, impl), None, None
    for half, given in zip(pair, weights, strict=True):
        impl = chosen(x, half, given)
        if impl == "triton":
            own = _sample_scale(x, half)
            x = _operation(_sum(x, branch, scale), half, 1.0 if own is None else own, impl)
            branch = scale = None
            continue
        norm = half.norm
        if branch is None:
            y = norm(x)
        else:
            x, y = add_layer_norm(
                x, branch, norm.weight, norm.bias, branch_scale=scale, eps=norm.eps, normed_dtype=dtype
            )
        branch = _branch(y, half, dtype, keep_gelu)
        scale = _sample_scale(x, half)
    return x, branch, scale


def chosen_projection_mlp(
    x: Tensor, attention: Half, mlp: Half, weights: Sequence[Tensor], mlp_weights: Sequence[Tensor]
) -> str:
    """As :func:`chosen`, of a layer from its projection on: "triton" is one kernel for that."""
    if not x.is_cuda or _drop_rate(attention) or _drop_rate(mlp):
        return "parts"
    *before, weight, bias = weights
    # What is attended has the shape of x, and a gradient where what it is made of has.
    return "parts" if wants_gradients(before) else chosen_projection(x, x, weight, bias, *mlp_weights)


def _projected(
    x: Tensor, attention: Half, mlp: Half, weights: Sequence[Tensor], mlp_weights: Sequence[Tensor], impl: str
) -> Tensor:
    """A layer whose projection and MLP sub-layer are one operation."""
    options = attention.written.options(attention.body)  # type: ignore[misc]
    *before, weight, bias = weights
    y = attended(
        *(x, *before),
        num_heads=options.num_heads,
        multi_query=options.multi_query,
        scale=options.scale,
        eps=attention.norm.eps,
        impl=chosen(x, attention, weights),
    )
    (act,) = mlp.inside(ACTIVATION)
    activation, weight = _activation(act, mlp), _head_major(weight, options)
    return projection_mlp(x, y, weight, bias, *mlp_weights, activation=activation, eps=mlp.norm.eps, impl=impl)


def _sum(x: Tensor, branch: Tensor | None, scale: Tensor | None) -> Tensor:
    return x if branch is None else add_branch(x, branch, 1.0 if scale is None else scale)


def _branch(y: Tensor, half: Half, dtype: torch.dtype | None, keep_gelu: bool) -> Tensor:
    body = half.body
    if half.written.role == "attention":
        return attend(y, body, half.written.options(body), half.known)  # type: ignore[misc]
    fc1, fc2, activation = body.fc1, body.fc2, _activation(body.act, half)
    if not keep_gelu:
        hidden = F.linear(y, fc1.weight)
        return gelu_linear(hidden, fc1.bias, fc2.weight, fc2.bias, approximate=approximation(activation))
    return F.linear(linear_gelu(y, fc1.weight, fc1.bias, activation, dtype), fc2.weight, fc2.bias)
