"""LoRA adapters: small trained matrices beside the frozen weights of a model, in PEFT's format."""
