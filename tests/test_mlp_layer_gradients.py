"""mlp_layer's gradients in Triton: in the interpreter on a CPU, compiled on a GPU.

Of narrow rows they know x alone; of those with over 128 channels what fc1 gives is kept, too.
"""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from helpers.common import DEVICE, assert_stays_inside_its_buffers, saved_bytes
from helpers.layer_kernel_tests import on_device
from helpers.layer_tests import mlp_inputs
from helpers.passes import strided
from nest_fast import mlp_layer
from nest_fast.kernels import _configs, _launch, _layer_configs
from nest_fast.kernels._layer_configs import MatmulConfig
from nest_fast.kernels._mlp_gradients import mlp_layer_bwd
from nest_fast.kernels._wide_mlp import wide_mlp_bwd, wide_mlp_fwd
from nest_fast.testing import gradients, relative_error

OPS = torch.ops.nest_fast
BF16, FP16 = torch.bfloat16, torch.float16
NAMES = ("x", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def draw(*sizes, dtype=FP16, biases=True, scales=False):
    """As mlp_layer's; with a factor for each sample, the first of which is dropped."""
    tensors, options = on_device(mlp_inputs(*sizes, dtype=dtype), biases)
    if scales:
        options["branch_scale"] = torch.arange(sizes[0], device=DEVICE, dtype=dtype) * 0.7
    return tensors, options


@pytest.fixture
def few(monkeypatch):
    """Multiprocessors, so that a program of the weights' gradients has several tiles of rows."""
    monkeypatch.setattr(_configs, "multiprocessors", lambda device: 2)


@pytest.fixture(params=["pointers", "copies"])
def form(request, monkeypatch, few):
    """Small tiles of either form for wide rows, where they are chosen anew; the copy engine's only where it can."""
    pointers = MatmulConfig(tile_rows=32, tile_out=64, tile_k=32, num_warps=4, num_stages=2)
    candidates = [pointers._replace(copies=request.param == "copies"), pointers]
    tables = dict.fromkeys(("MATMUL_SUM", "MLP_BWD_HIDDEN", "MLP_BWD_WEIGHT"), candidates)
    for table, rows in (*tables.items(), ("NORM_MATMUL", [(math.inf, config) for config in candidates])):
        monkeypatch.setattr(_layer_configs, table, dict.fromkeys((80, 90, 100), rows))
    monkeypatch.setattr(_launch, "CHOSEN", {})


@pytest.fixture(params=[24, 136], ids=["narrow", "wide"])
def C(request):
    return request.param


def run(tensors, options, dout, impl, wanted=NAMES):
    """The gradients of those tensors that are wanted, by name."""
    leaves = [
        t if t is None else t.detach().requires_grad_(name in wanted) for name, t in zip(NAMES, tensors, strict=True)
    ]
    mlp_layer(*leaves, **options, impl=impl).backward(dout)
    return {name: t.grad for name, t in zip(NAMES, leaves, strict=True) if t is not None and t.grad is not None}


def errors(tensors, options, dout):
    """Of each gradient, of x without dout, which would hide it: the error from float64, and plain PyTorch's."""
    wide = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    wide_tensors = [t if t is None else t.double() for t in tensors]
    ours, plain, exact = (
        run(tensors, options, dout, "triton"),
        run(tensors, options, dout, "reference"),
        run(wide_tensors, wide, dout.double(), "reference"),
    )
    assert {name: (g.dtype, g.shape) for name, g in ours.items()} == {
        name: (g.dtype, g.shape) for name, g in plain.items()
    }
    for found in (ours, plain, exact):
        found["x"] = found["x"].double() - dout.double()
    return {name: (relative_error(ours[name], g), relative_error(plain[name], g)) for name, g in exact.items()}


# Rows in several tiles and stripes, the last ones partial; C and hidden features that fill their tiles, and do not.
@pytest.mark.parametrize(
    ("sizes", "dtype", "more"),
    [
        ((2, 1, 98, 96, 384, "gelu"), BF16, {}),
        ((1, 2, 65, 100, 130, "gelu_tanh"), FP16, {}),
        ((3, 1, 50, 64, 100, "gelu"), FP16, {"scales": True}),
        ((1, 1, 150, 128, 256, "gelu_tanh"), BF16, {"biases": False}),
    ],
    ids=str,
)
def test_gradient_is_as_accurate_as_pytorchs_in_triton(few, sizes, dtype, more):
    tensors, options = draw(*sizes, dtype=dtype, **more)
    if "scales" not in more:
        options["branch_scale"] = 1.7
    for name, (error, theirs) in errors(tensors, options, torch.randn_like(tensors[0])).items():
        assert error <= 1.25 * theirs, f"{name}: error {error:.3e}, plain PyTorch's {theirs:.3e}"


# Of 140 and 67 numbers, or 150, no row but the first, or every second, begins at 16 bytes.
@pytest.mark.parametrize(
    ("sizes", "dtype", "more"),
    [
        ((2, 1, 49, 192, 384, "gelu"), BF16, {}),
        ((3, 1, 30, 136, 200, "gelu_tanh"), FP16, {"scales": True}),
        ((1, 2, 35, 288, 150, "gelu"), FP16, {"biases": False}),
        ((1, 1, 70, 140, 67, "gelu_tanh"), BF16, {"scales": True}),
    ],
    ids=str,
)
def test_gradient_of_a_wide_layer_is_as_accurate_as_pytorchs_in_triton(form, sizes, dtype, more):
    tensors, options = draw(*sizes, dtype=dtype, **more)
    if "scales" not in more:
        options["branch_scale"] = 1.7
    for name, (error, theirs) in errors(tensors, options, torch.randn_like(tensors[0])).items():
        assert error <= 1.25 * theirs, f"{name}: error {error:.3e}, plain PyTorch's {theirs:.3e}"


def test_gradient_of_a_wide_layer_with_the_tables_own_tiles_is_as_accurate_as_pytorchs_in_triton():
    """Of an H100: more rows and columns than a tile has."""
    tensors, options = draw(2, 1, 70, 384, 272, dtype=BF16)
    for name, (error, theirs) in errors(tensors, options, torch.randn_like(tensors[0])).items():
        assert error <= 1.25 * theirs, f"{name}: error {error:.3e}, plain PyTorch's {theirs:.3e}"


def test_gradient_mixed_dtypes_norms_in_float32_in_triton(C):
    tensors, options = draw(1, 1, 40, C - 14, 24)
    tensors[1:3] = (t.float() for t in tensors[1:3])
    for name, (error, theirs) in errors(tensors, options, torch.randn_like(tensors[0])).items():
        assert error <= 2 * theirs, name


def test_gradient_of_any_strides_in_triton(C):
    tensors, options = draw(1, 2, 20, C, 40)
    dout = torch.randn_like(tensors[0])
    wanted = run(tensors, options, dout, "triton")
    for strange in strided(dout):
        assert not strange.is_contiguous()
        got = run(tensors, options, strange, "triton")
        assert all(torch.equal(got[name], wanted[name]) for name in NAMES)
    summed = run(tensors, options, torch.ones((), dtype=FP16, device=DEVICE).expand(dout.shape), "triton")
    ones = run(tensors, options, torch.ones_like(dout), "triton")
    assert all(torch.equal(summed[name], ones[name]) for name in NAMES)


def test_gradient_repeats_bit_by_bit_in_triton(few, C):
    tensors, options = draw(2, 1, 150, C, 40, dtype=BF16)
    dout = torch.randn_like(tensors[0])
    first, again = (run(tensors, options, dout, "triton") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in NAMES)


class WhatIsComputed(TorchDispatchMode):
    """Which gradients the backward's operation returned."""

    wanted = None

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        if op in (OPS.mlp_layer_triton_bwd.default, OPS.mlp_layer_triton_wide_bwd.default):
            self.wanted = [x.numel() > 0 for x in results]
        return results


@pytest.mark.parametrize(
    ("wanted", "computed"),
    [
        (("x",), [True, True, False, False, False, False]),
        (("norm_bias", "fc2_weight"), [True, True, False, False, True, False]),
        (("fc1_weight", "fc1_bias"), [False, False, True, True, False, False]),
        (("fc2_weight",), [False, False, False, False, True, False]),
        (("fc2_bias",), [False, False, False, False, False, True]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value[0], str) else "",
)
def test_each_gradient_alone_in_triton(few, C, wanted, computed):
    """Frozen weights: the others' gradients keep their bits."""
    tensors, options = draw(3, 1, 50, C, 40, scales=True)
    dout = torch.randn_like(tensors[0])
    together = run(tensors, options, dout, "triton")
    with WhatIsComputed() as seen:
        alone = run(tensors, options, dout, "triton", wanted)
    assert seen.wanted == computed
    assert set(alone) == set(wanted)
    assert all(torch.equal(alone[name], together[name]) for name in wanted)


@pytest.mark.parametrize(("C", "hidden", "dtype", "samples"), [(20, 70, BF16, True), (100, 64, FP16, False)])
def test_gradient_stays_inside_its_buffers_in_triton(few, C, hidden, dtype, samples):
    tensors, options = draw(3, 1, 55, C, hidden, dtype=dtype, scales=samples)
    dout, scales = torch.randn_like(tensors[0]), options.get("branch_scale")

    def everything(copy):
        x, norm_weight, norm_bias, fc1, fc1_bias, fc2, _ = map(copy, tensors)
        before = copy(dout), x, norm_weight, norm_bias, 1e-6, fc1, fc1_bias, False, fc2, 1.7, copy(scales)
        return mlp_layer_bwd(*before, [True] * 4)

    assert_stays_inside_its_buffers(everything)


@pytest.mark.parametrize(("C", "hidden", "samples"), [(136, 200, True), (140, 67, False)])
def test_gradient_of_a_wide_layer_stays_inside_its_buffers_in_triton(form, C, hidden, samples):
    tensors, options = draw(3, 1, 25, C, hidden, dtype=BF16, scales=samples)
    dout, scales = torch.randn_like(tensors[0]), options.get("branch_scale")

    def everything(copy):
        x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias = map(copy, tensors)
        norm, factors = (norm_weight, norm_bias), (1.7, copy(scales))
        kept = wide_mlp_fwd(x, *norm, 1e-6, fc1, fc1_bias, False, fc2, fc2_bias, *factors)
        return *kept, *wide_mlp_bwd(copy(dout), x, *kept[1:], *norm, fc1, False, fc2, *factors, [True] * 4)

    assert_stays_inside_its_buffers(everything)


@pytest.mark.parametrize("where", [0, 7], ids=["x", "dout"])
def test_gradient_keeps_special_values_where_pytorchs_does_in_triton(few, C, where):
    """In its row, and where rows are summed."""
    tensors, options = draw(1, 2, 70, C, 40)
    given = [*tensors, torch.randn_like(tensors[0])]
    for value in (math.nan, math.inf):
        given[where][0, 1, 3, 4] = value
        ours, plain = (run(given[:7], options, given[7], impl) for impl in ("triton", "reference"))
        for name in NAMES:
            assert torch.equal(ours[name].isfinite(), plain[name].isfinite()), name
        assert not any(ours[name].isfinite().all() for name in NAMES[:-1])


def test_saves_little_for_the_gradient_in_triton():
    """x, which is there anyway, and nothing else."""
    tensors, options = draw(2, 4, 16, 64, 256)
    leaves = [t.requires_grad_() for t in tensors]
    x = leaves[0] * 1  # saved as an activation is
    assert saved_bytes(lambda: mlp_layer(x, *leaves[1:], **options, impl="triton")) == x.nbytes


def test_a_wide_layer_keeps_what_fc1_gives_in_triton():
    """And x, and two numbers for each row."""
    tensors, options = draw(2, 4, 16, 136, 272)
    leaves = [t.requires_grad_() for t in tensors]
    x = leaves[0] * 1  # saved as an activation is
    rows = 2 * 4 * 16
    kept = saved_bytes(lambda: mlp_layer(x, *leaves[1:], **options, impl="triton"))
    assert kept == x.nbytes + 2 * 272 * rows + 2 * 4 * rows


@pytest.mark.parametrize("sizes", [(2, 3, 0, 16), (2, 3, 4, 0), (0, 3, 4, 16)], ids=str)
def test_gradient_of_nothing_in_triton(C, sizes):
    tensors, options = draw(*sizes[:3], C, sizes[3], scales=sizes[0] > 0)
    dout = torch.randn_like(tensors[0])
    ours, plain = (run(tensors, options, dout, impl) for impl in ("triton", "reference"))
    for name in NAMES:
        torch.testing.assert_close(ours[name], plain[name], rtol=2e-3, atol=2e-3)


def test_gradient_counts_the_flops_of_plain_pytorch_in_triton(C):
    tensors, options = draw(2, 3, 5, C, 40)
    for wanted in (NAMES, ("x",), ("fc2_weight",), ("fc1_weight", "fc2_bias"), ("fc2_bias",)):
        counted = []
        for impl in ("triton", "reference"):
            with FlopCounterMode(display=False) as counter:
                run(tensors, options, torch.randn_like(tensors[0]), impl, wanted)
            counted.append(counter.get_total_flops())
        assert counted[0] == counted[1] > 0, wanted


def test_refuses_gradients_of_gradients_in_triton(C):
    tensors, options = draw(1, 1, 5, C, 40)
    leaves = [t.requires_grad_() for t in tensors]
    (dx,) = torch.autograd.grad(mlp_layer(*leaves, **options, impl="triton").sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="impl: expected 'reference' for a derivative of mlp_layer's"):
        dx.square().sum().backward()


def test_gradient_opcheck_in_triton():
    (x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias), _ = draw(2, 3, 5, 24, 40)
    norm, scales = (norm_weight, norm_bias, 1e-6), torch.rand(2, device=DEVICE, dtype=FP16)
    leaves = (t.clone().requires_grad_() for t in (x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias))
    one, *norm_leaves, two, three, four, five = leaves
    call = (one, *norm_leaves, 1e-6, two, three, True, four, five, 1.0, scales)
    torch.library.opcheck(OPS.mlp_layer_triton_fwd.default, call)
    for mask, factor in (([True] * 4, None), ([False, True, False, True], scales)):
        call = (torch.randn_like(x), x, *norm, fc1, fc1_bias, True, fc2, 1.0, factor, mask)
        torch.library.opcheck(OPS.mlp_layer_triton_bwd.default, call)


def test_gradient_of_a_wide_layer_opcheck_in_triton():
    (x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias), _ = draw(2, 3, 5, 136, 40)
    scales = torch.rand(2, device=DEVICE, dtype=FP16)
    leaves = (t.clone().requires_grad_() for t in (x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias))
    one, *norm_leaves, two, three, four, five = leaves
    call = (one, *norm_leaves, 1e-6, two, three, True, four, five, 1.0, scales)
    torch.library.opcheck(OPS.mlp_layer_triton_wide.default, call)
    kept = OPS.mlp_layer_triton_wide(x, norm_weight, norm_bias, 1e-6, fc1, None, True, fc2, None, 1.0, None)[1:]
    for mask, factor in (([True] * 4, None), ([False, True, False, True], scales)):
        call = (torch.randn_like(x), x, *kept, norm_weight, norm_bias, fc1, True, fc2, 1.0, factor, mask)
        torch.library.opcheck(OPS.mlp_layer_triton_wide_bwd.default, call)


def test_gradient_compiles_in_one_graph_in_triton(C):
    tensors, options = draw(2, 3, 5, C, 40, scales=True)
    call = partial(mlp_layer, **options, impl="triton")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    dout = torch.randn_like(tensors[0])
    assert all(map(torch.equal, gradients(compiled, tensors, dout), gradients(call, tensors, dout)))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float32}, "its gradients are in half precision"),
        ({"C": 513}, "C = 513 channels are over 512"),
        ({"learned": True}, "branch_scale wants a gradient"),
    ],
    ids=str,
)
def test_gradient_an_explicit_choice_never_falls_back_in_triton(change, why):
    tensors, options = draw(1, 1, 3, change.get("C", 24), 40, dtype=change.get("dtype", FP16), scales=True)
    options["branch_scale"].requires_grad_(change.get("learned", False))
    tensors[3].requires_grad_()
    with pytest.raises(RuntimeError, match=f"^impl: 'triton' cannot run mlp_layer here: {why}$"):
        mlp_layer(*tensors, **options, impl="triton")
    with torch.no_grad():
        mlp_layer(*tensors, **options, impl="triton")


@pytest.mark.gpu
def test_gradient_offsets_are_64_bit_in_triton():
    rows, C = 2**31 // 128 + 77, 128
    tensors, options = draw(1, 1, 1, C, 32, dtype=BF16)
    x = torch.zeros(rows, C, dtype=BF16, device=DEVICE)
    x[-1] = torch.randn(C)
    dout = torch.zeros_like(x)
    dout[-1] = torch.randn(C)
    ours = run([x, *tensors[1:]], options, dout, "triton")
    plain = run([x[-1:], *tensors[1:]], options, dout[-1:], "reference")
    assert relative_error(ours["x"][-1:], plain["x"]) < 1e-2
    assert not ours["x"][:-1].any()
    assert all(relative_error(ours[name], plain[name]) < 1e-2 for name in NAMES[1:])
