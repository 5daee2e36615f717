"""What docstrings show: the examples give what they say, and the keys of the trainers are read as the modules named."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
from klein_cns.lora import names
from klein_cns.lora.forms import FORMS, roles
from klein_cns.lora.names import locate, parse

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("sampler", "klein", "lora", "weights", "remote")
MODULES = [
    f"{folder}.{path.stem}"
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
# What users of the library call, beside the exports of each room: its main functions.
MAIN = (
    "sampler.params.CNSParams.from_endpoint",
    "sampler.scheduler.FlowMatchCNSScheduler",
    "klein.pipeline.KleinPipeline",
    "klein.pipeline.KleinPipeline.run",
    "klein.pipeline.KleinPipeline.set_loras",
    "klein.request.KleinRequest",
    "klein.result.KleinResult.save",
    "klein.convert.diffusers_to_bfl",
    "klein.convert.bfl_to_diffusers",
    "lora.peft_host.set_loras",
    "lora.peft_host.remove_loras",
    "weights.components.check_transformer",
    "weights.files.read_header",
    "weights.identify.identify",
    "remote.order.make_order",
    "remote.run.run",
    "remote.run.Submission",
    "remote.run.Recovery",
    "remote.journal.Journal",
    "remote.journal.overview",
    "remote.queue.Queue",
)
# What the library makes and hands out; a user reads it and does not call it.
HANDED_OUT = (
    "klein.KleinResult", "lora.Form", "lora.Full", "lora.LoHa", "lora.LoKr", "lora.LowRank", "lora.Lora",
    "lora.LoraError", "lora.MAX_LORAS", "lora.Report", "lora.Update",
)  # fmt: skip
# Each key in the docstring of `names` -> the weight that it belongs to, the rows (part, parts) of it, and the role.
TRAINERS = {
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": ("double_blocks.0.img_attn.qkv", (0, 1), "down"),
    "lora_unet_single_blocks_0_linear1.alpha": ("single_blocks.0.linear1", (0, 1), "alpha"),
    "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": ("double_blocks.0.img_attn.qkv", (0, 1), "down"),
    "diffusion_model.single_blocks.0.linear2.magnitude": ("single_blocks.0.linear2", (0, 1), "magnitude"),
    "diffusion_model.single_blocks.0.linear1.lokr_w1": ("single_blocks.0.linear1", (0, 1), "lokr_w1"),
    "base_model.model.double_blocks.0.txt_attn.proj.lora_B.weight": ("double_blocks.0.txt_attn.proj", (0, 1), "up"),
    "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight": ("double_blocks.0.img_attn.qkv", (0, 3), "down"),
    "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_B.weight": (
        "single_blocks.0.linear1",
        (0, 1),
        "up",
    ),
    "transformer.proj_out.lora_magnitude_vector": ("final_layer.linear", (0, 1), "magnitude"),
    "transformer.transformer_blocks.0.attn.add_k_proj.lora_up.weight": ("double_blocks.0.txt_attn.qkv", (1, 3), "up"),
    "lora_transformer_transformer_blocks_0_ff_linear_in.dora_scale": ("double_blocks.0.img_mlp.0", (0, 1), "magnitude"),
    "transformer.transformer_blocks.0.attn.qkv.alpha": ("double_blocks.0.img_attn.qkv", (0, 1), "alpha"),
    "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight": ("double_blocks.0.img_attn.proj", (0, 1), "down"),
    "transformer.transformer_blocks.0.attn.to_added_qkv.lora_A.weight": (
        "double_blocks.0.txt_attn.qkv",
        (0, 1),
        "down",
    ),
    "lycoris_transformer_blocks_0_attn_to_qkv.lokr_w2_a": ("double_blocks.0.img_attn.qkv", (0, 1), "lokr_w2_a"),
    "lycoris_context_embedder.hada_w1_b": ("txt_in", (0, 1), "hada_w1_b"),
    "lycoris_norm_out_linear.diff": ("final_layer.adaLN_modulation.1", (0, 1), "diff"),
}
LITERAL = re.compile(r"``([\w.]+)``")


def module_of(name):
    return importlib.import_module(f"klein_cns.{name}")


def used():
    """Every object that a user of the library calls, by its full name."""
    found = {}
    for folder in FOLDERS:
        room = module_of(folder)
        for name in getattr(room, "__all__", ()):
            if callable(getattr(room, name)):
                found[f"{folder}.{name}"] = getattr(room, name)
    for path in MAIN:
        folder, module, *rest = path.split(".")
        value = module_of(f"{folder}.{module}")
        for part in rest:
            value = getattr(value, part)
        found[path] = value
    return {name: value for name, value in found.items() if name not in HANDED_OUT}


def shown_calls(value):
    """The calls of an object, or of a class's methods, in its docstring: in examples, literal blocks and literals."""
    text = inspect.getdoc(value)
    snippets = [line.strip().removeprefix(">>> ") for line in text.splitlines()] + re.findall(r"``([^`]+)``", text)
    for snippet in snippets:
        try:
            tree = ast.parse(f"{snippet} pass" if snippet.endswith(":") else snippet)
        except SyntaxError:  # prose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and value.__name__ in ast.unparse(node.func).split("."):
                yield node


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    assert doctest.testmod(module_of(name), report=True).failed == 0


@pytest.mark.parametrize("name", used())
def test_what_a_user_calls_shows_a_call_that_its_signature_takes(name):
    value = used()[name]
    calls = list(shown_calls(value))
    assert calls, f"{name} shows no call"
    for node in calls:
        called = ast.unparse(node.func).split(".")
        target = value if called[-1] == value.__name__ else getattr(value, called[-1])
        owner = [None] if "self" in inspect.signature(target).parameters else []
        inspect.signature(target).bind(*owner, *node.args, **{word.arg: word.value for word in node.keywords})


def test_the_example_keys_of_the_trainers_are_those_of_the_table():
    shown = set(LITERAL.findall(names.__doc__))
    assert shown == set(TRAINERS)


@pytest.mark.parametrize("key", TRAINERS)
def test_the_example_key_of_a_trainer_is_read_as_the_module_it_names(key):
    weight, rows, role = TRAINERS[key]
    found = parse(key, roles())
    module = locate(found.module)
    assert (module.weight, (module.part, module.parts), found.role) == (f"{weight}.weight", rows, role)


@pytest.mark.parametrize("form", FORMS)
def test_the_spellings_in_the_docstring_of_a_form_are_its_own(form):
    spellings = LITERAL.findall(form.__doc__)
    assert spellings
    for spelling in spellings:
        found = parse(f"transformer.proj_out.{spelling}", roles())
        assert found is not None and found.role in form.KEYS.values(), spelling
