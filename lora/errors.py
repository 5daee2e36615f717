"""The one error of this package."""


class LoraError(ValueError):
    """A LoRA that cannot be used; the message names the file, what is wrong and what to do."""
