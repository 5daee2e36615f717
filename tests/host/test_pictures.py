"""The templates' pictures, which the pack puts into ComfyUI's input folder when it is loaded."""

from __future__ import annotations

import numpy as np
from comfy_base import make_base
from comfy_graph import EXAMPLES, made, node
from comfy_host import Server
from PIL import Image

PICTURES = {path.name: path.read_bytes() for path in (EXAMPLES / "pictures").glob("klein_cns_*")}
MASKED = "klein_cns_coffee_mask.png"


def test_they_are_small_and_each_states_its_licence():
    assert all(len(content) < 150_000 for content in PICTURES.values())
    assert sum(map(len, PICTURES.values())) < 400_000
    stated = (EXAMPLES / "pictures" / "SOURCES.md").read_text(encoding="utf-8")
    assert PICTURES and all(f"`{name}`" in stated for name in PICTURES)


def test_a_fresh_comfyui_offers_them(fresh):
    there = {path.name: path.read_bytes() for path in (fresh.base / "input").glob("klein_cns_*")}
    assert there == PICTURES
    offered = fresh.get("/object_info/LoadImage")["LoadImage"]["input"]["required"]["image"][0]
    assert set(offered) >= PICTURES.keys()


def test_the_masks_edge_is_the_cups_and_nothing_else_may_change(server):
    """ComfyUI reads the alpha of a lossy file as 254 of 255, which would let every pixel change a little."""
    server.run({
        "load": node("LoadImage", image=MASKED), "show": node("MaskToImage", mask=["load", 1]),
        "save": node("ProbeSave", name="mask_of_the_cup", image=["show", 0]),
    })  # fmt: skip
    mask = made(server, "mask_of_the_cup")
    with Image.open(EXAMPLES / "pictures" / MASKED) as picture:
        alpha = np.array(picture.convert("RGBA"))[..., 3]
    assert set(np.unique(alpha)) == {0, 255} and 0.02 < (alpha == 0).mean() < 0.2
    assert np.array_equal(mask[0, :, :, 0].numpy(), (alpha == 0).astype("float32"))


def test_a_users_file_stays_and_an_input_folder_that_cannot_be_written_stops_nothing(comfyui, tmp_path):
    make_base(tmp_path / "own", "klein-cns")
    name = min(PICTURES)
    (tmp_path / "own" / "input" / name).write_bytes(b"the user's own")
    make_base(tmp_path / "bad", "klein-cns")
    for name_of_a_copy in PICTURES:  # a folder where each copy is written, which root cannot write either
        (tmp_path / "bad" / "input" / name_of_a_copy).with_suffix(".part").mkdir()
    for base in ("own", "bad"):
        running = Server(*comfyui, tmp_path / base)
        try:
            assert "KleinBaseLoader" in running.get("/object_info")
        finally:
            running.stop()
    assert (tmp_path / "own" / "input" / name).read_bytes() == b"the user's own"
    assert {path.name for path in (tmp_path / "own" / "input").glob("klein_cns_*")} == set(PICTURES)
    log = (tmp_path / "bad" / f"server_{running.port}.log").read_text()
    assert all(f"the templates' picture {name} could not be copied" in log for name in PICTURES)
