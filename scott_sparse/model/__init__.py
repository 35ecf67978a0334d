"""Masks, tokenizer, Vision Transformer, losses and their objective. Imports torch, einops and safetensors only."""
