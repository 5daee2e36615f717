"""The seam of a masked edit, against what it is in closed form."""

from __future__ import annotations

import pytest
import torch
from klein_cns.klein.masks import FEATHER, blend_inside


def weight(mask):
    """How much of the edit each pixel takes."""
    size = mask.shape[-2:]
    return blend_inside(torch.ones(1, 1, *size), torch.zeros(1, 1, *size), mask)[0, 0]


def test_a_straight_edge_fades_in_over_the_feather():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 20:] = 1
    row = weight(mask)[32]
    ramp = torch.tensor([(1 + 2 * depth) / (2 * FEATHER + 1) for depth in range(FEATHER)])
    assert torch.equal(row[:20], torch.zeros(20))
    torch.testing.assert_close(row[20 : 20 + FEATHER], ramp)
    assert torch.equal(row[20 + FEATHER :], torch.ones(64 - 20 - FEATHER))


def test_the_border_of_the_picture_is_no_seam():
    assert torch.equal(weight(torch.ones(1, 1, 40, 40)), torch.ones(40, 40))


@pytest.mark.parametrize("width", [1, 3, 9])
def test_a_mask_thinner_than_the_feather_still_edits_fully(width):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 30 : 30 + width] = 1
    assert float(weight(mask).max()) == pytest.approx(1)
    assert float(weight(mask)[:, :30].max()) == 0


def test_outside_the_mask_every_bit_is_the_originals(seed):
    generator = torch.Generator().manual_seed(seed)
    original, edited = (torch.rand(count, 3, 50, 70, generator=generator) for count in (1, 2))
    mask = (torch.rand(1, 1, 50, 70, generator=generator) > 0.7).float()
    result = blend_inside(edited, original, mask)
    outside = (mask == 0).expand(2, 3, 50, 70)
    assert torch.equal(result[outside], original.expand(2, 3, 50, 70)[outside])
    assert not torch.equal(result, original.expand(2, 3, 50, 70))


def test_sizes_that_differ_are_named():
    with pytest.raises(ValueError, match="the edit is 8x6, the original 8x6 and the mask 4x4; they must have one size"):
        blend_inside(torch.zeros(1, 3, 6, 8), torch.zeros(1, 3, 6, 8), torch.zeros(1, 1, 4, 4))
