"""LoRA files that are damaged, hostile, foreign or incomplete; what each is told, and what is kept in memory."""

from __future__ import annotations

import json
import random
import re
import resource
import struct
import time

import pytest
import torch
from klein_cns.lora import LoraError, examine_lora, load_lora
from klein_cns.lora import load as loading
from klein_cns.lora.canonical import canonical
from klein_cns.lora.names import locate
from klein_cns.lora.read import FIRST_BAD, is_finite, read_lora
from klein_cns.lora.updates import LoHa
from klein_cns.weights.architecture import ARCHITECTURES, DEV, KLEIN_4B, KLEIN_9B, TINY
from safetensors.torch import save_file

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
        named = {re.sub(r"(linear1|lin)\.lora_A", r"\1.lora_down", n).replace("1.lora_B", "1.lora_up"): t
                 for n, t in tensors.items()}
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
        ({**whole, up: torch.randn(128)}, r"holds up of .* in the shape \[128\], which is no matrix"),
        ({**whole, up: torch.full((128, 2), float("nan"))}, r"holds NaN or infinite values in up of transformer\."),
        ({**whole, Q.format(1, "v", "A"): torch.full((2, 128), -float("inf"))}, r"NaN or infinite values in down of"),
        ({**whole, up.replace("lora_B.weight", "alpha"): torch.tensor(float("nan"))}, r"has as alpha of .* no finite"),
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
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": "a text encoder's weight; a klein LoRA changes the transformer "
        "alone",
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
        ('{"alpha_pattern": {"((a+)+)+x": 1}}', "is no simple pattern of module names"),
        ('{"alpha_pattern": {"(": 1}}', "is no simple pattern"),
        ('{"init_lora_weights": "pissa_niter_4"}', "started by 'pissa_niter_4', which changes the base weights too"),
        ('{"fan_in_fan_out": true}', "uses fan_in_fan_out of peft, which is not supported"),
        ('{"use_qalora": true}', "uses use_qalora of peft"),
        ('{"alora_invocation_tokens": [1, 2]}', "uses alora_invocation_tokens of peft"),
        (json.dumps({"rank_pattern": {"(.|.)" * 30 + "!": 1}}), "rank_pattern .* is no simple pattern"),
        (json.dumps({"alpha_pattern": {".?" * 30 + "!": 1}}), "is no simple pattern"),
        (json.dumps({"alpha_pattern": {"(.|.)" * 30 + "!": 1}}), "is no simple pattern"),
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


def test_nothing_is_read_twice_and_the_store_is_bounded(tmp_path, monkeypatch):
    reads = []
    read = loading.read_lora
    monkeypatch.setattr(loading, "read_lora", lambda path: reads.append(path.name) or read(path))
    files = [tmp_path / f"{i}.safetensors" for i in range(2 * loading.KEPT)]
    for path in files:
        save_file(attention(), path)
        load_lora(path, TINY)
    assert len(reads) == len(files) and len(loading._kept) <= loading.KEPT
    for _ in range(3):
        load_lora(files[-1], TINY)
    assert len(reads) == len(files)
    save_file(attention(parts="q"), files[-1])
    assert load_lora(files[-1], TINY).report.applied == 2 and len(reads) == len(files) + 1
    load_lora(files[0], TINY)
    assert len(reads) == len(files) + 2


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
        start = time.perf_counter()
        header_file(file, header, b"\0" * 4)
        with pytest.raises(LoraError, match=says):
            load_lora(file, TINY)
        assert time.perf_counter() - start < 5
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(LoraError, match="is no safetensors file"):
        load_lora(file, TINY)


def test_a_header_of_very_many_tensors_is_refused_early(file):
    entries = {f"{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(400_000)}
    header_file(file, json.dumps(entries, separators=(",", ":")).encode(), b"\0" * len(entries))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with pytest.raises(LoraError, match="has 400000 tensors; at most 20000 are read"):
        load_lora(file, TINY)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    assert time.perf_counter() - start < 5 and grown < 500


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
        start = time.perf_counter()
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
        slowest = max(slowest, time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    print(f"{used} used, {refusals} refused, slowest {slowest:.3f} s, {grown:.0f} MB more at most")
    assert used > 100 and refusals > 1000
    assert grown < 100 and slowest < 5
