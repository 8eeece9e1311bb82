"""Whole models on photographs: timm's as shipped against nest_fast, inference and training step; NesT beside Swin.

The comparison with Swin is the paper's, which sets NesT-S beside Swin-B: two models, each checked against its own
float64, timed in turns.

A training step is the forward and the backward pass, the optimizer being the same for all. With stochastic depth
("drop path", as timm ships its models) every peer draws the same numbers in its first call, which is checked, and in
each after it; otherwise it is off. On CUDA the step is mixed precision: fp32 parameters under bf16 autocast.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from harness import DEVICE, DTYPES, Case, Peers, Problem, Run, compiled, forward, parametrize, with_parameter_gradients
from runs import ACCELERATED, FROZEN
from runtimes import RUNTIMES, dtypes_of
from torch import Tensor, nn

import nest_fast
from nest_fast.testing import import_timm


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """A model on ``px`` x ``px`` pixels, stochastic depth up to rate ``drop_path``.

    ``op`` names timm's or nest_fast's, or another library's with its name before it: ``torchvision.swin_t``.

    With ``beside``, a model of SWIN, that one is the yardstick. ``deployed`` names runtimes that measure it, too.
    """

    px: int
    drop_path: float = 0.0
    compile: bool = True
    beside: str = ""
    deployed: tuple[str, ...] = ()

    @property
    def direction(self) -> str:
        return "training step" if self.backward else "inference"

    @property
    def runtimes(self) -> list[str]:
        """The exported models that are measured beside the model."""
        installed = [name for name in self.deployed if DEVICE == "cpu" and name in RUNTIMES]
        return [name for name in installed if self.dtype in dtypes_of(name)]

    @property
    def frozen(self) -> bool:
        """Whether the model is measured with its weights packed once, too."""
        return DEVICE == "cpu" and self.op == "nest_tiny" and not self.backward and not self.beside

    @property
    def is_nest(self) -> bool:
        return self.op.startswith("nest_")

    @property
    def library(self) -> str:
        """Whose model is the original."""
        return "reference" if _is_32_px(self) else self.op.partition(".")[0] if "." in self.op else "timm"

    @property
    def amp(self) -> bool:
        return self.backward and self.dtype == torch.bfloat16


SWIN = {"swin_tiny": "swin_tiny_patch4_window7_224", "swin_base": "swin_base_patch4_window7_224"}


def cases():
    yield from _cpu_cases() if DEVICE == "cpu" else _cuda_cases()


def _cpu_cases():
    size: dict[str, Any] = {"name": "224 px", "px": 224}
    for dtype in DTYPES:
        yield ModelCase(op="nest_tiny", batch=8, dtype=dtype, deployed=tuple(RUNTIMES), **size)
        # A package of one image takes as long to build as all other peers to measure.
        others = tuple(name for name in RUNTIMES if name != "nest_fast AOTInductor")
        yield ModelCase(op="nest_tiny", batch=1, dtype=dtype, deployed=others, compile=False, **size)
    step: dict[str, Any] = {"op": "nest_tiny", "batch": 4, "dtype": torch.float32, "backward": True, "compile": False}
    yield ModelCase(**step, **size)
    yield ModelCase(name="224 px drop path", px=224, drop_path=0.5, **step)
    for dtype in DTYPES:
        yield _beside("nest_small", "swin_base", batch=2, dtype=dtype)
    for dtype in DTYPES:
        yield ModelCase(op="nest_tiny_s16_32", name="32 px", batch=16, dtype=dtype, px=32, compile=False)


def _cuda_cases():
    shape: dict[str, Any] = {"name": "224 px", "dtype": torch.bfloat16, "px": 224}
    for op in ("nest_tiny", "nest_small", "nest_base"):
        yield ModelCase(op=op, batch=256, **shape)
        yield ModelCase(op=op, batch=256, backward=True, **shape)
        if op == "nest_tiny":
            yield ModelCase(op=op, batch=1, **shape)
            yield ModelCase(op=op, batch=256, name="224 px", dtype=torch.float32, px=224)
    yield ModelCase(op="nest_tiny_s16_32", name="32 px", batch=1024, dtype=torch.bfloat16, px=32)
    for backward in (False, True):
        for op, swin in (("nest_tiny", "swin_tiny"), ("nest_small", "swin_base")):
            yield _beside(op, swin, batch=256, dtype=torch.bfloat16, backward=backward)


def _beside(op: str, swin: str, **shape: Any) -> ModelCase:
    return ModelCase(op=op, beside=swin, name=f"224 px beside {swin}", px=224, compile=False, **shape)


# --- photographs ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def photographs(batch: int, px: int) -> Tensor:
    """Crops of scikit-learn's two photographs, normalised as for ImageNet: ``(batch, 3, px, px)`` in fp32."""
    from sklearn.datasets import load_sample_images

    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    photos = []
    for image in load_sample_images().images:
        photo = (torch.tensor(image).permute(2, 0, 1) / 255 - mean) / std
        scale = max(1.25, 1.25 * px / min(photo.shape[1:]))  # room for different crops at every size
        photos.append(F.interpolate(photo[None], scale_factor=scale, mode="bilinear", antialias=True)[0])
    crops = []
    for i in range(batch):
        photo = photos[i % 2]
        top, left = ((i * step) % (edge - px + 1) for step, edge in zip((37, 61), photo.shape[1:], strict=True))
        crops.append(photo[:, top : top + px, left : left + px])
    return torch.stack(crops)


# --- peers ------------------------------------------------------------------------------------------------------------


def peers(case: ModelCase) -> Peers:
    """Builders; the models of a case are copies of one, made when the first is asked for."""

    @functools.lru_cache(maxsize=1)
    def original() -> nn.Module:
        return _original(case)

    def peer(make: Callable[[], nn.Module], mode: str | None = None) -> Callable[[], Run]:
        return lambda: _run(case, make(), mode)

    models: dict[str, Callable[[], nn.Module]] = {
        case.library: original,
        "timm 4-D": lambda: _four_d(original()),
        ACCELERATED: lambda: _accelerated(original()),
        FROZEN: lambda: _frozen(original()),
        "nest_fast NesT": lambda: _nest(case, original()),
    }
    if not case.frozen:
        del models[FROZEN]
    if _is_32_px(case):  # timm has none of these
        del models["timm 4-D"], models[ACCELERATED]
    elif case.drop_path:
        del models["timm 4-D"]
    elif case.beside or not case.is_nest:
        del models["timm 4-D"], models["nest_fast NesT"]
    found = {name: peer(make) for name, make in models.items()}
    found |= {name: functools.partial(_exported, case, models[ACCELERATED], name) for name in case.runtimes}
    if case.compile:
        for name in [name for name in models if name in (case.library, "nest_fast NesT")]:
            found |= {f"{name} {label}": peer(models[name], mode) for label, mode in _compile_modes(case).items()}
    return {case.beside: peer(lambda: _original(_swin(case)))} | found if case.beside else found


def _is_32_px(case: ModelCase) -> bool:
    return case.op.endswith("_s16_32")


def _swin(case: ModelCase) -> ModelCase:
    return replace(case, op=SWIN[case.beside], beside="")


def _exported(case: ModelCase, make: Callable[[], nn.Module], runtime: str) -> Run:
    return forward(RUNTIMES[runtime](make(), photographs(case.batch, case.px)))


def _compile_modes(case: ModelCase) -> dict[str, str]:
    if DEVICE == "cpu":
        return {"compiled": "default"}
    if case.batch == 1:  # what costs there is the launching, which CUDA graphs take away
        return {"compiled reduce-overhead": "reduce-overhead"}
    return {"compiled": "default", "compiled max-autotune": "max-autotune-no-cudagraphs"}


def _original(case: ModelCase) -> nn.Module:
    """The model all peers of a case have the weights of; what is initialised to ones and zeros would hide mistakes."""
    torch.manual_seed(0)
    if _is_32_px(case):
        model = getattr(nest_fast, case.op)(impl="reference", drop_path_rate=case.drop_path)
    elif case.library == "torchvision":
        import_timm()  # makes room for a torchvision of another torch
        from torchvision.models import get_model

        model = get_model(case.op.partition(".")[2])  # its stochastic depth is part of it
    elif case.library == "transformers":
        model = _transformers(case.op.partition(".")[2], case.px)
    else:
        size = {} if case.px == 224 else {"img_size": case.px}  # of which some families have none
        model = import_timm().create_model(case.op, drop_path_rate=case.drop_path, **size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    dtype = torch.float32 if case.amp else case.dtype
    return model.to(DEVICE, dtype).train(case.backward)


def _transformers(name: str, px: int) -> nn.Module:
    """A model of transformers as its configuration has it by default, which gives its first output alone."""
    import_timm()  # as above
    import transformers

    cls = getattr(transformers, name)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = cls(cls.config_class(image_size=px, num_labels=1000))

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)[0]

    return First()


def _nest(case: ModelCase, original: nn.Module) -> nn.Module:
    weight = next(original.parameters())
    options = {"img_size": case.px, "drop_path_rate": case.drop_path}
    model = getattr(nest_fast, case.op)(**options, device=weight.device, dtype=weight.dtype)
    model.load_state_dict(original.state_dict())  # the same format as timm's
    return model.train(original.training)


def _accelerated(original: nn.Module) -> nn.Module:
    model = copy.deepcopy(original)
    nest_fast.accelerate(model)
    return model


def _frozen(original: nn.Module) -> nn.Module:
    model = _accelerated(original)
    nest_fast.freeze(model)
    return model


def _four_d(original: nn.Module) -> nn.Module:
    """timm's model with its attention given 4-D tensors, which is all that the fused attentions of PyTorch ask for."""
    attention: Any = import_timm().models.nest.Attention

    class FourD(attention):
        def forward(self, x: Tensor) -> Tensor:
            B, T, N, C = x.shape
            qkv = self.qkv(x).reshape(B * T, N, 3, self.num_heads, C // self.num_heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
            return self.proj_drop(self.proj(y.permute(0, 2, 3, 1).reshape(B, T, N, C)))

    model = copy.deepcopy(original)
    for module in model.modules():
        if type(module) is attention:
            module.__class__ = FourD
    return model


def _run(case: ModelCase, model: nn.Module, mode: str | None = None) -> Run:
    function = model if mode is None else compiled(model, mode)
    seeds = itertools.count()

    def call(images: Tensor) -> Tensor:
        if case.drop_path:
            torch.manual_seed(next(seeds))
        with torch.autocast(DEVICE, torch.bfloat16, enabled=case.amp):
            return function(images)

    return with_parameter_gradients(model, call) if case.backward else forward(call)


def build(case: ModelCase) -> Problem:
    dtype = torch.float32 if case.amp else case.dtype
    inputs = [photographs(case.batch, case.px).to(DEVICE, dtype)]
    if case.backward:
        inputs.append(torch.randn(case.batch, 10 if case.px == 32 else 1000, device=DEVICE))
    found = peers(case)

    def problem(case: ModelCase, yardstick: str, beside: Problem | None = None) -> Problem:
        return Problem(
            inputs=tuple(inputs),
            has_batch=(True,) * len(inputs),
            per_sample_results=1,
            exact=_run(case, _original(case).double()),
            yardstick=yardstick,
            peers=found,
            items=case.batch,
            count_bytes=False,
            has_maxpool=True,
            chunk_size=8 if case.px <= 224 else 1,
            seconds=5.0 if DEVICE == "cpu" else 1.0,
            beside=beside,
        )

    if not case.beside:
        return problem(case, next(iter(found)))
    return problem(_swin(case), case.beside, beside=problem(case, "timm"))


@parametrize(cases(), peers)
def test_model(measure, case, peer):
    measure(build, case, peer)
