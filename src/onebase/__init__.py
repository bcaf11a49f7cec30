"""onebase: one frozen base model, many LoRA adapters."""
