"""What a file is, from its header. Oracles: the model classes of diffusers and transformers, built without memory."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from headers import WRONG, as_header, assert_advises, prefixed, quantised, write
from klein_cns.klein import tiny
from klein_cns.weights.components import check_pair, check_text_encoder, check_transformer, check_vae
from klein_cns.weights.files import read_header, weight_files
from klein_cns.weights.identify import identify
from safetensors import safe_open
from safetensors.torch import save_file

CHECKS = {"transformer": check_transformer, "text_encoder": check_text_encoder, "vae": check_vae}
# What it is


@pytest.mark.parametrize(
    ("model", "kind", "name", "layout", "width", "context"),
    [
        ("9B", "transformer", "FLUX.2 [klein] 9B", "bfl", 4096, 12288),
        ("9B diffusers", "transformer", "FLUX.2 [klein] 9B", "diffusers", 4096, 12288),
        ("4B", "transformer", "FLUX.2 [klein] 4B", "bfl", 3072, 7680),
        ("4B diffusers", "transformer", "FLUX.2 [klein] 4B", "diffusers", 3072, 7680),
        ("dev", "transformer", "FLUX.2 [dev]", "bfl", 6144, 15360),
        ("FLUX.2 of another width", "transformer", "FLUX.2 transformer of hidden width 256", "diffusers", 256, 96),
        ("FLUX.1", "transformer", "FLUX.1", "bfl", 3072, 4096),
        ("FLUX.1 diffusers", "transformer", "FLUX.1", "diffusers", 3072, 4096),
        ("Chroma", "transformer", "another diffusion model", "bfl", 3072, 4096),
        ("SDXL", "transformer", "another diffusion model", None, None, None),
        ("Qwen3-8B", "text_encoder", "Qwen3-8B", None, 4096, None),
        ("Qwen3-4B", "text_encoder", "Qwen3-4B", None, 2560, None),
        ("Qwen3-14B", "text_encoder", "another Qwen3 of width 5120", None, 5120, None),
        ("Mistral", "text_encoder", "Mistral-Small-3.2-24B", None, 5120, None),
        ("T5", "text_encoder", "T5", None, None, None),
        ("CLIP", "text_encoder", "CLIP", None, None, None),
        ("FLUX.2's VAE", "vae", "FLUX.2 VAE", "diffusers", 32, None),
        ("FLUX.2's VAE in BFL layout", "vae", "FLUX.2 VAE", "bfl", 32, None),
        ("FLUX.1's VAE", "vae", "another VAE, of 16 latent channels", "diffusers", 16, None),
        ("TAESD", "vae", "another VAE, or a part of one", None, None, None),
        ("LoRA", "lora", "LoRA", None, None, None),
        ("kohya LoRA", "lora", "LoRA", None, None, None),
        ("LoKr", "lora", "LoRA", None, None, None),
        ("bitsandbytes", "unknown", "weights packed by bitsandbytes", None, None, None),
        ("numbers", "unknown", "unknown", None, None, None),
    ],
)
def test_identify(models, model, kind, name, layout, width, context):
    found = identify(as_header(models[model], "folder/x.safetensors"))
    assert (found.kind, found.name, found.layout, found.width, found.context) == (kind, name, layout, width, context)
    assert (found.file, found.tiny, found.distilled, found.lacks) == ("x.safetensors", False, False, "")


@pytest.mark.parametrize("shape", [[], [0], [7], [1, 2, 3]])
def test_strange_shapes_are_judged_too(models, shape):
    for tensors in models.values():
        found = identify(as_header({name: (dtype, shape) for name, (dtype, _) in tensors.items()}))
        assert "klein" not in found.name and found.name != "FLUX.2 VAE"


@pytest.mark.parametrize("model", ["9B", "9B diffusers", "4B", "dev", "Qwen3-8B", "Qwen3-4B"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("fp8", "fp8"),
        ("weight_scale", "scaled fp8"),
        ("scale_weight", "scaled fp8"),
        ("mxfp8", "mxfp8"),
        ("nvfp4", "nvfp4"),
        ("int8", "int8"),
        ("int4 in int8", "int8"),
    ],
)
def test_quantised_files_are_the_same_models(models, model, kind, words):
    plain = identify(as_header(models[model]))
    assert identify(as_header(quantised(models[model], kind))) == plain._replace(precision=words)


def test_precision_lists_the_largest_share_first(models):
    stored = dict(models["9B"])
    stored |= quantised({name: value for name, value in stored.items() if "_blocks." in name}, "weight_scale")
    assert identify(as_header(stored)).precision == "scaled fp8 + bf16"
    stored |= quantised({name: value for name, value in models["9B"].items() if "_mlp." in name}, "nvfp4")
    assert identify(as_header(stored)).precision == "scaled fp8 + nvfp4 + bf16"
    assert identify(as_header(models["FLUX.2's VAE"])).precision == "fp32"


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        ("9B", "model.diffusion_model."),
        ("9B", "model."),
        ("9B diffusers", "model.diffusion_model."),
        ("FLUX.2's VAE", "vae."),
        ("FLUX.2's VAE", "first_stage_model."),
    ],
)
def test_prefixes(models, model, prefix):
    plain = identify(as_header(models[model]))
    assert identify(as_header(prefixed(models[model], prefix))) == plain._replace(prefix=prefix)


def test_the_text_encoder_with_and_without_its_prefix(models):
    bare = {name.removeprefix("model."): value for name, value in models["Qwen3-8B"].items()}
    plain = identify(as_header(models["Qwen3-8B"]))
    assert plain.prefix == "model."
    assert identify(as_header(bare)) == plain._replace(prefix="")


def test_a_qwen3_vl_is_another_model(models):
    tower = {"model.visual.merger.linear_fc2.weight": ("BF16", [4096, 4096])}
    assert identify(as_header({**models["Qwen3-8B"], **tower})).name == "Qwen3-VL of width 4096"


def test_norms_may_be_called_weight_as_comfyui_allows(models):
    renamed = {re.sub(r"_norm\.scale$", "_norm.weight", name): value for name, value in models["9B"].items()}
    assert renamed != models["9B"]
    assert identify(as_header(renamed)) == identify(as_header(models["9B"]))


@pytest.mark.parametrize(
    ("name", "metadata", "distilled"),
    [
        ("flux-2-klein-9b-fp8.safetensors", {}, True),
        ("FLUX2_Klein_9B.safetensors", {}, True),
        ("flux-2-klein-base-9b-fp8.safetensors", {}, False),
        ("my_finetune.safetensors", {}, False),
        ("my_finetune.safetensors", {"is_distilled": "true"}, True),
        ("flux-2-klein-9b.safetensors", {"is_distilled": "False"}, False),
        ("base_models/FLUX.2-klein-9B", {}, True),
        ("FLUX.2-klein-9B/transformer", {}, True),
        ("klein/FLUX.2-klein-base-9B/transformer", {}, False),
    ],
)
def test_distilled_as_far_as_metadata_or_name_tell(models, name, metadata, distilled):
    assert identify(as_header(models["9B"], name, metadata)).distilled is distilled


# Passing the checks


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("transformer", "9B"),
        ("transformer", "9B diffusers"),
        ("text_encoder", "Qwen3-8B"),
        ("vae", "FLUX.2's VAE"),
        ("vae", "FLUX.2's VAE in BFL layout"),
    ],
)
def test_what_is_needed_passes(models, tmp_path, kind, model):
    path = write(tmp_path / "base.safetensors", models[model])
    assert CHECKS[kind](path) == identify(read_header(str(path)))


def test_a_distilled_klein_passes_and_says_so(models, tmp_path):
    assert check_transformer(write(tmp_path / "flux-2-klein-9b.safetensors", models["9B"])).distilled


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", CHECKS)
def test_the_tiny_klein_passes_as_random_test_weights(tiny_folder, kind):
    found = CHECKS[kind](tiny_folder)
    assert (found.kind, found.tiny, found.distilled, found.precision) == (kind, True, False, "fp32")
    assert found.file == f"tiny/{kind}"
    assert CHECKS[kind](tiny_folder / kind) == found
    file = next((tiny_folder / kind).glob("*.safetensors"))
    assert CHECKS[kind](file) == found._replace(file=file.name)
    if kind != "vae":
        assert "random test weights" in found.name


def test_the_mark_of_a_tiny_klein_lifts_no_other_check(models, tiny_folder, tmp_path):
    mark = {"klein_cns": "tiny"}
    four = write(tmp_path / "4b.safetensors", models["4B"], mark)
    with pytest.raises(ValueError, match=r"4b\.safetensors is a transformer \(FLUX\.2 \[klein\] 4B\); needed is"):
        check_transformer(four)
    with pytest.raises(ValueError, match=r"is a VAE \(another VAE, of 16 latent channels\)"):
        check_vae(write(tmp_path / "vae.safetensors", models["FLUX.1's VAE"], mark))
    with pytest.raises(ValueError, match=r"tiny/text_encoder is a text encoder \(random test weights of a tiny Qwen3"):
        check_transformer(tiny_folder / "text_encoder")


def test_the_tiny_klein_without_its_mark_is_refused(tiny_folder, tmp_path):
    for kind, words in (
        ("transformer", r"\(FLUX\.2 transformer of hidden width 128\)"),
        ("text_encoder", r"\(another Qwen3 of width 32\)"),
    ):
        header = read_header(tiny_folder / kind)
        path = write(tmp_path / f"{kind}.safetensors", {name: list(value) for name, value in header.tensors.items()})
        with pytest.raises(ValueError, match=words):
            CHECKS[kind](path)


# Refusals


@pytest.mark.parametrize(("kind", "model", "words"), WRONG)
def test_what_is_not_needed_is_refused_in_one_sentence(models, tmp_path, kind, model, words):
    path = write(tmp_path / "wrong one.safetensors", models[model])
    with pytest.raises(ValueError, match=re.escape(f"wrong one.safetensors is {words}; needed is ")) as caught:
        CHECKS[kind](path)
    assert_advises(caught.value, kind)


@pytest.mark.parametrize(
    ("kind", "model", "gone"),
    [
        ("transformer", "9B", "double_blocks.7.txt_mlp.2.weight"),
        ("transformer", "9B", "single_blocks.23.norm.key_norm.scale"),
        ("transformer", "9B diffusers", "norm_out.linear.weight"),
        ("text_encoder", "Qwen3-8B", "layers.27.self_attn.q_norm.weight"),
        ("text_encoder", "Qwen3-8B", "embed_tokens.weight"),
        ("vae", "FLUX.2's VAE", "encoder.conv_in.weight"),
        ("vae", "FLUX.2's VAE", "bn.running_var"),
    ],
)
def test_incomplete_weights_are_refused(models, tmp_path, kind, model, gone):
    left = {name: value for name, value in models[model].items() if not name.endswith(gone)}
    assert len(left) == len(models[model]) - 1
    path = write(tmp_path / "part.safetensors", left)
    words = rf"part\.safetensors is an incomplete .*, without 1 of its tensors \({re.escape(gone)}\); needed is"
    with pytest.raises(ValueError, match=words) as caught:
        CHECKS[kind](path)
    assert_advises(caught.value, kind)


SMALL = {"a": ("F32", [2, 3]), "b": ("BF16", [4])}


def entry(name, **values):
    return lambda entries: entries[name].update(values)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"abc", "is not a safetensors file"),
        (b"GGUF\x03\0\0\0" + bytes(90), "is a GGUF file"),
        (b"PK\x03\x04\x14\x00\x08\x08" + bytes(90), "is a PyTorch or zip archive"),
        (b"<!doctype html><html>", "is a web page, saved in place of the file"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer in place of the file"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "is not a safetensors file"),
        ((500).to_bytes(8, "little") + b'{"a": ', "is truncated: its header takes 508 bytes, the file has 14"),
        ((3).to_bytes(8, "little") + b"{a}", "is not a safetensors file: its header is not JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "is not a safetensors file: its header is not JSON"),
        ((90_000).to_bytes(8, "little") + b"[" * 90_000, "is not a safetensors file: its header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "is not a safetensors file: its header is not a table of tensors"),
    ],
)
def test_files_that_are_no_safetensors(tmp_path, content, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^x\\.safetensors {re.escape(words)}\\.$"):
        read_header(path)
    with pytest.raises(ValueError, match=f"^x\\.safetensors {re.escape(words)}; needed is ") as caught:
        check_vae(path)
    assert_advises(caught.value, "vae")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"change": entry("b", data_offsets=[20, 28]), "cut": 4}, "is damaged: in its data b overlaps another"),
        ({"cut": 1}, r"is truncated: its tensors take 32 bytes, the file has 31 of them"),
        ({"cut": -5}, r"is damaged: 5 bytes follow its last tensor"),
        ({"change": entry("b", data_offsets=[25, 33]), "cut": -1}, "is damaged: in its data b leaves a gap before it"),
        ({"change": entry("a", data_offsets=[-24, 0])}, "is damaged: the header's entry a describes no tensor"),
        ({"change": entry("a", data_offsets=[24, 0])}, "is damaged: the header's entry a describes no tensor"),
        ({"change": entry("a", data_offsets=[0])}, "is damaged: the header's entry a describes no tensor"),
        ({"change": entry("a", data_offsets=[0, 24.0])}, "is damaged: the header's entry a describes no tensor"),
        ({"change": entry("a", shape=[2, 4])}, "is damaged: the header's entry a describes no tensor"),
        ({"change": entry("a", shape=[-2, -3])}, "is damaged: the header's entry a describes no tensor"),
        ({"change": entry("a", shape=6)}, "is damaged: the header's entry a describes no tensor"),
        ({"change": entry("a", dtype=3)}, "is damaged: the header's entry a describes no tensor"),
        ({"change": lambda entries: entries.update(c=None)}, "is damaged: the header's entry c describes no tensor"),
        ({"metadata": {"step": 3}}, "is damaged: its metadata is not a table of texts"),
    ],
)
def test_files_that_are_damaged(tmp_path, fault, words):
    path = write(tmp_path / "x.safetensors", SMALL, **fault)
    with pytest.raises(ValueError, match=f"^x\\.safetensors {re.escape(words)}\\.$"):
        read_header(path)
    with pytest.raises(ValueError, match=r"; needed is Qwen3-8B"):
        check_text_encoder(path)


def test_a_missing_file_is_said_with_what_to_get(tmp_path):
    with pytest.raises(ValueError, match=r"^gone\.safetensors does not exist\.$"):
        read_header(tmp_path / "gone.safetensors")
    for kind, check in CHECKS.items():
        with pytest.raises(ValueError, match=r"^gone\.safetensors does not exist; needed is ") as caught:
            check(tmp_path / "gone.safetensors")
        assert_advises(caught.value, kind)


# Reading


def test_a_header_is_as_the_safetensors_library_reads_it(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "half": torch.zeros(3, 5, dtype=torch.bfloat16),
        "eight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
        "none": torch.zeros(0, 7),
        "scalar": torch.ones(()),
        "long": torch.zeros(2, dtype=torch.int64),
        "flags": torch.zeros(3, dtype=torch.bool),
    }
    tensors["long"] += 258
    save_file(tensors, path, metadata={"format": "pt", "ß": "ü"})
    header = read_header(path)
    start = header.tensors["long"].start
    assert path.read_bytes()[start : start + 16] == tensors["long"].numpy().tobytes()
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        read = {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()}
        assert {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()} == read
        assert file.metadata() == header.metadata


def test_only_the_header_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "x.safetensors", {"a": ("F32", [1024, 1024, 1024])})
    taken, opened = [], Path.open

    class Counted:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def read(self, size):
            taken.append(self.file.read(size))
            return taken[-1]

    monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: Counted(opened(self, *args, **kwargs)))
    assert read_header(path).tensors["a"][:2] == ("F32", (1024, 1024, 1024))
    assert [len(part) for part in taken] == [8, int.from_bytes(taken[0], "little")]


# Folders of shards


def shards(folder, models, index=True):
    """A 9B in diffusers layout over three files."""
    names = sorted(models["9B diffusers"])
    weight_map = {}
    for i in range(3):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-00003.safetensors"
        part = {name: models["9B diffusers"][name] for name in names[i::3]}
        write(folder / file, part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    return folder


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_judged_as_one(models, tmp_path, index):
    folder = shards(tmp_path / "FLUX.2-klein-base-9B" / "transformer", models, index)
    found = check_transformer(folder)
    whole = identify(as_header(models["9B diffusers"]))
    assert found == whole._replace(file="FLUX.2-klein-base-9B/transformer")
    assert weight_files(folder) == sorted(folder.glob("*.safetensors"))
    if index:
        (folder.parent / "model_index.json").write_text(json.dumps({"is_distilled": True}))
        assert check_transformer(folder.parent) == found._replace(distilled=True)


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(models, tmp_path, index):
    folder = shards(tmp_path / "transformer", models, index)
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    words = r"/transformer lacks 1 of 3 shards \(diffusion_pytorch_model-00002-of-00003\.safetensors\); needed is FLUX"
    with pytest.raises(ValueError, match=words) as caught:
        check_transformer(folder)
    assert_advises(caught.value, "transformer")


def test_a_truncated_shard_is_named(models, tmp_path):
    folder = shards(tmp_path / "transformer", models)
    shard = folder / "diffusion_pytorch_model-00003-of-00003.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"/transformer/diffusion_pytorch_model-00003-of-00003\.safetensors is trunc"):
        check_transformer(folder)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", r"part/model\.safetensors\.index\.json is not an index of shards\."),
        ("[]", r"part/model\.safetensors\.index\.json is not an index of shards\."),
        ('{"weight_map": {}}', r"is not an index of shards\."),
        (
            '{"weight_map": {"a": "../x.safetensors"}}',
            r"is not an index of shards: '\.\./x\.safetensors' is not a file name",
        ),
        ('{"weight_map": {"a": "/x.safetensors"}}', r"'/x\.safetensors' is not a file name"),
        ('{"weight_map": {"a": 3}}', r"3 is not a file name"),
        ('{"weight_map": {"a": "x.safetensors", "z": "x.safetensors"}}', r"part lacks z, which its index names"),
        ('{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}', r"y\.safetensors holds a, which another"),
    ],
)
def test_broken_indices(tmp_path, index, words):
    for name in "xy":
        write(tmp_path / "part" / f"{name}.safetensors", SMALL)
    (tmp_path / "part" / INDEX).write_text(index)
    with pytest.raises(ValueError, match=words):
        read_header(tmp_path / "part")


def test_folders_without_one_set_of_weights(tmp_path):
    folder = tmp_path / "part"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"/part is a folder without a \.safetensors file"):
        read_header(folder)
    write(folder / "model.safetensors", SMALL)
    assert read_header(folder).tensors.keys() == SMALL.keys()
    write(folder / "model.fp16.safetensors", SMALL)
    words = r"/part holds several sets of weights \(model\.fp16\.safetensors, model\.safetensors\)"
    with pytest.raises(ValueError, match=words):
        read_header(folder)


def test_a_diffusers_folder_without_a_component(tiny_folder, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_folder, folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match=r"^tiny/vae does not exist; needed is FLUX\.2's VAE"):
        check_vae(folder)


# Pairs


def test_pairs(models, tiny_folder):
    nine, four, dev = (identify(as_header(models[name], "t.safetensors")) for name in ("9B", "4B", "dev"))
    eight_b, four_b = (identify(as_header(models[name], "q.safetensors")) for name in ("Qwen3-8B", "Qwen3-4B"))
    small, small_text = check_transformer(tiny_folder), check_text_encoder(tiny_folder)
    for pair in ((nine, eight_b), (four, four_b), (small, small_text)):
        check_pair(*pair)
    words = (
        r"^q\.safetensors is a text encoder \(Qwen3-4B\) of width 2560, but t\.safetensors is a transformer "
        r"\(FLUX\.2 \[klein\] 9B\), trained with another; needed is Qwen3-8B, usually"
    )
    with pytest.raises(ValueError, match=words) as caught:
        check_pair(nine, four_b)
    assert_advises(caught.value, "text_encoder")
    with pytest.raises(ValueError, match=r"needed is Qwen3-4B, of width 2560\.$"):
        check_pair(four, eight_b)
    with pytest.raises(ValueError, match=r"needed is Mistral-Small-3\.2-24B, of width 5120\.$"):
        check_pair(dev, eight_b)
    with pytest.raises(ValueError, match=r"of width 32, but t\.safetensors is a transformer .* needed is Qwen3-8B"):
        check_pair(nine, small_text)
    with pytest.raises(ValueError, match=r"needed is random test weights of a tiny Qwen3, of width 32\.$"):
        check_pair(small, eight_b)
    other = identify(as_header(models["FLUX.2 of another width"]))
    with pytest.raises(ValueError, match=r"needed is one of width 32\.$"):
        check_pair(other, eight_b)
