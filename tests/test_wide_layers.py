"""mlp_layer and attention_layer in Triton, of wide rows: in the interpreter on a CPU (conftest), compiled on a GPU."""

import math
from functools import partial

import pytest
import torch

from helpers.common import DEVICE, assert_stays_inside_its_buffers
from helpers.layer_kernel_tests import on_device
from helpers.layer_tests import assert_accurate, attention_inputs, mlp_inputs
from helpers.passes import strided
from nest_fast import attention_layer, mlp_layer, windows
from nest_fast.kernels import _configs, _launch, _layer_configs
from nest_fast.kernels._layer_configs import MatmulConfig
from nest_fast.kernels._norm_linear import _groups
from nest_fast.kernels.attention_layer import linear_sum_fwd, norm_linear_fwd
from nest_fast.kernels.mlp_layer import mlp_layer_fwd

BF16, FP16 = torch.bfloat16, torch.float16
POINTERS = MatmulConfig(tile_rows=32, tile_out=128, tile_k=64, num_warps=4, num_stages=2)


@pytest.fixture(params=["pointers", "copies", "resident"])
def form(request, monkeypatch):
    """Small tiles of each form, where they are chosen anew; the copy engine's only where it can."""
    candidates = [POINTERS._replace(copies=request.param == "copies"), POINTERS]
    after_norm = [POINTERS._replace(resident=True)] if request.param == "resident" else candidates
    for table, rows in (("MATMUL_SUM", candidates), ("NORM_MATMUL", [(math.inf, config) for config in after_norm])):
        monkeypatch.setattr(_layer_configs, table, dict.fromkeys((80, 90, 100), rows))
    monkeypatch.setattr(_launch, "CHOSEN", {})
    return request.param


def draw_mlp(*sizes, dtype=BF16, biases=True):
    return on_device(mlp_inputs(*sizes, dtype=dtype), biases)


def draw_attention(*sizes, dtype=BF16, biases=True):
    return on_device(attention_inputs(*sizes, dtype=dtype), biases)


# Rows in several tiles, the last one partial; channels and hidden features that fill their tiles, and that do not; of
# 300 channels no row but every second begins at 16 bytes.
@pytest.mark.parametrize(
    ("sizes", "dtype", "biases"),
    [
        ((2, 1, 35, 288, 576, "gelu"), FP16, True),
        ((1, 2, 32, 384, 640, "gelu_tanh"), BF16, False),
        ((1, 1, 40, 300, 150, "gelu"), BF16, True),
        ((1, 1, 33, 512, 256, "gelu_tanh"), FP16, True),
    ],
    ids=str,
)
def test_a_wide_mlp_is_as_accurate_as_pytorch(form, sizes, dtype, biases):
    tensors, options = draw_mlp(*sizes, dtype=dtype, biases=biases)
    assert_accurate(mlp_layer, tensors, options | {"branch_scale": 1.7}, impl="triton")


@pytest.mark.parametrize(
    ("sizes", "dtype", "biases"),
    [
        ((1, 2, 16, 288, 9, False), BF16, True),
        ((1, 3, 9, 384, 12, True), FP16, False),
        ((2, 1, 16, 300, 3, False), FP16, True),
    ],
    ids=str,
)
def test_wide_attention_is_as_accurate_as_pytorch(form, sizes, dtype, biases):
    tensors, options = draw_attention(*sizes, dtype=dtype, biases=biases)
    assert_accurate(attention_layer, tensors, options | {"branch_scale": 1.7}, impl="triton")


def test_wide_layers_with_the_tables_own_tiles_are_as_accurate_as_pytorch():
    """Of an H100: more rows and columns than a tile has."""
    tensors, options = draw_mlp(1, 1, 150, 384, 300)
    assert_accurate(mlp_layer, tensors, options, impl="triton")
    tensors, options = draw_attention(1, 3, 49, 384, 12, dtype=FP16)
    assert_accurate(attention_layer, tensors, options, impl="triton")


def test_wide_attention_in_the_windows_of_an_image(form):
    tensors, options = draw_attention(2, 1, 42, 288, 9, dtype=FP16)
    tensors[0] = tensors[0].flatten(1, 2)
    assert_accurate(attention_layer, tensors, options | {"windows": windows((6, 7), 4, shift=2)}, impl="triton")


def test_a_wide_mlp_has_a_factor_for_each_sample(form):
    tensors, options = draw_mlp(3, 1, 25, 288, 128, dtype=FP16)
    factors = torch.arange(3, device=DEVICE) * 0.7

    def layer(*tensors, **options):
        return mlp_layer(*tensors, **options, branch_scale=factors.to(tensors[0].dtype))

    assert_accurate(layer, tensors, options, impl="triton")


@pytest.mark.parametrize("half", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("where", ["every channel", "the first channels", "one channel"])
def test_of_wide_rows_far_from_zero(form, half, where):
    """All of a row, or those of whose mean its deviation is told, or one of them."""
    tensors, options = draw_mlp(1, 1, 40, 384, 128, dtype=half)
    tensors[1:3] = (t.float() for t in tensors[1:3])
    channels = {"every channel": slice(None), "the first channels": slice(64), "one channel": slice(300, 301)}[where]
    tensors[0][..., channels] += 40.0
    assert_accurate(mlp_layer, tensors, options, impl="triton")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's on inf - inf, which is what is meant
def test_wide_layers_keep_special_values_where_pytorch_does(form):
    """Those of a row, and of the one that is read again for rows that do not exist, stay in it."""
    tensors, options = draw_mlp(1, 1, 45, 288, 130, dtype=FP16)
    for row, value in ((3, math.nan), (44, math.inf), (7, -math.inf)):
        tensors[0][0, 0, row, 100] = value
    out, wanted = (mlp_layer(*tensors, **options, impl=impl) for impl in ("triton", "reference"))
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.isnan().any(-1).sum(), torch.tensor(3, device=DEVICE))


def test_wide_layers_of_any_strides(form):
    for layer, (tensors, options) in (
        (mlp_layer, draw_mlp(1, 2, 20, 288, 130)),
        (attention_layer, draw_attention(1, 2, 16, 288, 9)),
    ):
        wanted = layer(*tensors, **options, impl="triton")
        for strange in strided(tensors[0]):
            assert torch.equal(layer(strange, *tensors[1:], **options, impl="triton"), wanted)


def test_wide_layers_repeat_bit_by_bit(form, monkeypatch):
    """A row is computed alike beside any others, however many programs share it."""
    tensors, options = draw_mlp(1, 1, 150, 288, 300)
    call = partial(mlp_layer, **options, impl="triton")
    first = call(*tensors)
    assert torch.equal(call(tensors[0][:, :, :77], *tensors[1:]), first[:, :, :77])
    monkeypatch.setattr(_configs, "multiprocessors", lambda _: 2)
    assert torch.equal(call(*tensors), first)


@pytest.mark.parametrize(("C", "out"), [(288, 136), (300, 67)])
def test_wide_layers_stay_inside_their_buffers(form, C, out):
    sizes = (45, C), (C,), (C,), (out, C), (out,), (C, out), (C,), (45, out)
    tensors = [torch.randn(size, device=DEVICE).to(BF16) for size in sizes]

    def everything(copy):
        x, norm_weight, norm_bias, weight, bias, back, back_bias, residual = map(copy, tensors)
        norm = norm_weight, norm_bias, 1e-6
        return [
            norm_linear_fwd(x, *norm, weight, bias),
            linear_sum_fwd(x, weight, bias, residual, 0.5),
            mlp_layer_fwd(x, *norm, weight, bias, True, back, back_bias, 1.0),
        ]

    assert_stays_inside_its_buffers(everything)


def test_programs_share_rows_where_there_are_few():
    """Level 3 of NesT-S at batch 1 and 256: its fc1 on an H100, 64 columns at a time of rows that are kept, or 256."""
    assert _groups(2, 24, 132, 4.0) == 24
    assert _groups(392, 24, 132, 4.0) == 1
    assert _groups(2, 6, 132, 0.5) == 6
    assert _groups(392, 6, 132, 0.5) == 1


@pytest.mark.parametrize(("C", "dtype", "most"), [(_layer_configs.ON_CHIP + 1, torch.float32, 256), (769, FP16, 768)])
def test_of_too_many_channels_is_refused(C, dtype, most):
    for layer, (tensors, options) in (
        (mlp_layer, draw_mlp(1, 1, 3, C, 40, dtype=dtype)),
        (attention_layer, draw_attention(1, 1, 3, C, C, dtype=dtype)),
    ):
        with pytest.raises(RuntimeError, match=f"C = {C} channels are over {most}"):
            layer(*tensors, **options, impl="triton")


def test_wide_layers_of_nothing_hidden():
    tensors, options = draw_mlp(2, 3, 4, 288, 0, dtype=FP16)
    torch.testing.assert_close(
        mlp_layer(*tensors, **options, impl="triton"), mlp_layer(*tensors, **options, impl="reference")
    )
