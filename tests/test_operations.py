"""What holds for every operation and each of its implementations: strides, dtypes, emptiness, modes, tracers."""

import contextlib
import functools
import math
import random
import sys
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import nest_fast
from helpers.aggregation import for_the_interpreter
from helpers.common import CPP_ISA
from helpers.strides import restrided
from nest_fast.ops import _backends, _extension, _modes
from nest_fast.testing import relative_error

# Every operation in each way, at small sizes: name → (function, sizes of its tensors, more implementations).
C, HIDDEN, HEADS = 12, 20, 3
VECTORS = ((C,), (C,))
TABLE = {
    "attention_layer": (
        functools.partial(nest_fast.attention_layer, num_heads=HEADS),
        ((2, 4, 9, C), *VECTORS, (3 * C, C), (3 * C,), (C, C), (C,)),
        ("cpp",),
    ),
    "attention_layer, windows": (
        lambda *t, **kwargs: nest_fast.attention_layer(
            *t[:7], bias=t[7], num_heads=HEADS, windows=nest_fast.windows((4, 5), (2, 3), shift=1), **kwargs
        ),
        ((2, 20, C), *VECTORS, (3 * C, C), (3 * C,), (C, C), (C,), (HEADS, 6, 6)),
        ("cpp",),
    ),
    "mlp_layer": (nest_fast.mlp_layer, ((2, 4, 9, C), *VECTORS, (HIDDEN, C), (HIDDEN,), (C, HIDDEN), (C,)), ("cpp",)),
    "projection_mlp": (
        nest_fast.projection_mlp,
        ((2, 4, 9, C), (2, 4, 9, C), (C, C), (C,), *VECTORS, (HIDDEN, C), (HIDDEN,), (C, HIDDEN), (C,)),
        (),
    ),
    "block_attention": (nest_fast.block_attention, ((1, 2, 5, HEADS, 8),) * 3, ("sdpa", "cpp", "triton")),
    "block_attention, one key head": (
        nest_fast.block_attention,
        ((1, 2, 5, HEADS, 8), *((1, 2, 5, 1, 8),) * 2),
        ("sdpa", "cpp", "triton"),
    ),
    "block_attention, bias": (
        lambda q, k, v, bias, **kwargs: nest_fast.block_attention(q, k, v, bias=bias, **kwargs),
        (*((1, 2, 5, HEADS, 8),) * 3, (HEADS, 5, 5)),
        ("sdpa", "cpp", "triton"),
    ),
    "block_attention, positions": (
        lambda q, k, v, rel_h, rel_w, **kwargs: nest_fast.block_attention(q, k, v, rel_h=rel_h, rel_w=rel_w, **kwargs),
        (*((1, 2, 6, HEADS, 8),) * 3, (1, 2, 6, HEADS, 3), (1, 2, 6, HEADS, 2)),
        ("sdpa", "cpp", "triton"),
    ),
    "block_attention, cosines": (
        lambda q, k, v, scale, **kwargs: nest_fast.block_attention(q, k, v, scale=scale, cosine=True, **kwargs),
        (*((1, 2, 5, HEADS, 8),) * 3, (HEADS,)),
        ("triton",),
    ),
    "block_attention, mask": (
        lambda q, k, v, mask, **kwargs: nest_fast.block_attention(q, k, v, mask=mask, **kwargs),
        (*((1, 2, 5, HEADS, 8),) * 3, (2, 5, 5)),
        ("sdpa",),
    ),
    "block_aggregate": (
        lambda *t, **kwargs: nest_fast.block_aggregate(*t[:5], pos_embed=t[5], grid_size=2, **kwargs),
        ((2, 4, 16, C), (16, C, 3, 3), (16,), (16,), (16,), (1, 1, 16, 16)),
        ("two_step", "cpp", "triton"),
    ),
    "block_aggregate, image": (
        lambda *t, **kwargs: nest_fast.block_aggregate(*t[:5], pos_embed=t[5], **kwargs),
        ((2, 6, 4, C), (16, C, 3, 3), (16,), (16,), (16,), (1, 3, 2, 16)),
        ("two_step", "cpp", "triton"),
    ),
    "linear": (nest_fast.linear, ((2, 9, C), (HIDDEN, C), (HIDDEN,)), ()),
    "linear, residual": (
        lambda x, w, b, residual, **kwargs: nest_fast.linear(x, w, b, residual=residual, **kwargs),
        ((2, 9, C), (HIDDEN, C), (HIDDEN,), (2, 9, HIDDEN)),
        (),
    ),
    "bias_gelu": (nest_fast.bias_gelu, ((2, 9, C), (C,)), ("triton",)),
    "add_layer_norm": (
        lambda x, branch, w, b, bias, **kwargs: nest_fast.add_layer_norm(x, branch, w, b, branch_bias=bias, **kwargs),
        ((2, 9, C), (2, 9, C), *VECTORS, (C,)),
        ("triton",),
    ),
    "layer_norm_mean": (nest_fast.layer_norm_mean, ((2, 9, C), *VECTORS), ("triton",)),
    "blockify": (
        lambda x, pos, **kwargs: nest_fast.blockify(x, 3, pos_embed=pos, **kwargs),
        ((2, 6, 9, C), (1, 6, 9, C)),
        ("cpp",),
    ),
    "unblockify": (
        lambda x, pos, **kwargs: nest_fast.unblockify(x, (2, 3), pos_embed=pos, **kwargs),
        ((2, 6, 9, C), (1, 6, 9, C)),
        ("cpp",),
    ),
    "patchify": (lambda x, **kwargs: nest_fast.patchify(x, 2, 3, **kwargs), ((2, 3, 6, 12),), ("cpp",)),
}


def runs(impl):
    """Whether CPU tensors have that here."""
    if impl == "triton":
        return _extension.triton_interpreted
    if impl == "cpp":
        return bool(CPP_ISA)
    return impl != "two_step" or bool(CPP_ISA) or _extension.triton_interpreted


WAYS = [(name, impl) for name, row in TABLE.items() for impl in ("auto", "reference", *row[2]) if runs(impl)]


def of(names):
    """Each implementation of the operations ``names``."""
    ways = [way for way in WAYS if way[0] in names]
    return pytest.mark.parametrize(("name", "impl"), ways, ids=[f"{name}-{impl}" for name, impl in ways])


each_way = of(TABLE)
each = pytest.mark.parametrize("name", TABLE)


def tensors_of(name, **kwargs):
    """Numbers of a model's size: a weight's products with what is normal are normal."""
    sizes = TABLE[name][1]
    return [
        torch.randn(s, **kwargs) * (math.prod(s[1:]) ** -0.5 if len(s) == 2 or s[2:] == (3, 3) else 1) for s in sizes
    ]


def call(name, impl, tensors):
    out = TABLE[name][0](*tensors, impl=impl)
    return torch.cat(out, -1) if isinstance(out, tuple) else out


def differentiated(name, impl, tensors, dout=None):
    """The output, then the gradient of each tensor."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(name, impl, leaves)
    return [
        out.detach(),
        *torch.autograd.grad(out, leaves, torch.ones_like(out) if dout is None else dout, materialize_grads=True),
    ]


assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    for_the_interpreter(monkeypatch)


def expandable(n, t):
    """Dimensions of the n-th tensor whose expansion leaves maxima that differ and channels with a variance."""
    if n == 0:
        return [0]
    return range(t.shape[2:] == (3, 3), t.dim())


@each_way
def test_of_any_strides(name, impl):
    """Operands and output gradients of any strides give what dense ones give, in plain PyTorch."""
    for seed in range(2 if impl == "triton" else 12):
        chance = random.Random(f"{name} {seed}")
        strange = [restrided(t, chance, expandable(n, t)) for n, t in enumerate(tensors_of(name))]
        dense = [t.contiguous() for t in strange]
        with torch.no_grad():
            wanted = call(name, "reference", dense)
            assert_close(call(name, impl, strange), wanted)
        dout = restrided(torch.randn_like(wanted), chance)
        assert_close(
            differentiated(name, impl, strange, dout), differentiated(name, "reference", dense, dout.contiguous())
        )


@each_way
def test_a_sums_gradient(name, impl):
    """``out.sum().backward()`` gives one number, expanded."""
    tensors = tensors_of(name)
    dout = torch.ones(()).expand(call(name, "reference", tensors).shape)
    assert_close(*(differentiated(name, i, tensors, dout) for i in (impl, "reference")))


# The layers and the aggregation have such a test of their own, to the bit or nearly.
ALONE = (
    *("attention_layer, windows", "projection_mlp"),
    *("block_attention", "block_attention, one key head", "block_attention, bias", "block_attention, mask"),
    *(
        "block_attention, positions",
        "block_attention, cosines",
        "linear",
        "linear, residual",
        "bias_gelu",
        "add_layer_norm",
        "layer_norm_mean",
    ),
    *("blockify", "unblockify", "patchify"),
)


@of(ALONE)
def test_each_gradient_alone(name, impl):
    """Whatever else is frozen."""
    tensors = tensors_of(name)
    dout = torch.randn_like(call(name, "reference", tensors))
    _, *together = differentiated(name, impl, tensors, dout)
    for n in range(len(tensors)):
        given = [t.detach().requires_grad_(i == n) for i, t in enumerate(tensors)]
        assert_close(torch.autograd.grad(call(name, impl, given), given[n], dout)[0], together[n])


@each_way
def test_of_nothing(name, impl):
    """Of any strides, forward and backward: no values, and zeros for what all images share."""
    for seed in range(4):
        tensors = tensors_of(name)
        B = tensors[0].shape[0]
        tensors = [t[:0] if t.shape[0] == B and t.dim() > 2 else t for t in tensors]
        tensors = [restrided(t, random.Random(seed)) if seed else t for t in tensors]
        out, *grads = differentiated(name, impl, tensors)
        assert out.shape[0] == 0
        for t, grad in zip(tensors, grads, strict=True):
            assert grad.shape == t.shape
            assert not grad.any()


# --- dtypes -----------------------------------------------------------------------------------------------------------

NORMS = {"attention_layer": (1, 2), "mlp_layer": (1, 2), "add_layer_norm": (2, 3), "layer_norm_mean": (1, 2)}
NORMS |= {"block_aggregate": (3, 4), "block_aggregate, image": (3, 4), "attention_layer, windows": (1, 2)}
NORMS |= {"projection_mlp": (4, 5)}
# The tensor of each that PyTorch's promotion takes in any floating-point dtype.
ADDED = {"block_attention, bias": 3, "block_attention, mask": 3, "block_aggregate": 5, "linear, residual": 3}
ADDED |= {"block_aggregate, image": 5, "bias_gelu": 1, "add_layer_norm": 1, "blockify": 1, "unblockify": 1}


def assert_same_dtypes(name, impl, tensors):
    """Output and gradients in the dtypes of plain PyTorch and as near to float64 as half precision lets them be."""
    ours, plain = (differentiated(name, i, tensors) for i in (impl, "reference"))
    exact = differentiated(name, "reference", [t.double() for t in tensors])
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == b.dtype
        bound = 3 * (b - c).norm() + torch.finfo(b.dtype).eps * (c.norm() + c.numel() ** 0.5)
        assert (a - c).norm() <= bound


@of(NORMS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mixed_dtypes_norms_in_float32(name, impl, half):
    given = enumerate(tensors_of(name))
    assert_same_dtypes(name, impl, [t.to(torch.float32 if n in NORMS[name] else half) for n, t in given])


@pytest.mark.parametrize("name", NORMS)
def test_norms_in_what_plain_pytorch_does_not_take(name):
    weight, bias = NORMS[name]
    for x, odd, at in (
        (torch.float32, torch.bfloat16, (weight, bias)),
        (torch.bfloat16, torch.float32, (bias,)),
        (torch.bfloat16, torch.float16, (weight,)),
        (torch.float64, torch.float32, (weight, bias)),
    ):
        tensors = [t.to(odd if n in at else x) for n, t in enumerate(tensors_of(name))]
        with pytest.raises(TypeError, match=rf"(weight|bias): expected dtype {x} as x has") as error:
            call(name, "auto", tensors)
        assert "\n" not in str(error.value)
        if name == "layer_norm_mean":  # which is F.layer_norm and a mean
            with pytest.raises(RuntimeError, match=r"scalar type|dtype"):
                nn.functional.layer_norm(tensors[0], (C,), *tensors[1:])


@of(ADDED)
@pytest.mark.parametrize(("x", "added"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")])
def test_mixed_dtypes_promote(name, impl, x, added):
    tensors = [t.to(getattr(torch, added if n == ADDED[name] else x)) for n, t in enumerate(tensors_of(name))]
    if name == "add_layer_norm":  # norms of the sum
        total = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
        tensors[2:4] = (t.to(total) for t in tensors[2:4])
    assert_same_dtypes(name, impl, tensors)


def test_onednn_is_asked_only_for_dtypes_it_has(monkeypatch):
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    for dtype, has in ((torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported()), (torch.float16, False)):
        assert (dtype in _extension.onednn_dtypes) == has
        out = nest_fast.linear(x.to(dtype), weight.to(dtype))
        assert relative_error(out, x @ weight.T) < 0.02
    monkeypatch.setattr(_extension, "onednn_dtypes", (torch.float32,))
    with pytest.raises(RuntimeError, match=r"impl: 'onednn' cannot run linear here: oneDNN has no torch.bfloat16"):
        nest_fast.linear(x.bfloat16(), weight.bfloat16(), impl="onednn")


# --- fully masked rows, in-place edits --------------------------------------------------------------------------------

ATTENTION = [i for i in ("auto", "reference", "sdpa", "cpp", "triton") if runs(i)]
KERNELS = ("cpp", "triton")


@pytest.mark.parametrize("impl", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("kind", ["bool", "float", "bias"])
@pytest.mark.parametrize("N", [9, 200])
def test_rows_with_all_keys_masked_are_zeros(impl, dtype, kind, N):
    """Values and all gradients, those of the mask among them; the other rows are as without them."""
    if (impl in KERNELS and dtype == torch.float64) or (impl == "triton" and N == 200):
        return  # they have no float64; and the interpreter takes its time
    keep = torch.rand(HEADS if kind == "bias" else 2, N, N) < 0.7
    keep |= torch.eye(N, dtype=torch.bool)
    keep[0, 3], keep[1, 0], keep[1, N - 1] = False, False, False
    added = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, -math.inf)
    q, k, v = (torch.randn(1, 2, N, HEADS, 8, dtype=dtype).requires_grad_() for _ in range(3))
    extra = {"bias": added} if kind == "bias" else {"mask": keep if kind == "bool" else added}
    given = [q, k, v]
    if kind == "bias" or (kind == "float" and impl not in KERNELS):
        given.append(next(iter(extra.values())).requires_grad_())
    out = nest_fast.block_attention(q, k, v, **extra, impl=impl)
    grads = torch.autograd.grad(out.square().sum(), given)
    assert all(g.isfinite().all() for g in (out, *grads))
    for t, n in ((0, 3), (1, 0), (1, N - 1)):
        where = (0, slice(None), n, t) if kind == "bias" else (0, t, n)
        assert not out[where].any()
        assert not grads[0][where].any()
    scores = torch.einsum("btnhd,btmhd->bthnm", *(x.detach().double() for x in (q, k))) * 8**-0.5
    allowed = keep if kind == "bias" else keep[:, None]
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
    wanted = torch.einsum("bthnm,btmhd->btnhd", weights, v.detach().double())
    assert relative_error(out.detach(), wanted) < (0.02 if dtype == torch.bfloat16 else 1e-5)
    if kind == "float" and impl not in KERNELS:
        assert not grads[3][~keep].any()
        assert grads[3][keep].any()


@pytest.mark.parametrize("impl", [*ATTENTION, "compiled auto"])
@pytest.mark.parametrize("kind", ["mask", "bias"])
@pytest.mark.parametrize(
    ("dtype", "of"),
    [("float32", "float32"), ("float32", "float64"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
)
def test_the_most_negative_number_takes_no_key_away(impl, kind, dtype, of):
    """A row that has it for every key gives their mean, and the gradients of that; elsewhere it hides a key."""
    dtype, of = getattr(torch, dtype), getattr(torch, of)
    added = torch.zeros(2, 17, 17, dtype=of)
    added[:, [0, 5]] = added[:, 7, 3:] = torch.finfo(of).min
    q, k, v = (torch.randn(1, 2, 17, 2, 16, dtype=dtype).requires_grad_() for _ in range(3))
    dout = torch.randn(q.shape).to(dtype)

    def differentiate(q, k, v, added, impl):
        attention = nest_fast.block_attention
        if impl == "compiled auto":
            attention, impl = torch.compile(attention, backend="aot_eager"), "auto"
        out = attention(q, k, v, **{kind: added}, impl=impl)
        return (out, *torch.autograd.grad(out, (q, k, v), dout.to(out.dtype)))

    wide = (x.detach().double().requires_grad_() for x in (q, k, v))
    golden = differentiate(*wide, added.double(), "reference")
    assert_close(golden[0][:, :, 0], v.detach().double().mean(2), atol=1e-12, rtol=1e-12)
    results = differentiate(q, k, v, added, impl)
    # PyTorch's own gradients are those of weights that do not add up to 1, as the docstring says.
    for got, wanted in zip(results[: 1 if impl == "sdpa" else None], golden, strict=impl != "sdpa"):
        assert relative_error(got, wanted) < (0.02 if dtype == torch.bfloat16 else 1e-6)


def test_a_masks_gradient_on_every_path():
    q, k, v, mask = tensors_of("block_attention, mask")
    ours = [differentiated("block_attention, mask", i, (q, k, v, mask))[4] for i in ("auto", "sdpa", "reference")]
    assert_close(ours[0], ours[2])
    assert_close(ours[1], ours[2])
    for impl in filter(runs, KERNELS):
        with pytest.raises(
            RuntimeError, match=f"impl: '{impl}' cannot run block_attention here: it has no gradient of a mask"
        ):
            nest_fast.block_attention(q, k, v, mask=mask.requires_grad_(), impl=impl)
        with torch.no_grad():
            assert_close(*(nest_fast.block_attention(q, k, v, mask=mask, impl=i) for i in (impl, "reference")))


@each_way
def test_an_output_edited_in_place(name, impl):
    """Right gradients, or autograd's error; never wrong ones."""
    tensors = tensors_of(name)
    _, *plain = differentiated(name, "reference", tensors)
    leaves = [t.requires_grad_() for t in tensors]
    outs = TABLE[name][0](*leaves, impl=impl)
    outs = outs if isinstance(outs, tuple) else (outs,)
    for edited in outs:
        edited.mul_(2)
    with contextlib.suppress(RuntimeError):  # autograd's: modified by an inplace operation
        grads = torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])
        assert_close(grads, tuple(2 * g for g in plain))


# --- what is on in PyTorch --------------------------------------------------------------------------------------------


@each
def test_vmap_and_derivatives_of_torch_func(name):
    """vmap, vmap(grad), jacrev of one element and grad of grad are plain PyTorch's, with auto."""
    tensors = tensors_of(name)
    x, rest = tensors[0], tensors[1:]

    def loss(x, impl):
        return call(name, impl, (x, *rest)).square().sum()

    def derivatives(impl):
        return (
            torch.vmap(lambda x: call(name, impl, (x, *rest)))(torch.stack([x, 2 * x])),
            torch.vmap(torch.func.grad(lambda x: loss(x, impl)))(torch.stack([x, 2 * x])),
            torch.func.jacrev(lambda s: loss(x * s, impl))(torch.ones(())),
            torch.func.hessian(lambda s: loss(x * s, impl))(torch.ones(())),
            torch.func.grad(lambda x: torch.func.grad(lambda y: loss(y, impl))(x).square().sum())(x),
        )

    assert_close(derivatives("auto"), derivatives("reference"), rtol=1e-3, atol=1e-3)


@each
def test_gradients_of_gradients_in_float64(name):
    """Where plain PyTorch is what runs, so are all its derivatives."""
    tensors = tensors_of(name, dtype=torch.float64)
    results = []
    for impl in ("auto", "reference"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        (dx,) = torch.autograd.grad(call(name, impl, leaves).square().sum(), leaves[:1], create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), leaves, materialize_grads=True))
    assert_close(*results)


def test_double_backward_of_attention_that_no_kernel_takes():
    q, k, v = (t.requires_grad_() for t in tensors_of("block_attention"))
    mask = torch.randn(2, 5, 5, requires_grad=True)
    (dq,) = torch.autograd.grad(nest_fast.block_attention(q, k, v, mask=mask).sum(), q, create_graph=True)
    assert torch.autograd.grad(dq.square().sum(), k)[0].isfinite().all()


@each
def test_meta_and_fake_tensors(name):
    """Shapes and dtypes without numbers, also under autocast for the CPU; plain PyTorch on "meta"."""
    tensors = tensors_of(name)
    wanted = call(name, "reference", tensors)
    on_meta = [t.to("meta") for t in tensors]
    assert call(name, "auto", on_meta).shape == wanted.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert call(name, "auto", on_meta).shape == wanted.shape
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in tensors]
        out = call(name, "auto", fake)
        assert (out.shape, out.dtype, out.device) == (wanted.shape, wanted.dtype, wanted.device)
        differentiated(name, "auto", fake)


def test_autocast_of_devices_it_does_not_know():
    assert not _modes.under_autocast(torch.empty(1, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert _modes.under_autocast(torch.empty(1))


# Positions that become dimensions of q and k are multiplied.
@of(TABLE.keys() - {"block_attention, positions"})
def test_counts_the_flops_of_plain_pytorch(name, impl):
    """Forward, and forward with backward."""

    def count(impl, training):
        leaves = [t.requires_grad_(training) for t in tensors_of(name)]
        with FlopCounterMode(display=False) as counter:
            out = call(name, impl, leaves)
            if training:
                out.sum().backward()
        return counter.get_total_flops()

    for training in (False, True):
        assert count(impl, training) == count("reference", training)
    assert (count(impl, False) > 0) == ("ify" not in name and "norm" not in name and "gelu" not in name)


@each
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace(name):
    """Traced with gradients on and off, the graph is plain PyTorch's and runs without the package."""
    tensors = tensors_of(name)
    for training in (False, True):
        given = [t.clone().requires_grad_(training) for t in tensors]
        traced = torch.jit.trace(lambda *t: call(name, "auto", t), given)
        assert "nest_fast::" not in str(traced.graph)
        assert "mkldnn::" not in str(traced.graph)
        others = [t + 1 for t in given]
        assert_close(traced(*others), call(name, "reference", others))


def test_sizes_of_a_traced_tensor():
    """Computed from what is traced, sizes are 0-d tensors, in tuples too."""

    def blocks_and_back(x):
        size = x.shape[1] // 2
        blocks = nest_fast.blockify(x, (size, size))
        return nest_fast.unblockify(blocks, (x.shape[1] // size, x.shape[2] // size), (size, size))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.randn(1, 6, 6, 3)
        assert torch.equal(torch.jit.trace(blocks_and_back, x)(x), x)


@each
def test_symbolic_tracing_says_what_to_do(name):
    rest = tensors_of(name)[1:]
    with pytest.raises(TypeError, match=r"got a Proxy: .*nest_fast\.restore\(model\)") as error:
        torch.fx.symbolic_trace(lambda x: call(name, "auto", (x, *rest)))
    assert "\n" not in str(error.value)


class Logging(torch.Tensor):
    """A subclass that computes for itself."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@each_way
def test_a_tensor_subclass_meets_no_kernel(name, impl):
    """Any one of the operands; "auto" is plain PyTorch, a kernel that was asked for says why not."""
    tensors = tensors_of(name)
    wanted = call(name, "reference", tensors)
    for n in range(len(tensors)):
        given = [t.as_subclass(Logging) if i == n else t for i, t in enumerate(tensors)]
        if impl in ("cpp", "triton", "two_step"):
            with pytest.raises(RuntimeError, match="Logging is a subclass of"):
                call(name, impl, given)
        else:
            assert_close(call(name, impl, given).as_subclass(torch.Tensor), wanted)


@each_way
def test_lazily_negated_operands(name, impl):
    """As the imaginary part of a conjugate is: the sign is a bit of the tensor, not in its memory."""
    tensors = tensors_of(name)
    negated = [torch.complex(torch.zeros_like(t), t).conj().imag for t in tensors]
    dense = [torch._neg_view(t) for t in tensors]
    assert all(t.is_neg() for t in negated + dense)
    with torch.no_grad():
        expected = call(name, "reference", [-t for t in tensors])
        assert_close(call(name, impl, negated), expected)
        assert_close(call(name, impl, dense), expected)


def test_factors_are_numbers():
    """A tensor's gradient would be lost."""
    q = torch.zeros(1, 1, 4, 2, 4)
    learnt = torch.ones((), requires_grad=True)
    tensors = tensors_of("attention_layer")
    for wrong in (
        lambda: nest_fast.block_attention(q, q, q, scale=learnt),
        lambda: nest_fast.attention_layer(*tensors, num_heads=HEADS, scale=learnt),
        lambda: nest_fast.attention_layer(*tensors, num_heads=HEADS, branch_scale=learnt),
        lambda: nest_fast.mlp_layer(*tensors_of("mlp_layer"), branch_scale=learnt),
    ):
        with pytest.raises(TypeError, match=r"scale: expected a number, which has no gradient, got a tensor \(\)"):
            wrong()


def test_the_counter_is_not_imported_with_the_package():
    from helpers.common import run_python

    code = "import sys, nest_fast; assert not {'torch.utils.flop_counter', 'triton'} & {*sys.modules};"
    code += "from torch.utils.flop_counter import flop_registry; import torch;"
    code += "assert torch.ops.nest_fast.mlp_layer_cpp in flop_registry"
    run_python("-c", code)


@pytest.mark.parametrize("name", sorted({name.partition(",")[0] for name in TABLE} - {"unblockify", "patchify"}))
def test_every_rule_of_a_backend_has_its_words(name):
    """Also those that nothing breaks here; and "auto" stops at the first one, without words."""
    module = sys.modules[f"nest_fast.ops.{name}"]
    given = [torch.zeros(1, 1, 1, 1, 1)] * 20
    if hasattr(module, "Given"):
        given = module.Given._make(given[: len(module.Given._fields)])
    for backend in module.BACKENDS.values():
        broken = backend._replace(rules=tuple((why, lambda given: True) for why, _ in backend.rules))
        reasons = broken.why_not(given)
        assert len(reasons) == len(backend.rules)
        assert not any("{" in reason or "given" in reason for reason in reasons)
        with pytest.raises(RuntimeError, match=f"impl: '{backend.name}' cannot run {name} here: "):
            broken.require(name, given)
    silent = _backends.Backend("cpp", (("{nobody}", lambda given: True), ("{asks}", lambda given: 1 / 0)))
    assert not silent.can(given)
