"""The cache of encodings: its bound, where it lives, and that nobody can change what it keeps."""

from __future__ import annotations

import torch
from klein_cns.klein.cache import TensorCache

CPU = torch.device("cpu")


def counting(value, calls):
    def make():
        calls.append(1)
        return value

    return make


def conditioning(number=1.0, length=4):
    """As ComfyUI has it: a list of [tensor, options]."""
    return [[torch.full((1, length), number), {"pooled_output": None, "reference_latents": [torch.ones(1, 2)]}]]


def test_it_is_bounded_in_bytes_and_forgets_what_was_asked_for_longest_ago():
    cache, calls = TensorCache(1000), []
    for key in "abc":  # 400 bytes each
        cache.get(key, counting(torch.zeros(100), calls), CPU)
        assert cache.bytes <= 1000
    cache.get("b", counting(torch.zeros(100), calls), CPU)
    assert len(calls) == 3  # b was kept
    cache.get("d", counting(torch.zeros(100), calls), CPU)
    cache.get("b", counting(torch.zeros(100), calls), CPU)
    assert len(calls) == 4  # and c went for d
    cache.get("c", counting(torch.zeros(100), calls), CPU)
    assert len(calls) == 5


def test_many_small_values_are_all_kept():
    cache, calls = TensorCache(1000), []
    for _ in range(2):
        for key in range(100):
            cache.get(key, counting(torch.zeros(2), calls), CPU)
    assert len(calls) == 100


def test_a_value_larger_than_the_cache_is_made_each_time_and_evicts_nothing():
    cache, calls = TensorCache(100), []
    cache.get("small", counting(torch.zeros(10), calls), CPU)
    for _ in range(2):
        cache.get("large", counting(torch.zeros(1000), calls), CPU)
    cache.get("small", counting(torch.zeros(10), calls), CPU)
    assert len(calls) == 3 and cache.bytes == 40


def test_what_is_handed_out_can_be_changed_without_harm():
    """The first time, and every time after; lists, options and the tensors themselves."""
    cache = TensorCache(1000)
    for _ in range(3):
        found = cache.get("key", conditioning, CPU)
        assert len(found) == 1 and found[0][0].tolist() == [[1.0] * 4]
        assert len(found[0][1]["reference_latents"]) == 1 and float(found[0][1]["reference_latents"][0].sum()) == 2
        found[0][0].mul_(0)
        found[0][1]["reference_latents"][0].add_(1)
        found[0][1]["reference_latents"].append(None)
        found[0][1]["mask"] = "mine"
        found.append(found[0])


def test_it_lives_on_the_cpu_and_hands_out_on_the_device_asked_for():
    cache = TensorCache(1000)
    cache.get("key", lambda: torch.empty(3, dtype=torch.bfloat16), CPU)
    found = cache.get("key", conditioning, torch.device("meta"))
    assert found.device.type == "meta" and found.dtype == torch.bfloat16
    assert [value.device for value in cache._kept.values()] == [CPU]
