"""What weights of FLUX.2 are called, how large they are, and what a safetensors header says: facts that the model
(`klein`) and its LoRAs (`lora`) share. Knows no host and no model code."""
