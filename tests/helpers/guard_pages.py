"""Every C++ operation on tensors beside guard pages, which nobody may read or write: a fuzzer.

``python tests/helpers/guard_pages.py --cases 5000`` draws so many, each from its number, and prints those that fail;
``--first NUMBER --cases 1`` repeats one; ``test_guard_pages.py`` has a shorter form. A kernel that goes one byte beyond
a tensor, its input or its result, kills its process: it is a copy of this one, which says what that was at and goes on.
That this is seen is shown first, in every run, on both sides of a tensor. Memory of a kernel's own is what the
AddressSanitizer sees (``make sanitize``).
"""

from __future__ import annotations

import argparse
import ctypes
import math
import mmap
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import nest_fast
from helpers.common import DTYPES, ISAS, instructions
from helpers.strides import restrided
from nest_fast import attention_layer, block_aggregate, block_attention, blockify, mlp_layer, patchify, unblockify

FLOATS = (torch.float64, *DTYPES.values())

# --- memory -----------------------------------------------------------------------------------------------------------

_LIBC = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0
# Which end of what is allocated now lies at a guard page: "start", "end", or "" for memory as usual.
_guarded = ""


def allocate(numel: int, dtype: torch.dtype) -> Tensor:
    """``(numel,)`` full of NaN, or of bits that are ones."""
    count = max(numel, 1)
    nbytes = count * dtype.itemsize
    if _guarded:
        room = math.ceil(nbytes / mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, room + mmap.PAGESIZE)
        page = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + (room if _guarded == "end" else 0)
        if _LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
        offset = room - nbytes if _guarded == "end" else mmap.PAGESIZE
        x = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
    else:
        x = torch.empty(count, dtype=dtype)
    x.view(torch.uint8).fill_(255)
    return x[count - numel :]


def placed(x: Tensor) -> Tensor:
    """A copy of ``x`` with its strides, from the first byte of its memory to the last."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    once = [1 if stride == 0 else size for size, stride in zip(x.shape, x.stride(), strict=True)]
    copy = allocate(span, x.dtype).as_strided(once, x.stride())
    return copy.copy_(x[tuple(map(slice, once))]).as_strided(x.shape, x.stride())


def _new_empty(x, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    size = torch.Size(size)
    return allocate(size.numel(), dtype or x.dtype).view(size)


def _copied(x, *, dtype=None, memory_format=None, **_):
    if not isinstance(x, Tensor):  # a Python number, on its way to become one
        return torch.scalar_tensor(x, dtype=dtype)
    like = torch.empty_like(x, dtype=dtype, memory_format=memory_format or torch.preserve_format)
    return allocate(x.numel(), like.dtype).as_strided(like.shape, like.stride()).copy_(x)


def place_what_pytorch_allocates() -> torch.library.Library:
    """The kernels' results, and copies that are made for them, from now on beside guard pages, too."""
    library = torch.library.Library("aten", "IMPL")
    for name, function in {"new_empty": _new_empty, "clone": _copied, "_to_copy": _copied}.items():
        library.impl(name, function, "CPU")
    return library


# --- cases ------------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    function: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    options: dict
    impl: str = "cpp"
    constant: tuple[str, ...] = ()  # tensors without a gradient


def _size(random, most):
    """Often a small one, and one of any."""
    return random.choice((1, random.randint(1, 20), random.randint(1, most)))


def _normal(*size, scale=1.0):
    return torch.randn(size) * scale


def _weight(outputs, inputs):
    return _normal(outputs, inputs, scale=inputs**-0.5)


def _some(random, tensors):
    return {name: x for name, x in tensors.items() if random.random() < 0.5}


def _cast(tensors, dtype, random):
    """In ``dtype``; what is read in float32 mostly so, otherwise it is copied first."""
    wide = ("bias", "mask", "norm_weight", "norm_bias")
    keep = dtype != torch.float64 and random.random() < 0.8
    return {name: x if keep and name in wide else x.to(dtype) for name, x in tensors.items()}


def _scores(random, heads, T, N):
    mask = _normal(random.choice([n for n in range(1, T + 1) if T % n == 0]), N, N)
    mask[0] *= random.random() < 0.5  # a group without a mask has a path of its own
    return _some(random, {"bias": _normal(heads, N, N), "mask": mask})


def _block_attention(random, dtype):
    B, T, heads, N, d = random.choice((0, 1, 2)), random.randint(1, 3), random.randint(1, 3), *_sizes(random)
    kv_heads, added = random.choice((1, heads)), _scores(random, heads, T, N)
    if random.random() < 0.5:  # one tensor, of which q, k and v are views

        def function(packed, **options):
            return block_attention(*packed.split((heads, kv_heads, kv_heads), 3), **options)

        tensors = {"packed": _normal(B, T, N, heads + 2 * kv_heads, d)}
    else:
        function = block_attention
        tensors = {name: _normal(B, T, N, heads if name == "q" else kv_heads, d) for name in "qkv"}
    return Call(function, _cast(tensors | added, dtype, random), {}, constant=("mask",))


def _attention_in_windows(random, dtype):
    """Often without gradients, where the kernel reads an image, and with scores by row and by column."""
    B, heads, d, windows = random.choice((0, 1, 2)), random.randint(1, 3), _size(random, 40), _windows(random)
    kv_heads = random.choice((1, heads))
    added = _scores(random, heads, windows.blocks, windows.tokens) if random.random() < 0.5 else {}
    tensors = {name: _normal(B, windows.rows, heads if name == "q" else kv_heads, d) for name in "qkv"}
    if not added:
        edges = zip(("rel_h", "rel_w"), windows.window, strict=True)
        tensors |= {name: _normal(B, windows.rows, heads, edge) for name, edge in edges}
    if random.random() < 0.7:
        count = random.choice((1, max(windows.pads, 1)))
        tensors |= {name: _normal(count, kv_heads, d) for name in ("pad_k", "pad_v")}
    constant = ("mask", "pad_k", "pad_v") if windows.pads == 0 else ("mask",)
    if random.random() < 0.6:
        constant = tuple(tensors | added)
    return Call(block_attention, _cast(tensors | added, dtype, random), {"windows": windows}, constant=constant)


def _windows(random):
    size, window = [tuple(random.randint(1, most) for _ in range(2)) for most in (14, 7)]
    shift = random.choice(((0, 0), tuple(random.randrange(side) for side in window)))
    return nest_fast.windows(size, window, shift=shift, pad_first=random.random() < 0.5)


def _sizes(random):
    """Tokens and channels, of which either may be many."""
    return random.choice(((_size(random, 40), _size(random, 40)), (_size(random, 220), 7), (5, _size(random, 150))))


def _attention_layer(random, dtype):
    B, heads, multi_query, cosine = random.choice((0, 1, 2)), random.randint(1, 3), *random.choices((True, False), k=2)
    N, d = _sizes(random)
    C = heads * -(-d // heads)
    packed = C + 2 * (C // heads if multi_query and not cosine else C)
    options = {
        "num_heads": heads,
        "multi_query": multi_query and not cosine,
        "cosine": cosine,
        "post_norm": random.random() < 0.3,
        "branch_scale": random.choice((1.0, 1.25)),
    }
    if random.random() < 0.5:
        windows = _windows(random)
        options["windows"], T, N = windows, windows.blocks, windows.tokens
        x = _normal(B, windows.rows, C)
    else:
        T = random.randint(1, 3)
        x = _normal(B, T, N, C)
    tensors = {
        "x": x,
        "norm_weight": 1 + _normal(C, scale=0.3),
        "norm_bias": _normal(C, scale=0.3),
        "qkv_weight": _weight(packed, C),
        "qkv_bias": _normal(packed, scale=0.3),
        "proj_weight": _weight(C, C),
        "proj_bias": _normal(C, scale=0.3),
    }
    tensors |= _scores(random, heads, T, N) | ({"scale": _normal(heads).abs()} if cosine else {})
    # Without a bias q and k of padding are zeros, which have no length in float16.
    return _layer(
        random, attention_layer, tensors, ("proj_bias",) if cosine else ("qkv_bias", "proj_bias"), options, dtype
    )


def _layer(random, function, tensors, biases, options, dtype):
    for name in biases:
        if random.random() < 0.2:
            options[name] = None
            del tensors[name]
    if tensors["norm_weight"].numel() <= 2:  # of little variance: 1 / sqrt(1e-6) would magnify what PyTorch rounds
        options["eps"] = 1.0
    return Call(function, _cast(tensors, dtype, random), options, constant=("mask",))


def _mlp_layer(random, dtype):
    (rows, C), hidden = _sizes(random), _size(random, 200)
    tensors = {
        "x": _normal(random.choice((0, 1, 2)), rows, C),
        "norm_weight": 1 + _normal(C, scale=0.3),
        "norm_bias": _normal(C, scale=0.3),
        "fc1_weight": _weight(hidden, C),
        "fc1_bias": _normal(hidden, scale=0.3),
        "fc2_weight": _weight(C, hidden),
        "fc2_bias": _normal(C, scale=0.3),
    }
    options = {
        "activation": random.choice(("gelu", "gelu_tanh")),
        "post_norm": random.random() < 0.3,
        "branch_scale": random.choice((1.0, 1.25)),
    }
    return _layer(random, mlp_layer, tensors, ("fc1_bias", "fc2_bias"), options, dtype)


def _block_aggregate(random, dtype):
    B, C, C_out = random.choice((0, 1, 2)), _size(random, 70), _size(random, 70)
    options = {"padding": random.choice(("symmetric", "same"))}
    (gh, gw), (bh, bw) = [[random.randint(1, most) for _ in range(2)] for most in (2, 5)]
    if random.random() < 0.5:
        options |= {"grid_size": (2 * gh, 2 * gw), "block_size": (bh, bw)}
        x, pos_embed = _normal(B, 4 * gh * gw, bh * bw, C), _normal(1, gh * gw, bh * bw, C_out)
    else:
        x, pos_embed = _normal(B, 2 * bh, 2 * bw, C), _normal(1, bh, bw, C_out)
    tensors = {
        "x": x,
        "conv_weight": _normal(C_out, C, 3, 3, scale=(9 * C) ** -0.5),
        "norm_weight": 1 + _normal(C_out, scale=0.3),
        "norm_bias": _normal(C_out, scale=0.3),
    }
    tensors |= _some(random, {"conv_bias": _normal(C_out, scale=0.3), "pos_embed": pos_embed})
    options |= {} if "conv_bias" in tensors else {"conv_bias": None}
    return Call(block_aggregate, _cast(tensors, dtype, random), options, random.choice(("cpp", "two_step")))


def _moved(random, dtype):
    """blockify, unblockify or patchify."""
    B, C = random.choice((0, 1, 2)), _size(random, 40)
    (gh, gw), (bh, bw), (ph, pw) = [[random.randint(1, most) for _ in range(2)] for most in (4, 5, 3)]
    dtype = random.choice((dtype, torch.float64, torch.uint8, torch.complex128))
    pos_embed = {"pos_embed": _normal(1, gh * gw, bh * bw, C)} if dtype in FLOATS and random.random() < 0.5 else {}
    function, x, options = random.choice(
        (
            (blockify, _normal(B, gh * bh, gw * bw, C), {"block_size": (bh, bw)}),
            (unblockify, _normal(B, gh * gw, bh * bw, C), {"grid_size": (gh, gw), "block_size": (bh, bw)}),
            (
                patchify,
                _normal(B, C, gh * bh * ph, gw * bw * pw),
                {"patch_size": (ph, pw), "block_size": (bh, bw)},
            ),
        )
    )
    tensors = {"x": x} | ({} if function is patchify else pos_embed)
    return Call(function, {name: (9 * x).to(dtype) for name, x in tensors.items()}, options)


def _beyond(random, dtype):
    """No operation: it reads the byte that lies at the guard page, to show that this is seen."""

    def function(x, impl):
        if _guarded:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # not a finding of the AddressSanitizer's
            ctypes.string_at(x.data_ptr() + (x.nbytes if _guarded == "end" else -1), 1)
        return x.clone()

    return Call(function, {"x": _normal(_size(random, 3000)).to(dtype)}, {})


OPERATIONS = {
    "block_attention": _block_attention,
    "block_attention in windows": _attention_in_windows,
    "attention_layer": _attention_layer,
    "mlp_layer": _mlp_layer,
    "block_aggregate": _block_aggregate,
    "blockify": _moved,
}

# --- one case ---------------------------------------------------------------------------------------------------------


def _compute(call: Call, tensors: dict[str, Tensor], wanted: list[str], dout: Tensor | None, impl: str):
    """The result and the gradients of ``wanted``, for ``dout`` or, without one, a random one, which comes last."""
    leaves = {name: placed(x).requires_grad_(name in wanted) for name, x in tensors.items()}
    out = call.function(**leaves, **call.options, impl=impl)
    if not wanted:
        return [out], None
    dout = torch.randn(out.shape).to(out.dtype) if dout is None else placed(dout)
    return [out.detach(), *torch.autograd.grad(out, [leaves[name] for name in wanted], dout)], dout


def _laid_out(name: str, x: Tensor, random) -> Tensor:
    """In memory of any strides; channels differ, or a LayerNorm would make numbers of the rounding of equal ones."""
    return restrided(x, random, () if name.endswith("weight") else range(x.dim() - 1))


def _assert_near(what: str, got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype, largest: float) -> None:
    """Not how exact a kernel is, which its own tests ask, but that it took the numbers that it was given.

    ``largest`` is of all results: what cancels in one, as a softmax's gradient of one token, is of that size.
    """
    if not got.is_floating_point():
        assert torch.equal(got, plain), f"{what} is not what plain PyTorch gives"
    elif got.numel():
        eps = torch.finfo(dtype if dtype in FLOATS else got.dtype).eps
        error, others = ((x.double() - exact).abs().max().item() for x in (got, plain))
        allowed = 16 * others + 32 * eps * largest
        assert error <= allowed, f"{what}: error {error:.1e}, plain PyTorch's {others:.1e}, allowed {allowed:.1e}"


def run(number: int, operations: dict, say: Callable[[str], object]) -> None:
    """Case ``number``: the same bits as in memory as usual, and what plain PyTorch gives in float64.

    Its random numbers are those of ``number``. ``say`` hears what it is, before anything is computed.
    """
    global _guarded
    random_ = random.Random(number)
    torch.manual_seed(number)
    name = random_.choice(list(operations))
    dtype = random_.choice(list(DTYPES.values()))
    call = operations[name](random_, dtype)
    isa = random_.choice((*ISAS, "baseline") if name == "blockify" else ISAS)
    threads, guarded = random_.choice((1, 1, 2)), random_.choice(("start", "end"))
    tensors = {n: _laid_out(n, x, random_) if random_.random() < 0.3 else x for n, x in call.tensors.items()}
    differentiable = [n for n, x in tensors.items() if x.is_floating_point() and n not in call.constant]
    wanted = [n for n in differentiable if random_.random() < 0.7] if random_.random() < 0.8 else []
    shapes = ", ".join(f"{n} {tuple(x.shape)} by {x.stride()}" for n, x in tensors.items())
    numbers = {n: x for n, x in call.options.items() if x is not None}
    say(f"{name} {call.impl} {isa} {dtype} page at {guarded} {threads} threads, {numbers}, {shapes}, wanted {wanted}")

    torch.set_num_threads(threads)
    with instructions(isa):
        usual, dout = _compute(call, tensors, wanted, None, call.impl)
        if dout is not None and random_.random() < 0.3:
            dout = _laid_out("dout", dout, random_)
            usual, _ = _compute(call, tensors, wanted, dout, call.impl)
        _guarded = guarded
        try:
            ours, _ = _compute(call, tensors, wanted, dout, call.impl)
        finally:
            _guarded = ""
    # PyTorch's convolution has no gradient in float64 of a weight of some strides.
    dense = {n: x.contiguous() for n, x in tensors.items()}
    plain, _ = _compute(call, dense, wanted, dout, "reference")
    wide = {n: x.double() if x.is_floating_point() else x for n, x in dense.items()}
    exact, _ = _compute(call, wide, wanted, None if dout is None else dout.double(), "reference")
    largest = max([1.0, *(x.abs().max().item() for x in exact if x.numel())])
    for what, got, same, *others in zip(["out", *wanted], ours, usual, plain, exact, strict=True):
        if not torch.equal(got, same):
            raise AssertionError(f"{what} is not what it is in memory as usual")
        # Which of two maxima that are nearly the same is taken decides a gradient: test_block_aggregate.py.
        if what == "out" or name != "block_aggregate":
            _assert_near(what, got, *others, dtype, largest)


# --- many, in a process that may die ----------------------------------------------------------------------------------

_SAID = 3  # exit status: the case failed, and the process could still say why


def _run_in_a_copy(numbers: range, operations: dict, shared: mmap.mmap) -> None:
    """What the copy does, which leaves in ``shared`` what it is at; never returns."""
    status, case = 0, ""

    def say(text):
        nonlocal case
        case = f"case {number}: {text}"
        shared.seek(0)
        shared.write(case.encode()[: len(shared) - 1] + b"\0")

    number = numbers.start
    try:
        library = place_what_pytorch_allocates()
        for number in numbers:
            say("")
            run(number, operations, say)
        library._destroy()
    except Exception as error:
        why = str(error).splitlines() or [""]
        say(f"{case.partition(': ')[2]}: {type(error).__name__}: {why[0]}")
        status = _SAID
    finally:
        os._exit(status)


def failures(first: int, cases: int, operations: dict) -> Iterator[str]:
    """A line for each case that fails. Here nothing is computed, so that the process can be copied."""
    shared, end = mmap.mmap(-1, 4 * mmap.PAGESIZE), first + cases
    while first < end:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _run_in_a_copy(range(first, end), operations, shared)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        case = shared[:].partition(b"\0")[0].decode(errors="replace")
        died = f": {signal.Signals(-status).name}" if status < 0 else f": it exits with {status}"
        yield case if status == _SAID else case + died
        first = int(case.partition(":")[0].removeprefix("case ")) + 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--only", choices=list(OPERATIONS), help="one operation; cases have other numbers then")
    args = parser.parse_args()
    seen = list(failures(0, 6, {"beyond": _beyond}))
    if len(seen) < 6 or not all(case.endswith(": SIGSEGV") for case in seen):
        print("a byte beyond a tensor is read, and nothing happens", *seen, sep="\n")
        return 2
    failed = 0
    for case in failures(args.first, args.cases, {args.only: OPERATIONS[args.only]} if args.only else OPERATIONS):
        print(case, flush=True)
        failed += 1
        if failed == 10:
            break
    print(
        f"{len(seen)} bytes beyond a tensor are seen; {args.cases} cases from number {args.first} on, {failed} failed"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
