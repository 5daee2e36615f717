"""What the endpoints and the local nodes share: preset sizes, and how many pictures and LoRAs there may be."""

from __future__ import annotations

AUTO = "auto"  # the first picture's own size
DEFAULT_SIZE = "landscape_4_3"  # of auto without a picture
IMAGE_SIZES: dict[str, tuple[int, int]] = {  # (width, height)
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
MAX_SIDE = 2048  # pixels
MAX_IMAGES, MAX_LORAS = 4, 3
