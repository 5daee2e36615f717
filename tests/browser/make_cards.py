"""Draw the cards of the example workflows, as the template browser shows them.

    uv run python tests/browser/make_cards.py

A card is a drawing of what the workflow does, over the pictures that come with it. Nothing on it stands for a result of
the model: where a result belongs there is a frame with a word.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont, ImageOps

EXAMPLES = Path(__file__).parents[2] / "example_workflows"
SIZE = 640  # pixels of a square card; the template browser's badge covers the first 100 rows at the left
INK, PAPER, GROUND, GREEN = (238, 238, 238), (70, 74, 82), (32, 34, 40), (126, 211, 133)
ASTRONAUT, CAT, COFFEE, STARS = (f"klein_cns_{name}.jpg" for name in ("astronaut", "cat", "coffee", "stars"))
MASKED = "klein_cns_coffee_mask.png"
Box = tuple[int, int, int, int]


def font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib brings this typeface, so that the cards look alike on every machine."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans:bold"), size)


class Card:
    """A square canvas with the few things that the cards are made of."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (SIZE, SIZE), GROUND)
        self.draw = ImageDraw.Draw(self.image)

    def picture(self, name: str, box: Box) -> None:
        """One of the pictures, cropped to a box."""
        with Image.open(EXAMPLES / "pictures" / name) as opened:
            size = (box[2] - box[0], box[3] - box[1])
            self.image.paste(ImageOps.fit(opened.convert("RGB"), size, centering=(0.5, 0.3)), box[:2])

    def result(self, box: Box, words: str, color: tuple[int, int, int] = INK) -> None:
        """A frame where the workflow puts what the model makes."""
        self.draw.rounded_rectangle(box, 14, fill=PAPER, outline=color, width=4)
        self.words(words, ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2), color=color)

    def words(self, text: str, center: tuple[int, int], size: int = 38, color: tuple[int, int, int] = INK) -> None:
        """Text around a point."""
        self.draw.multiline_text(center, text, color, font(size), anchor="mm", align="center", spacing=10)

    def arrow(self, x: int, y: int) -> None:
        """From left to right."""
        self.draw.line((x - 30, y, x + 10, y), INK, 8)
        self.draw.polygon([(x + 8, y - 18), (x + 8, y + 18), (x + 34, y)], INK)

    def noise(self, box: Box, slope: float) -> None:
        """Noise whose power falls with the frequency for a positive slope."""
        wide, high = box[2] - box[0], box[3] - box[1]
        spectrum = np.fft.rfft2(np.random.default_rng(1).standard_normal((high, wide)))
        radius = np.hypot(np.fft.fftfreq(high)[:, None], np.fft.rfftfreq(wide)[None]) + 0.02
        made = np.fft.irfft2(spectrum * radius**-slope, (high, wide))
        grey = np.clip(128 + 45 * made / made.std(), 0, 255).astype(np.uint8)
        self.image.paste(Image.fromarray(grey).convert("RGB"), box[:2])


LEFT, RIGHT = (30, 130, 285, 480), (355, 130, 610, 480)


def before_and_after(name: str, words: str) -> Card:
    card = Card()
    card.picture(name, LEFT)
    card.arrow(318, 305)
    card.result(RIGHT, "your\nedit", GREEN)
    card.words(words, (320, 560))
    return card


def compared(left: str, right: str, words: str, color: tuple[int, int, int] = GREEN) -> Card:
    card = Card()
    card.result(LEFT, left)
    card.result(RIGHT, right, color)
    card.words(words, (320, 560))
    return card


def four_pictures() -> Card:
    card = Card()
    boxes = [(30, 120, 190, 300), (200, 120, 360, 300), (30, 310, 190, 490), (200, 310, 360, 490)]
    for number, (name, box) in enumerate(zip((ASTRONAUT, CAT, COFFEE, STARS), boxes, strict=True), 1):
        card.picture(name, box)
        card.draw.ellipse((box[0] + 8, box[1] + 8, box[0] + 56, box[1] + 56), fill=GROUND)
        card.words(str(number), (box[0] + 32, box[1] + 31), 30)
    card.arrow(398, 305)
    card.result((445, 180, 610, 430), "one\nedit", GREEN)
    card.words("four pictures, LoRAs", (320, 565))
    return card


def masked() -> Card:
    card = Card()
    with Image.open(EXAMPLES / "pictures" / MASKED) as opened:
        picture = opened.convert("RGBA").resize((518, 480))
    box = (61, 30)
    card.image.paste(picture.convert("RGB"), box)
    hole = ImageOps.invert(picture.getchannel("A"))
    card.image.paste(Image.new("RGB", picture.size, GREEN), box, hole.point(lambda value: value * 3 // 5))
    card.words("only inside the mask", (320, 570))
    return card


def text_to_image() -> Card:
    card = Card()
    card.draw.rounded_rectangle((40, 120, 600, 250), 14, fill=PAPER)
    card.words("“a lighthouse on a\nbasalt cliff at dawn”", (320, 183), 36)
    card.draw.polygon([(296, 268), (344, 268), (320, 300)], INK)
    card.result((120, 318, 520, 510), "picture", GREEN)
    card.words("text to image", (320, 565))
    return card


def cns() -> Card:
    """White noise beside noise with its power at low frequencies, which is what CNS adds at the end of a run."""
    card = Card()
    left, right = ((x, 180, x + 255, 480) for x in (30, 355))
    card.draw.rectangle(left, fill=PAPER)
    card.words("no noise\nadded", (157, 330))
    card.noise(right, 0.8)
    card.words("CNS off", (157, 142))
    card.words("CNS on", (482, 142), color=GREEN)
    card.words("one seed, compared", (320, 560))
    return card


def custom() -> Card:
    card = Card()
    for i, (words, color) in enumerate((("guider", INK), ("noise", INK), ("schedule", INK), ("CNS Sampler", GREEN))):
        card.result((60, 115 + 100 * i, 360, 200 + 100 * i), words, color)
        card.draw.line((360, 157 + 100 * i, 450, 307), INK, 5)
    card.result((450, 217, 610, 397), "klein", INK)
    card.words("CNS as a SAMPLER", (320, 570))
    return card


CARDS = {
    "Edit a picture": lambda: before_and_after(ASTRONAUT, "edit a picture"),
    "Edit on fal": lambda: before_and_after(ASTRONAUT, "edit on fal, no GPU"),
    "Edit with four pictures and LoRAs": four_pictures,
    "Edit inside a mask": masked,
    "Text to image with klein": text_to_image,
    "CNS off and on": cns,
    "CNS with any guider and schedule": custom,
    "12 steps or 28": lambda: compared("28\nsteps", "12\nsteps", "one seed, compared"),
    "Local beside fal": lambda: compared("this\nmachine", "fal", "side by side"),
    "Local or fal": lambda: compared("this\nmachine", "or fal", "where the memory is"),
}


def main() -> None:
    """Write every card."""
    for name, draw in CARDS.items():
        draw().image.save(EXAMPLES / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
