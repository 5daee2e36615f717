"""Out of memory, as PyTorch and Python really say it, and as the user reads it."""

from __future__ import annotations

import pytest
import torch
from klein_cns import cli
from klein_cns.klein import KleinPipeline
from klein_cns.klein.memory import is_out_of_memory, memory_advice
from klein_cns.klein.words import first_line


def exhaust(*_):
    """PyTorch's own error on the CPU: an exabyte."""
    return torch.empty(2**58)


def test_pytorchs_and_pythons_own_errors_are_told_from_others():
    with pytest.raises(RuntimeError) as allocator:
        exhaust()
    assert is_out_of_memory(allocator.value)
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 5.91 GB). Tried to allocate 1 GB"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert is_out_of_memory(MemoryError())
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), OSError()):
        assert not is_out_of_memory(other)


@pytest.mark.parametrize("stage", ["text_encoder", "vae", "transformer"])
def test_a_run_says_what_to_lower(photo, stage):
    pipeline = KleinPipeline.from_pretrained("tiny", device="cpu")
    part = getattr(pipeline.pipe, stage)
    (part.decoder if stage == "vae" else part).register_forward_pre_hook(exhaust)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"memory ran out \(") as error:
        pipeline("x", [photo, photo], image_size=(80, 64), num_images=2, num_inference_steps=1)
    assert str(error.value).endswith(
        "); lower image_size (80x64), num_images (2), reference_megapixels (1) or the number of pictures (2), or load "
        "the model with cpu_offload (--cpu-offload)."
    )


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="^shapes$"), memory_advice("lower nothing"):
        raise RuntimeError("shapes")


def test_the_command_says_it_on_one_line(capsys, tmp_path, monkeypatch):
    def from_pretrained(*args, **kwargs):
        pipeline = load(*args, **kwargs)
        pipeline.pipe.transformer.register_forward_pre_hook(exhaust)
        return pipeline

    load = KleinPipeline.from_pretrained
    monkeypatch.setattr(KleinPipeline, "from_pretrained", from_pretrained)
    arguments = ["--model", "tiny", "--device", "cpu", "--image-size", "64x64", "--num-inference-steps", "1"]
    status = cli.main(["generate", "-p", "x", "-o", str(tmp_path / "a.png"), *arguments])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 1 and last.startswith("klein-cns: memory ran out (") and "lower image_size (64x64)" in last
    assert list(tmp_path.iterdir()) == []


def test_an_error_without_text_is_called_by_its_type():
    assert first_line(RuntimeError()) == "RuntimeError"
    assert first_line(AssertionError("")) == "AssertionError"
    assert first_line(OSError("no such device.\nmore")) == "no such device"
