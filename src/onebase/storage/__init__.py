"""Adapter folders: PEFT's names and settings, safetensors tensor by tensor."""
