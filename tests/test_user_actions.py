"""Users act on models in any order: after each action an accelerated timm model and NesT do what timm's model does.

A state machine (hypothesis) holds three models with the same weights and does the same to each. ``accelerate`` and
``restore`` come at any time, and only to the accelerated one. ``HYPOTHESIS_PROFILE=explore`` looks for new ways, for
longer.
"""

import copy
import os
import pickle

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn

import nest_fast
from helpers.twins import (
    EVENTS,
    ActingIdentity,
    Adapter,
    AlwaysDropout,
    Autocast,
    Half,
    LoRA,
    OwnGELU,
    QuickGELU,
    Scale,
    assert_same_run,
    image,
    layers,
    listen,
    nest_model,
    plain_model,
    run,
    timm,
    width,
)

LAYERS = st.integers(0, 2)
LINEARS = st.sampled_from(["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
CONVS = st.sampled_from(["patch_embed.proj", "levels.1.pool.conv"])
NORMS = st.sampled_from(["norm1", "norm2"])
DROPS = st.sampled_from(["attn.proj_drop", "mlp.drop1", "mlp.drop2"])
PATHS = st.sampled_from(["drop_path1", "drop_path2"])
RATES = st.sampled_from([0.0, 0.3, 0.9])
PARTS = st.sampled_from(
    [
        *("norm1", "attn", "attn.qkv", "attn.proj", "attn.proj_drop", "drop_path1"),
        *("norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.fc2", "mlp.drop2", "drop_path2", ""),
    ]
)
# Modules of the model that all three have and that are called with the same values, wherever these lie.
TRUNK = st.sampled_from(
    ["", "patch_embed", "patch_embed.proj", "levels.0", "levels.1", "levels.1.pool.conv", "norm", "head"]
)

IN_PLACE_OF_DROPOUT = {
    "scale": lambda old, dim: Scale(dim),
    "adapter": lambda old, dim: Adapter(dim),
    "always": lambda old, dim: AlwaysDropout(0.3),
    "identity": lambda old, dim: nn.Identity(),
    "acting identity": lambda old, dim: ActingIdentity(),
    "dropout": lambda old, dim: nn.Dropout(0.3),
    "in place": lambda old, dim: nn.Dropout(0.3, inplace=True),
    "both": lambda old, dim: nn.Sequential(nn.Dropout(0.3), Scale(dim)),
}
IN_PLACE_OF_PATH = {
    "depth": lambda old, dim: timm.layers.DropPath(0.4),
    "unscaled depth": lambda old, dim: timm.layers.DropPath(0.4, scale_by_keep=False),
    "scale": lambda old, dim: Scale(dim),
    "identity": lambda old, dim: nn.Identity(),
    "dropout": lambda old, dim: nn.Dropout(0.2),
}
ACTIVATIONS = {
    "gelu": lambda: nn.GELU(),
    "tanh": lambda: nn.GELU("tanh"),
    "relu": lambda: nn.ReLU(),
    "quick": lambda: QuickGELU(),
    "own": lambda: OwnGELU(),
}
NORM_CLASSES = {
    "layer": lambda dim: nn.LayerNorm(dim),
    "timm": lambda dim: timm.layers.LayerNorm(dim),
    "rms": lambda dim: nn.RMSNorm(dim),
    "bias": lambda dim: nn.LayerNorm(dim, bias=False),
    "affine": lambda dim: nn.LayerNorm(dim, elementwise_affine=False),
}


def is_plain(module):
    """Whether its weights are its own: nobody adapted, pruned or parametrized it yet."""
    return type(module) in (nn.Linear, nn.Conv2d) and set(module._parameters) == {"weight", "bias"}


class Users(RuleBasedStateMachine):
    @initialize(proj_drop=RATES, drop_path=st.sampled_from([0.0, 0.4]), qkv_bias=st.booleans())
    def build(self, proj_drop, drop_path, qkv_bias):
        options = {"proj_drop_rate": proj_drop, "drop_path_rate": drop_path, "qkv_bias": qkv_bias}
        self.plain = plain_model(**options)
        self.fast = copy.deepcopy(self.plain)
        self.nest = nest_model(**options)
        self.is_fast, self.steps, self.dtype, self.autocast, self.batch = False, 0, torch.float32, False, 2
        self.handles = []
        for model in self.models():
            model.calls = []

    def models(self):
        return self.plain, self.fast, self.nest

    def each(self, function):
        self.steps += 1
        for model in self.models():
            torch.manual_seed(self.steps)
            function(model)

    def each_layer(self, i, function):
        self.each(lambda model: function(layers(model)[i]))

    def new(self, module):
        """A new part has the model's dtype and is in training with it, as its user would have it."""
        return module.to(self.dtype)

    # --- modes --------------------------------------------------------------------------------------------------------

    @rule(training=st.booleans())
    def whole_mode(self, training):
        self.each(lambda model: model.train(training))

    @rule(i=LAYERS, part=PARTS, training=st.booleans())
    def part_mode(self, i, part, training):
        self.each_layer(i, lambda layer: layer.get_submodule(part).train(training))

    @rule(kind=st.sampled_from([nn.Dropout, nn.Linear, timm.layers.DropPath]), training=st.booleans())
    def mode_of_a_kind(self, kind, training):
        if kind is timm.layers.DropPath:
            self.each(lambda model: [m.train(training) for m in model.modules() if type(m).__name__ == "DropPath"])
        else:
            self.each(lambda model: [m.train(training) for m in model.modules() if isinstance(m, kind)])

    @rule(enabled=st.booleans())
    def autocast_mode(self, enabled):
        self.autocast = enabled and self.dtype is torch.float32

    @rule(dtype=st.sampled_from([torch.float32, torch.float32, torch.float64]))
    def cast(self, dtype):
        self.dtype, self.autocast = dtype, False
        self.each(lambda model: model.to(dtype))

    @rule(batch=st.integers(1, 3))
    def batch_size(self, batch):
        self.batch = batch

    @rule(enabled=st.booleans())
    def checkpointing(self, enabled):
        self.each(lambda model: model.set_grad_checkpointing(enabled))

    # --- rates --------------------------------------------------------------------------------------------------------

    @rule(i=LAYERS, drop=DROPS, rate=RATES)
    def dropout_rate(self, i, drop, rate):
        self.each_layer(i, lambda layer: setattr(layer.get_submodule(drop), "p", rate))

    @rule(i=LAYERS, path=PATHS, rate=RATES, scaled=st.booleans())
    def depth_rate(self, i, path, rate, scaled):
        def change(layer):
            module = layer.get_submodule(path)
            if type(module).__name__ == "DropPath":
                module.drop_prob, module.scale_by_keep = rate, scaled

        self.each_layer(i, change)

    # --- parts --------------------------------------------------------------------------------------------------------

    @rule(i=LAYERS, drop=DROPS, what=st.sampled_from(sorted(IN_PLACE_OF_DROPOUT)))
    def replace_dropout(self, i, drop, what):
        def change(layer):
            old = layer.get_submodule(drop)
            new = self.new(IN_PLACE_OF_DROPOUT[what](old, width(layer, drop)))
            layer.set_submodule(drop, new.train(old.training))

        self.each_layer(i, change)

    @rule(i=LAYERS, path=PATHS, what=st.sampled_from(sorted(IN_PLACE_OF_PATH)))
    def replace_depth(self, i, path, what):
        def change(layer):
            old = layer.get_submodule(path)
            new = self.new(IN_PLACE_OF_PATH[what](old, width(layer, path)))
            layer.set_submodule(path, new.train(old.training))

        self.each_layer(i, change)

    @rule(i=LAYERS, what=st.sampled_from(sorted(ACTIVATIONS)))
    def replace_activation(self, i, what):
        self.each_layer(i, lambda layer: setattr(layer.mlp, "act", ACTIVATIONS[what]()))

    @rule(i=LAYERS, norm=NORMS, what=st.sampled_from(sorted(NORM_CLASSES)))
    def replace_norm(self, i, norm, what):
        self.each_layer(
            i, lambda layer: setattr(layer, norm, self.new(NORM_CLASSES[what](layer.attn.qkv.weight.shape[1])))
        )

    @rule(i=LAYERS, norm=NORMS, eps=st.sampled_from([1e-6, 1e-2]))
    def norm_eps(self, i, norm, eps):
        self.each_layer(i, lambda layer: setattr(layer.get_submodule(norm), "eps", eps))

    @rule(mode=st.sampled_from(["zeros", "circular", "reflect"]))
    def padding_mode(self, mode):
        self.each(lambda model: setattr(model.levels[1].pool.conv, "padding_mode", mode))

    # --- weights ------------------------------------------------------------------------------------------------------

    @rule(i=LAYERS, linear=LINEARS)
    def adapt(self, i, linear):
        def change(layer):
            old = layer.get_submodule(linear)
            if is_plain(old):
                layer.set_submodule(linear, self.new(LoRA(old)))

        self.each_layer(i, change)

    @rule(conv=CONVS)
    def adapt_convolution(self, conv):
        def change(model):
            old = model.get_submodule(conv)
            if is_plain(old):
                model.set_submodule(conv, self.new(LoRA(old)))

        self.each(change)

    @rule(i=LAYERS, linear=LINEARS, how=st.sampled_from(["prune", "half", "weight_norm", "no bias", "new", "strided"]))
    def weight(self, i, linear, how):
        self.each_layer(i, lambda layer: self.change_weight(layer.get_submodule(linear), how))

    @rule(conv=CONVS, how=st.sampled_from(["prune", "half", "weight_norm", "no bias", "new"]))
    def weight_of_a_convolution(self, conv, how):
        self.each(lambda model: self.change_weight(model.get_submodule(conv), how))

    def change_weight(self, module, how):
        if not is_plain(module):
            return
        if how == "prune":
            prune.l1_unstructured(module, "weight", 0.5)
        elif how == "half":
            parametrize.register_parametrization(module, "weight", Half())
        elif how == "weight_norm":
            nn.utils.parametrizations.weight_norm(module)
        elif how == "no bias":
            module.bias = None
        elif how == "new":
            module.weight = nn.Parameter(0.1 * torch.randn_like(module.weight))
        elif how == "strided":
            module.weight.data = module.weight.data.t().contiguous().t()

    @rule(factor=st.sampled_from([0.5, -0.9]), i=LAYERS, name=st.sampled_from(["norm1", "attn.proj", "mlp.fc1"]))
    def edit(self, factor, i, name):
        self.each_layer(i, lambda layer: [p.data.mul_(factor) for p in layer.get_submodule(name).parameters()])

    @rule(level=st.integers(0, 1))
    def edit_position(self, level):
        self.each(lambda model: model.levels[level].pos_embed.data.mul_(0.5))

    @rule(i=LAYERS, part=PARTS, wanted=st.booleans())
    def freeze(self, i, part, wanted):
        self.each_layer(i, lambda layer: layer.get_submodule(part).requires_grad_(wanted))

    @rule(assign=st.booleans())
    def load(self, assign):
        self.each(lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign))

    # --- hooks --------------------------------------------------------------------------------------------------------

    @rule(i=LAYERS, part=PARTS, event=st.sampled_from(EVENTS))
    def listen_in_a_layer(self, i, part, event):
        name = ("levels.0.transformer_encoder.0", "levels.1.transformer_encoder.0", "levels.1.transformer_encoder.1")[i]
        self.hook(f"{name}.{part}".rstrip("."), event, None)

    @rule(name=TRUNK, event=st.sampled_from(EVENTS))
    def listen_in_the_trunk(self, name, event):
        self.hook(name, event, None)

    @rule(i=LAYERS, part=PARTS)
    def change_by_a_hook(self, i, part):
        name = ("levels.0.transformer_encoder.0", "levels.1.transformer_encoder.0", "levels.1.transformer_encoder.1")[i]
        self.hook(f"{name}.{part}".rstrip("."), "forward", scaled)

    def hook(self, name, event, result):
        self.steps += 1
        self.handles.append([listen(model, name, event, result) for model in self.models()])

    @rule()
    def unhook(self):
        if self.handles:
            for handle in self.handles.pop():
                handle.remove()

    # --- copies, accelerate and restore -------------------------------------------------------------------------------

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy_models(self, how):
        self.handles = []
        make = copy.deepcopy if how == "deepcopy" else lambda model: pickle.loads(pickle.dumps(model))
        try:
            self.plain = make(self.plain)
        except (RuntimeError, AttributeError, pickle.PicklingError):
            return  # parametrized modules are not pickled, nor are some copied, whoever computes them
        self.fast, self.nest = make(self.fast), make(self.nest)

    @rule()
    def accelerate(self):
        nest_fast.accelerate(self.fast)
        self.is_fast = True

    @rule()
    def restore(self):
        nest_fast.restore(self.fast)
        self.is_fast = False
        assert not [m for m in self.fast.modules() if "nest_fast" in type(m).__module__]

    # --- after each action --------------------------------------------------------------------------------------------

    @invariant()
    def all_do_the_same(self):
        if not hasattr(self, "plain"):
            return
        x = image(self.batch, dtype=self.dtype)
        results = []
        for model in self.models():
            called = Autocast(model) if self.autocast else model
            results.append(run(called, x, calls=model.calls, parameters=dict(model.named_parameters())))
        tolerance = 0.15 if self.autocast else 1e-3
        for got, layout in ((results[1], True), (results[2], False)):
            name = "accelerated: " if layout else "NesT: "
            limits = {"layout": layout, "where": name, "order": False}
            if self.autocast or self.dtype is torch.float32:
                limits["tolerance"] = tolerance
            assert_same_run(got, results[0], **limits)


def scaled(value):
    return 0.7 * value


Users.TestCase.settings = (
    settings(max_examples=200, stateful_step_count=40)
    if os.environ.get("HYPOTHESIS_PROFILE") == "explore"
    else settings(max_examples=18, stateful_step_count=14)
)
TestUsers = pytest.mark.filterwarnings("ignore")(Users.TestCase)
