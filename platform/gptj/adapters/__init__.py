"""LoRA adapters: small trained matrices beside a model's frozen weights, in PEFT's format."""
