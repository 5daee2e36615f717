"""LoRA files that are damaged, hostile, foreign or incomplete; what each is told, and what is kept in memory."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import resource
import struct
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from klein_cns.lora import LoKr, Lora, LoraError, LowRank, Report, Update, examine_lora, load_lora, load_loras
from klein_cns.lora import load as loading
from klein_cns.lora import read as reading
from klein_cns.lora.canonical import canonical
from klein_cns.lora.forms import LoHa
from klein_cns.lora.names import locate
from klein_cns.lora.read import FIRST_BAD, is_finite, read_lora
from klein_cns.weights.architecture import ARCHITECTURES, DEV, KLEIN_4B, KLEIN_9B, TINY
from safetensors.torch import load_file, save_file

MUTATIONS = 10_000
Q = "transformer.transformer_blocks.{}.attn.to_{}.lora_{}.weight"


def low_rank(module, out=128, into=128, rank=2, prefix="transformer."):
    return {
        f"{prefix}{module}.lora_A.weight": torch.randn(rank, into),
        f"{prefix}{module}.lora_B.weight": torch.randn(out, rank),
    }


def attention(blocks=2, parts="qkv", hidden=128):
    tensors = {}
    for block in range(blocks):
        for part in parts:
            tensors |= low_rank(f"transformer_blocks.{block}.attn.to_{part}", hidden, hidden)
    return tensors


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.safetensors"


def refused(file, tensors, says, target=TINY, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    with pytest.raises(LoraError, match=says) as caught:
        load_lora(file, target)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("LoRA a.safetensors ")
    return str(caught.value)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, TINY], ids=lambda one: one.name)
def test_the_base_is_told_from_the_shapes(file, architecture):
    target = KLEIN_9B if architecture is not KLEIN_9B else KLEIN_4B
    tensors = low_rank("single_blocks.0.linear1", 9 * architecture.hidden, architecture.hidden, prefix="")
    says = f"was made for {re.escape(architecture.name)}, the model is {re.escape(target.name)}; get a LoRA"
    refused(file, tensors, says, target)
    assert examine_lora(file, target).report.base == architecture.name
    assert load_lora(file, architecture).report.applied == 1


def test_a_whole_lora_of_dev_changes_its_guidance_too(file):
    """With names of both layouts; the sizes are those of black-forest-labs/FLUX.2-dev."""
    wide = DEV.hidden
    for module, prefix in (("guidance_in.in_layer", ""), ("time_guidance_embed.guidance_embedder.linear_1", "unet.")):
        tensors = {**low_rank(module, wide, 256, prefix=prefix), **low_rank("proj_out", 128, wide)}
        refused(file, tensors, r"was made for FLUX\.2 \[dev\], the model is FLUX\.2 \[klein\] 9B", KLEIN_9B)
        assert load_lora(file, DEV).report.applied == 2


def test_flux_1_is_known(file):
    wide = 3072
    own = low_rank("transformer_blocks.0.norm1.linear", 6 * wide, wide)
    for tensors, base in (
        ({**attention(2, hidden=wide), **own}, r"FLUX\.1"),
        (low_rank("single_blocks_3_linear1", 7 * wide, wide, prefix="lora_unet_"), r"FLUX\.1"),
        (attention(7, hidden=wide), r"FLUX\.1"),
        (attention(2, hidden=wide), r"FLUX\.2 \[klein\] 4B or FLUX\.1"),
    ):
        named = {
            re.sub(r"(linear1|lin)\.lora_A", r"\1.lora_down", n).replace("1.lora_B", "1.lora_up"): t
            for n, t in tensors.items()
        }
        refused(file, named, f"was made for {base}, the model is", KLEIN_9B)


def test_what_would_apply_in_part_or_wrongly_is_refused(file):
    whole = attention()

    def without(*names):
        return {name: tensor for name, tensor in whole.items() if name not in names}

    up = Q.format(0, "q", "B")
    for tensors, says in (
        (without(up), r"lacks up of transformer\.transformer_blocks\.0\.attn\.to_q, so it is incomplete"),
        (without(*(Q.format(1, "k", half) for half in "AB")), r"only part of q, k and v in .*1\.img_attn\.qkv: k is"),
        ({**whole, up: torch.randn(256, 2)}, r"as 256x128, but the model is .*, there it is 128x128"),
        ({**whole, up: torch.randn(128, 3)}, r"factors of different rank for .*: 3 and 2"),
        ({**whole, up: torch.randn(128)}, r"holds up of .* in the shape \[128\], which is not a matrix"),
        ({**whole, up: torch.full((128, 2), float("nan"))}, r"holds NaN or infinite values in up of transformer\."),
        ({**whole, Q.format(1, "v", "A"): torch.full((2, 128), -float("inf"))}, r"NaN or infinite values in down of"),
        ({**whole, up.replace("lora_B.weight", "alpha"): torch.tensor(float("nan"))}, r"no finite number as alpha of"),
        ({**whole, up.replace("lora_B.weight", "diff"): torch.ones(128, 128)}, r"in two forms at once, LoRA and diff"),
        ({**whole, up.replace("lora_B", "lora_up"): torch.ones(128, 2)}, r"gives up of .* twice"),
        ({**whole, **low_rank("double_blocks.0.img_attn.qkv", 384, prefix="")}, r"changes one weight twice, as do"),
        ({**whole, up.replace("lora_B.weight", "dora_scale"): torch.ones(64, 1)}, r"DoRA magnitude of 64 .*128 rows"),
        (
            {name.replace("0.attn.to_q.lora_A", "0.attn.to_q.lora_A.other").replace("1.attn.to_q.lora_A", "1.attn."
             "to_q.lora_A.default"): tensor for name, tensor in whole.items()}, r"several adapters \(default, other\)",
        ),
        ({"weight": torch.ones(3)}, r"holds nothing that applies to .*no parameter of a known kind of LoRA"),
        (low_rank("other.module"), r"holds nothing that applies to .*FLUX\.2 has no such module"),
        (low_rank("text_encoder.layers.0.mlp.up_proj", prefix=""), r"holds nothing .*a text encoder's weight"),
        (attention(70, "q"), r"holds nothing|has no such module"),
        ({**whole, **{name: t.to(torch.bool) for name, t in low_rank("x_embedder").items()}}, r"as BOOL; allowed are"),
    ):  # fmt: skip
        refused(file, tensors, says)


def test_a_parameter_that_is_not_understood_is_no_change_without_it(file):
    whole = attention()
    for name in ("lora_E", "lora_E.default", "weight", "base_layer.weight"):
        key = f"transformer.transformer_blocks.0.attn.to_q.{name}"
        refused(file, {**whole, key: torch.ones(2, 1)}, rf"parameter {name} of transformer\..*to_q that is not under")


@pytest.mark.parametrize("role", ["up", "down", "magnitude_vector", "lora_bias", "reshape", "scale", "form"])
def test_no_key_but_a_trainers_own_is_a_factor(file, role):
    """Least of all a name that is only used inside the reader."""
    stray = {f"transformer.transformer_blocks.0.attn.to_q.{role}": torch.ones((128, 2) if role == "up" else (2, 128))}
    refused(file, {**attention(), **stray}, rf"has a parameter {role} of .*to_q that is not understood")


INFINITE = torch.tensor(9999999999).half()  # the alpha of ai-toolkit, in the type that it saves
WHOLE = {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(32, 32)}


@pytest.mark.parametrize("alpha", [INFINITE, torch.tensor(70000.0).half(), INFINITE.float(), torch.tensor([70000.0])])
def test_an_alpha_that_is_not_used_may_be_too_large_for_its_type(file, alpha):
    """Of ai-toolkit and of LyCORIS, which gives whole factors their dimension as alpha."""
    for factors, expected in (
        (WHOLE, torch.kron(WHOLE["lokr_w1"], WHOLE["lokr_w2"])),
        ({"diff": torch.ones(128, 128)}, torch.ones(128, 128)),
    ):
        save_file({f"lycoris_proj_out.{name}": t for name, t in {**factors, "alpha": alpha}.items()}, file)
        lora = load_lora(file, TINY)
        assert torch.equal(lora.updates[0].change(1.0, expected), expected) and lora.report.alpha == "none"


@pytest.mark.parametrize(
    ("factors", "alpha", "config"),
    [
        ({"lora_down.weight": torch.ones(2, 128), "lora_up.weight": torch.ones(128, 2)}, INFINITE, {}),
        ({"lokr_w1": torch.ones(4, 4), "lokr_w2_a": torch.ones(32, 2), "lokr_w2_b": torch.ones(2, 32)}, INFINITE, {}),
        ({f"hada_w{i}_{x}": torch.ones(*size) for i in (1, 2) for x, size in (("a", (128, 2)), ("b", (2, 128)))},
         INFINITE, {}),
        (WHOLE, INFINITE, {"peft_type": "LOKR", "r": 2}),  # peft scales whole factors too
        (WHOLE, -INFINITE, {}),
        (WHOLE, torch.tensor(float("nan")), {}),
    ],
)  # fmt: skip
def test_an_alpha_that_is_used_or_no_number_must_be_finite(file, factors, alpha, config):
    tensors = {f"transformer.proj_out.{name}": tensor for name, tensor in {**factors, "alpha": alpha}.items()}
    (file.parent / "adapter_config.json").write_text(json.dumps(config))
    refused(file, tensors, r"has no finite number as alpha of transformer\.proj_out")


@pytest.mark.parametrize("fused", ["attn.to_qkv", "attn.to_added_qkv", "attn.qkv", "attn.added_qkv"])
def test_q_k_and_v_in_one_are_bfls_rows(file, fused):
    stream, apart = ("txt", "add_q_proj") if "added" in fused else ("img", "to_q")
    module = low_rank(f"transformer_blocks.1.{fused}", 384)
    save_file(module, file)
    (update,) = load_lora(file, TINY).updates
    assert (update.weight, update.rows) == (f"double_blocks.1.{stream}_attn.qkv.weight", None)
    refused(file, {**module, **low_rank(f"transformer_blocks.1.attn.{apart}")}, "changes one weight twice")
    refused(file, low_rank(f"transformer_blocks.1.{fused}"), "changes .* as 128x128, but .*, there it is 384x128")
    assert locate(f"single_transformer_blocks.1.{fused}") is None


def test_a_lora_for_another_input_width_is_refused(file):
    """With ``reshape_weight``, as ComfyUI converts BFL's LoRAs for FLUX.1 that take a second picture."""

    def with_size(into, size):
        key = "diffusion_model.img_in"
        return {**attention(), **low_rank("img_in", 128, into, prefix="diffusion_model."),
                f"{key}.reshape_weight": torch.tensor(size)}  # fmt: skip

    refused(file, with_size(256, [128, 256]), "changes diffusion_model.img_in as 128x256, but .*, there it is 128x128")
    for size in ([128, 256], [256, 128], [128], [], [[128, 128, 1]], [float("nan"), 128.0]):
        refused(file, with_size(128, size), "reshape_weight for diffusion_model.img_in that does not fit its factors")
    refused(file, {"img_in.reshape_weight": torch.tensor([128, 256])}, "has a reshape_weight for img_in but no factors")
    save_file(with_size(128, [128, 128]), file)
    assert load_lora(file, TINY).report.applied == 7


OTHER_KINDS = {
    "OFT": ({"oft_blocks": (4, 2, 2)}, {"oft_diag": (4, 2)}, {"oft_R.weight": (4, 6)}, {"oft_R.default.weight": (4, 6)},
            {"oft_r": (4, 2, 2)}, {"oft_R.weight": (4, 6), "oft_R.scaled_oft": (1,)}),
    "BOFT": ({"boft_R": (1, 4, 2, 2), "boft_s": (128, 1)}, {"boft_R.default": (1, 4, 2, 2), "boft_s.default": (1,)}),
    "IA3": ({"ia3_l": (1, 128)}, {"ia3_l.default": (1, 128)}, {"weight": (128,), "on_input": ()}),
    "VeRA": ({"vera_lambda_b": (128,), "vera_lambda_d": (2,)}, {"vera_lambda_b.default": (128,)}),
    "T-LoRA": ({"q_layer.weight": (2, 128), "p_layer.weight": (128, 2), "lambda_layer": (1, 2), "base_p.weight": (1,),
                "base_q.weight": (1,), "base_lambda": (1, 2)},),
    "LoRA of MLX": ({"lora_a": (128, 2), "lora_b": (2, 128)},),
    "GLoRA": ({"a1.weight": (2, 2), "a2.weight": (2, 2), "b1.weight": (2, 2), "b2.weight": (2, 2)},),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_are_named_for_what_they_are(file, kind):
    """Alone they are refused, beside a LoRA they are left out; by keys of LyCORIS, OneTrainer, peft, T-LoRA and MLX."""
    says = f"{re.escape(kind)} is not supported"
    for parameters in OTHER_KINDS[kind]:
        tensors = {f"transformer.proj_out.{name}": torch.ones(size) for name, size in parameters.items()}
        refused(file, tensors, rf"holds nothing that applies to .* \({says}")
        save_file({**attention(), **tensors}, file)
        report = load_lora(file, TINY).report
        assert report.applied == 6 and [module for module, _ in report.left_out] == ["transformer.proj_out"]
        assert re.match(says, report.left_out[0][1])
    shared = {"base_model.vera_A": torch.ones(2, 2)}  # by all modules
    refused(file, {**tensors, **shared}, "VeRA is not supported")


def test_a_split_module_is_called_so(file):
    """As sd-scripts trains q, k and v, and the MLP beside them, of one of BFL's modules."""
    for module, parts in (("double_blocks_0_img_attn_qkv", 3), ("single_blocks_1_linear1", 4)):
        tensors = {f"lora_unet_{module}.alpha": torch.tensor(2.0)}
        for i in range(parts):
            tensors |= {f"lora_unet_{module}.lora_down.{i}.weight": torch.ones(2, 128),
                        f"lora_unet_{module}.lora_up.{i}.weight": torch.ones(128, 2)}  # fmt: skip
        says = refused(file, tensors, rf"holds (up|down) of lora_unet_{module} split into {parts} parts")
        assert "adapters" not in says and "save it again" in says
    peft = {name.replace("lora_A", f"lora_A.{i}").replace("lora_B", f"lora_B.{i}"): tensor
            for i in (0, 1) for name, tensor in attention(1, "q").items()}  # fmt: skip
    refused(file, peft, r"holds several adapters \(0, 1\)")


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"lora_alpha": "6.0", "use_dora": "0", "alpha_pattern": "", "rank_pattern": "{}"}, 3.0),
        ({"lora_alpha": "6", "use_rslora": "no", "use_dora": "False", "r": "16.0", "peft_type": "lora"}, 3.0),
        ({"lora_alpha": "6", "use_rslora": "Yes", "use_qalora": "0", "init_lora_weights": "True"}, 6 / 2**0.5),
        ({"lora_alpha": "6", "use_rslora": "1", "r": "", "peft_type": ""}, 6 / 2**0.5),
    ],
)
def test_metadata_in_plain_words(file, metadata, scale):
    save_file(attention(), file, metadata)
    assert {update.form.scale for update in load_lora(file, TINY).updates} == {scale}


def test_a_bias_of_lora_b_is_part_of_the_change(file):
    refused(file, {**attention(), Q.format(0, "q", "B").replace("weight", "bias"): torch.ones(128)}, r"trains a bias")


def test_a_config_of_peft_that_says_nothing_special(tmp_path):
    from peft import LoraConfig

    save_file(attention(), tmp_path / "adapter_model.safetensors")
    LoraConfig(r=2, lora_alpha=6, init_lora_weights="gaussian", target_modules=["to_q"]).save_pretrained(tmp_path)
    assert load_lora(tmp_path, TINY).report.alpha == "6"


def test_a_trained_scalar_of_lycoris_is_a_factor(file):
    factors = {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(32, 32)}
    save_file({f"lycoris_proj_out.{name}": t for name, t in {**factors, "scalar": torch.tensor([0.25])}.items()}, file)
    (update,) = load_lora(file, TINY).updates
    expected = 0.25 * torch.kron(factors["lokr_w1"], factors["lokr_w2"])
    torch.testing.assert_close(update.change(1.0, expected), expected)


def test_what_klein_lacks_is_left_out_and_reported(file):
    tensors = {
        **attention(),
        **low_rank("transformer_blocks.0.other"),
        **low_rank("lora_te1_text_model_encoder_layers_0_mlp_fc1", prefix=""),
        **low_rank("x_embedder"),
        "transformer.x_embedder.diff_b": torch.ones(128),
        "transformer.context_embedder.diff_b": torch.ones(128),
        "transformer.norm_out.linear.alpha": torch.tensor(4.0),
        "transformer.proj_out.oft_blocks": torch.ones(2, 2),
        "something": torch.ones(1),
        "transformer.double_stream_modulation_img.linear.modules_to_save.weight": torch.ones(768, 128),
        **{f"transformer.single_transformer_blocks.0.attn.to_out.{n}": torch.ones(2, 2)
           for n in ("lora_mid.weight", "lora_up.weight", "lora_down.weight")},
    }  # fmt: skip
    save_file(tensors, file)
    lora = load_lora(file, TINY)
    left = dict(lora.report.left_out)
    assert left == {
        "transformer.transformer_blocks.0.other": "FLUX.2 has no such module",
        "something": "no parameter of a known kind of LoRA",
        "transformer.x_embedder.diff_b": "klein has no biases",
        "transformer.context_embedder": "klein has no biases",
        "transformer.norm_out.linear": "an alpha without factors",
        "transformer.proj_out": "OFT is not supported",
        "transformer.double_stream_modulation_img.linear": "it replaces the weight, which no strength can scale",
        "transformer.single_transformer_blocks.0.attn.to_out": "Tucker factors belong to convolutions, klein has none",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": "a text encoder's weight; a klein LoRA changes only "
        "the transformer",
    }
    assert (lora.report.applied, lora.report.total) == (7, 14)
    text = str(lora.report)
    assert all(f"left out: {module} ({why})" in text for module, why in left.items())
    assert json.loads(json.dumps(lora.report.to_dict()))["left_out_count"] == len(left)


@pytest.mark.parametrize(
    ("prefix", "joint"),
    [("pipe.dit.", "."), ("student.", "."), ("lora_unet.model.x_y.", "."), ("_a_b__", "_"), ("lora_x_", ".")],
)
def test_any_prefix_is_stripped_and_reported(file, prefix, joint):
    for module, into in (("double_blocks.0.img_mlp.2", 384), ("single_transformer_blocks.1.attn.to_out", 512)):
        save_file(low_rank(f"{prefix}{module.replace('.', joint)}", 128, into, prefix=""), file)
        report = load_lora(file, TINY).report
        assert report.applied == 1 and report.format.endswith(f"after {prefix!r}")


@pytest.mark.parametrize(
    "module",
    [
        "text_encoder.proj_out", "lora_te1_proj_out", "down_blocks.1.attentions.0.proj_out", "transformer.my_proj_out",
        "lora_unet_down_blocks_1_proj_out", "controlnet.transformer_blocks.0.attn.to_q", "vae.proj_out",
        "lora_unet_single_transformer_blocks_0_attn_to_q", "transformer.single_transformer_blocks.0.proj_out",
        "single_transformer_blocks_0_attn_to_out_0", "transformer.single_transformer_blocks.0.attn.to_q",
    ],
)  # fmt: skip
def test_a_module_of_another_model_is_none_of_kleins(module):
    assert locate(module) is None


def test_metadata_is_shown_cut_short_and_on_one_line(file):
    metadata = {"modelspec.trigger_phrase": "a sks\x1b[31m\ncat", "ss_steps": "9" * 999, "format": "pt"}
    save_file(attention(), file, metadata)
    report = load_lora(file, TINY).report
    assert report.trigger_words == "a sks [31m cat"
    assert report.training == {"ss_steps": "9" * 200 + "..."}


def test_a_norms_scale_may_change(file):
    save_file({"transformer.transformer_blocks.0.attn.norm_q.diff": torch.arange(128.0)}, file)
    (update,) = load_lora(file, TINY).updates
    assert update.weight == "double_blocks.0.img_attn.norm.query_norm.scale"
    assert torch.equal(update.change(2.0, torch.ones(128)), 2 * torch.arange(128.0))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("[]", "holds no table"),
        ("{", "cannot be read as JSON"),
        ('{"peft_type": "IA3"}', "is a IA3 of peft; LORA, LOKR and LOHA are supported"),
        ('{"lora_alpha": "8"}', "lora_alpha in its config is '8'"),
        ('{"r": 1.5}', "r in its config is '1.5'; it must be a whole number. Correct it, or"),
        ('{"lora_alpha": 1e999}', "must be a finite number"),
        ('{"use_rslora": 1}', "use_rslora in its config is '1'"),
        ('{"alpha_pattern": {"to_q": null}}', "alpha_pattern has 'None'"),
        ('{"alpha_pattern": {"((a+)+)+x": 1}}', "is not a simple pattern of module names"),
        ('{"alpha_pattern": {"(": 1}}', "is not a simple pattern"),
        ('{"init_lora_weights": "pissa_niter_4"}', "started by 'pissa_niter_4', which changes the base weights too"),
        ('{"fan_in_fan_out": true}', "uses fan_in_fan_out of peft, which is not supported"),
        ('{"use_qalora": true}', "uses use_qalora of peft"),
        ('{"alora_invocation_tokens": [1, 2]}', "uses alora_invocation_tokens of peft"),
        (json.dumps({"rank_pattern": {"(.|.)" * 30 + "!": 1}}), "rank_pattern .* is not a simple pattern"),
        (json.dumps({"alpha_pattern": {".?" * 30 + "!": 1}}), "is not a simple pattern"),
        (json.dumps({"alpha_pattern": {"(.|.)" * 30 + "!": 1}}), "is not a simple pattern"),
        (json.dumps({"alpha_pattern": dict.fromkeys(map(str, range(300)), 1)}), "has 300 patterns; at most 256"),
        ('{"use_dora": true}', "says in its config that it is a DoRA, but has no magnitude"),
        ("9" * 3_000_000, "is larger than"),
    ],
)  # fmt: skip
def test_configs_that_are_wrong(tmp_path, config, says):
    save_file(attention(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(LoraError, match=says):
        load_lora(tmp_path, TINY)


@pytest.mark.parametrize(
    "pattern",
    [r"^transformer_blocks\.0\.attn\.to_q$", r".*blocks\.\d+\.attn.*to_q", r"(to_q|to_x|to_y)", "blocks.[0-3].to_q"],
)
def test_patterns_that_trainers_write(tmp_path, pattern):
    save_file(attention(1, "q"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "alpha_pattern": {pattern: 6}}))
    matches = re.match(rf"(.*\.)?({pattern})$", "transformer_blocks.0.attn.to_q")  # as peft does
    assert load_lora(tmp_path, TINY).report.alpha == ("6" if matches else "2")


def test_a_config_counts_where_it_must_belong_to_the_file(tmp_path):
    """A peft folder; a file alone with it; the metadata; but not one of several files."""
    config = {"lora_alpha": 6, "r": 2, "peft_type": "LORA"}
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(attention(), folder / "any.safetensors")
    assert {update.form.scale for update in load_lora(folder / "any.safetensors", TINY).updates} == {3.0}
    save_file(attention(), folder / "adapter_model.safetensors")
    report = load_lora(folder, TINY).report
    assert (report.file, report.alpha) == ("folder/adapter_model.safetensors", "6")
    report = load_lora(folder / "any.safetensors", TINY).report
    assert report.alpha == "none" and "adapter_config.json beside it was not used" in report.note
    stored = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in config.items()})}
    for metadata in (stored, {"lora_alpha": "6", "use_rslora": "False"}):
        save_file(attention(), tmp_path / "b.safetensors", metadata)
        assert load_lora(tmp_path / "b.safetensors", TINY).report.alpha == "6"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(LoraError, match="is a folder with no .safetensors file"):
        load_lora(empty, TINY)


@pytest.mark.parametrize("name", ["a.sft", "a.SAFETENSORS", "a.Sft"])
def test_every_name_that_comfyui_lists_is_read(tmp_path, name):
    path = tmp_path / "a.safetensors"
    save_file(attention(), path)
    path.rename(tmp_path / name)
    assert load_lora(tmp_path / name, TINY).report.applied == 6
    assert load_lora(tmp_path, TINY).report.file == name


def test_errors_name_the_file_and_not_the_machines_folders(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"x")
    for path in (tmp_path / "missing.safetensors", tmp_path / "a.ckpt", tmp_path, tmp_path / ("a" * 300)):
        with pytest.raises(LoraError) as caught:
            load_lora(path, TINY)
        assert str(caught.value).startswith(f"LoRA {path.name[:200]}") and str(tmp_path.parent) not in str(caught.value)


def test_a_file_written_again_at_once_is_read_again(file):
    """In the same size, and within one tick of the file system's clock."""
    for value in range(1, 20):
        save_file({"proj_out.diff": torch.full((128, 128), float(value))}, file)
        assert load_lora(file, TINY).updates[0].form.diff[0, 0] == value


class Model:
    """What a LoRA is loaded for."""


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that are read."""
    names = []
    read = loading.read_lora
    monkeypatch.setattr(loading, "read_lora", lambda path: names.append(path.name) or read(path))
    return names


def written(folder, count):
    files = [folder / f"{i}.safetensors" for i in range(count)]
    for path in files:
        save_file(attention(), path)
    return files


def test_no_lora_of_a_models_stack_is_read_twice(tmp_path, reads):
    """Nor one that something still holds; one that was trained on is."""
    model, files = Model(), written(tmp_path, 5)
    for _ in range(3):
        load_loras(files[:2], TINY, model)
        load_loras(files[2:3], TINY, model)  # another stack, chained
    assert reads == ["0.safetensors", "1.safetensors", "2.safetensors"]
    held = load_lora(files[3], TINY)
    assert load_lora(files[3], TINY) is held and load_loras([files[3]], TINY, Model()) == [held]
    assert reads[3:] == ["3.safetensors"]
    save_file(attention(parts="q"), files[3])
    assert load_lora(files[3], TINY).report.applied == 2 and reads[4:] == ["3.safetensors"]


def test_a_lora_that_no_model_uses_is_let_go(tmp_path, reads):
    model, other, files = Model(), Model(), written(tmp_path, 6)
    loras = {path.name: weakref.ref(load_loras([path], TINY, model)[0]) for path in files[:5]}
    assert [name for name, lora in loras.items() if lora()] == [path.name for path in files[2:5]]  # the last three
    kept = weakref.ref(load_loras([files[5]], TINY, other)[0])
    used = load_loras([files[4]], TINY, model)
    del model
    gc.collect()
    assert [name for name, lora in loras.items() if lora()] == ["4.safetensors"]  # by `used` alone
    assert kept() is not None
    del used, other
    gc.collect()
    assert not any(lora() for lora in (*loras.values(), kept)) and not loading._kept


def test_what_is_kept_is_bounded_in_bytes(tmp_path, reads, monkeypatch):
    model, files = Model(), written(tmp_path, 3)
    size = load_lora(files[0], TINY).size
    assert size == 12 * 2 * 128 * 4  # of float32
    monkeypatch.setattr(loading, "MAX_KEPT", 2 * size)
    loras = [weakref.ref(lora) for lora in load_loras(files, TINY, model)]
    assert [lora() is not None for lora in loras] == [True, True, False]
    monkeypatch.setattr(loading, "MAX_KEPT", size - 1)
    assert len(load_loras(files, TINY, model)) == 3 and not loading._kept


def test_bytes_count_what_a_change_takes_in_memory_and_no_tensor_twice():
    shared, other = torch.zeros(4, 128), torch.zeros(8)
    updates = (
        Update("a", None, LowRank(shared[:2], shared.T[:, :2], 1.0)),
        Update("b", None, LoKr((other,), (other, shared), 1.0), shared[2:]),
    )
    assert Lora(updates, Report("x")).size == 4 * (4 * 128 + 8)


def test_a_file_is_neither_mapped_nor_open_once_it_is_read(file):
    """So that nothing is locked on Windows, and a file truncated in place ends no process."""
    save_file(attention(), file)
    lora = load_lora(file, TINY)
    before = [update.form.delta() for update in lora.updates]
    if sys.platform == "linux":
        assert str(file) not in Path("/proc/self/maps").read_text()
        assert str(file) not in [os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
    os.truncate(file, 10)
    assert all(torch.equal(update.form.delta(), delta) for update, delta in zip(lora.updates, before, strict=True))


def test_a_file_that_is_cut_or_changed_while_it_is_read(file, monkeypatch):
    """A trainer may write it at the moment; the next run finds it whole."""
    save_file(attention(), file)
    content = file.read_bytes()
    header = reading.read_file_header

    def cut(*args):
        found = header(*args)
        os.truncate(file, len(content) - 500)
        return found

    monkeypatch.setattr(reading, "read_file_header", cut)
    with pytest.raises(LoraError, match=r"LoRA a\.safetensors was cut short while it was read; run again"):
        load_lora(file, TINY)
    monkeypatch.setattr(reading, "read_file_header", header)
    file.write_bytes(content)

    def overwritten(path):
        found = read_lora(path)
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
        return found

    monkeypatch.setattr(loading, "read_lora", overwritten)
    with pytest.raises(LoraError, match=r"LoRA a\.safetensors changed while it was read; run again"):
        load_lora(file, TINY)
    monkeypatch.undo()
    assert load_lora(file, TINY).report.applied == 6


def test_only_what_changes_the_model_is_read(file):
    """Not the weights of a checkpoint that lies among the LoRAs, which may be larger than the memory."""
    tensors = {**attention(), "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.ones(384, 128),
               "text_encoder.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 128)}  # fmt: skip
    save_file(tensors, file)
    raw = read_lora(file)
    assert set(raw.tensors) == set(attention()) and set(raw.keys) == set(tensors)


def test_tensors_are_on_the_cpu_whatever_the_default_device(file):
    save_file({**attention(), "transformer.norm_out.linear.diff": torch.ones(256, 128)}, file)
    torch.set_default_device("meta")
    try:
        lora = load_lora(file, TINY)
    finally:
        torch.set_default_device(None)
    assert {tensor.device.type for update in lora.updates for tensor in update.tensors()} == {"cpu"}


def test_every_type_is_read_as_the_library_reads_it(file):
    """Also where tensors do not lie at a multiple of their size."""
    values = torch.tensor([0, 1, 2, 3, 100])
    tensors = {f"proj_out.lora_A.{name}": values.to(dtype) for name, dtype in reading.DTYPES.items()}
    entries, data = {}, b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        dtype = name.rpartition(".")[2]
        entries[name] = {"dtype": dtype, "shape": [5], "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    header_file(file, dict(sorted(entries.items())), data)
    found = reading.read_lora(file).tensors
    for name, tensor in load_file(file).items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float()), name
        assert torch.equal(tensor.float(), tensors[name].float())


@pytest.mark.parametrize("dtype", FIRST_BAD)
def test_finiteness_by_the_bits(dtype):
    largest = torch.finfo(dtype).max
    values = [0.0, -0.0, largest, -largest, torch.finfo(dtype).tiny, float("nan"), -float("nan"), float("inf")]
    for value in values:
        tensor = torch.zeros(5, 3, dtype=torch.float64)
        tensor[2, 1] = value
        tensor = tensor.to(dtype)
        assert is_finite(tensor) == bool(tensor.double().isfinite().all()), value


def header_file(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_hostile_headers(file):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for header, says in (
        ({"a": entry, "b": entry}, "overlaps another"),
        ({"a": {**entry, "shape": [2**62, 2**62]}}, "describes no tensor"),
        ({"a": {**entry, "shape": [10**4000] * 2000}}, "describes no tensor"),
        ({"a": {**entry, "shape": [1] * 1000}}, "describes no tensor"),
        ({"a": {**entry, "shape": [2**47, 0], "data_offsets": [0, 0]}}, "4 bytes follow its last tensor"),
        ({"a": {**entry, "data_offsets": [0, 2**63]}}, "describes no tensor|truncated"),
        ({"a" * 100_000: entry}, "holds nothing"),
        ({"model." * 1_000_000 + "lora_A.weight": entry}, "holds nothing"),
        (b"[" * 5_000_000, "is not JSON"),
        (b'{"a": ' * 1_000_000, "is not JSON"),
        (b" " * 33_000_000, "has a header of 33000000 bytes; at most 32000000 are read"),
        ({}, "4 bytes follow|holds no tensors"),
    ):
        start = time.process_time()
        header_file(file, header, b"\0" * 4)
        with pytest.raises(LoraError, match=says):
            load_lora(file, TINY)
        assert time.process_time() - start < 5
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(LoraError, match="is not a safetensors file"):
        load_lora(file, TINY)


def test_a_header_of_very_many_tensors_is_refused_early(file):
    entries = {f"{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(400_000)}
    header_file(file, json.dumps(entries, separators=(",", ":")).encode(), b"\0" * len(entries))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(LoraError, match="has 400000 tensors; at most 20000 are read"):
        load_lora(file, TINY)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    assert time.process_time() - start < 5 and grown < 500


@pytest.mark.parametrize("rank", [2, 8, 20])
def test_a_loha_applied_is_its_change_at_any_rank(rank, monkeypatch):
    a1, b1, a2, b2 = (torch.randn(size) for size in ((24, rank), (rank, 40), (24, rank), (rank, 40)))
    form, x = LoHa(a1, b1, a2, b2, 0.5), torch.randn(3, 40)
    widths = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: widths.append(w.shape[0]) or linear(x, w))
    torch.testing.assert_close(form.apply(x), x @ (0.5 * (a1 @ b1) * (a2 @ b2)).T, rtol=1e-4, atol=1e-4)
    assert max(widths) <= 24  # never wider than the change itself


def test_an_alpha_without_effect_is_not_reported(file):
    save_file({"proj_out.diff": torch.ones(128, 128), "proj_out.alpha": torch.tensor(3.0)}, file)
    assert load_lora(file, TINY).report.alpha == "none"


def mutate(rng, content):
    """One to four changes of a kind that disks, networks and people make."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(content)) if rng.random() < 0.3 else rng.randrange(min(len(content), 1800))
        kind = rng.randrange(6)
        if kind == 0:
            content[place] = rng.randrange(256)
        elif kind == 1:
            del content[place : place + rng.choice((1, 8, 100, 10**6))]
        elif kind == 2:
            content[place:place] = rng.randbytes(rng.choice((1, 8, 100)))
        elif kind == 3:
            digits = [m.start() for m in re.finditer(rb"\d", bytes(content[:1800]))]
            if digits:
                content[rng.choice(digits)] = rng.choice(b"0123456789")
        elif kind == 4:
            old, new = rng.choice(((b"F32", b"F16"), (b"lora_A", b"lora_B"), (b"F32", b"I64"), (b"to_q", b"to_k"),
                                   (b"lora_A", b"lokr_w1"), (b'"shape"', b'"shade"'), (b"2,", b"9999999999999,"),
                                   (b"weight", b"alpha"), (b"[0,", b"[-1,"), (b"}", b"{")))  # fmt: skip
            content = bytearray(bytes(content).replace(old, new, rng.randint(1, 3)))
        else:
            content[:8] = struct.pack("<Q", rng.choice((0, 1, 7, 2**31, 2**63, rng.randrange(4000))))
        if not content:
            return b""
    return bytes(content)


def test_fuzz(tmp_path, seed):
    """Ten thousand mutated files: a report whose modules are all accounted for, or the one error; small and quick."""
    rng = random.Random(seed)
    file = tmp_path / "fuzz.safetensors"
    seeds = []
    for name, tensors in (
        ("peft", {**attention(2, "qv"), **low_rank("x_embedder")}),
        ("kohya", {n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for n, t in
                   low_rank("lora_unet_single_blocks_0_linear2", 128, 512, prefix="").items()}),
        ("lokr", {"lycoris_proj_out.lokr_w1": torch.randn(4, 4), "lycoris_proj_out.lokr_w2": torch.randn(32, 32),
                  "lycoris_proj_out.alpha": torch.tensor(1.0)}),
    ):  # fmt: skip
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps({"lora_alpha": 4, "alpha_pattern": {"to_q": 3}}),
                                  "name": name})  # fmt: skip
        seeds.append(file.read_bytes())
    used = refusals = 0
    slowest = 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(MUTATIONS):
        file.write_bytes(mutate(rng, rng.choice(seeds)))
        start = time.process_time()
        try:
            lora = canonical(read_lora(file), TINY)  # past the store, which knows files by their time
            if lora.report.problem:
                raise LoraError(lora.report.problem)
        except LoraError as error:
            assert len(str(error)) < 1500 and "\n" not in str(error), error
            refusals += 1
        else:
            report = lora.report
            assert report.applied == len(lora.updates) > 0
            assert report.applied + len(report.left_out) >= report.total and str(report)
            used += 1
        slowest = max(slowest, time.process_time() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    print(f"{used} used, {refusals} refused, slowest {slowest:.3f} s, {grown:.0f} MB more at most")
    assert used > 100 and refusals > 1000
    assert grown < 100 and slowest < 5
