"""Peers that run an exported model: ONNX in onnxruntime and OpenVINO, and an AOTInductor package with our kernels."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from nest_fast.ops import _extension

Function = Callable[[Tensor], Tensor]


def _installed() -> dict[str, Callable[[nn.Module, Tensor], Function]]:
    """The runtimes that are there: each makes a function of images of a model and such images."""
    onnx = all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxscript"))
    found: dict[str, Callable[[nn.Module, Tensor], Function]] = {}
    for name, build in (("onnxruntime", _onnxruntime), ("openvino", _openvino)):
        if onnx and importlib.util.find_spec(name) is not None:
            found[name] = build
    if _extension.cpu_error is None:
        found["nest_fast AOTInductor"] = _inductor
    return found


@functools.cache
def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """In which the runtime computes on this machine, of those that are measured."""
    if name != "openvino":
        return (torch.float32,)
    import openvino

    found = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return tuple(
        dtype for dtype, capability in ((torch.float32, "FP32"), (torch.bfloat16, "BF16")) if capability in found
    )


def _onnx(model: nn.Module, images: Tensor, folder: str) -> str:
    path = f"{folder}/model.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), path, dynamo=True, opset_version=18, verbose=False)
    return path


def _onnxruntime(model: nn.Module, images: Tensor) -> Function:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(_onnx(model, images, folder), options)
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(model: nn.Module, images: Tensor) -> Function:
    """Of a model in bfloat16 OpenVINO gets float32 weights and rounds them itself, as its users do."""
    import openvino

    dtype = next(model.parameters()).dtype
    hint = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        compiled = openvino.Core().compile_model(_onnx(model.float(), images, folder), "CPU", options)
    return lambda x: torch.from_numpy(compiled([x.float().numpy()])[0]).to(dtype)


def _inductor(model: nn.Module, images: Tensor) -> Function:
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(model, (images,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "model.pt2"))
        return torch._inductor.aoti_load_package(package)


RUNTIMES = _installed()
