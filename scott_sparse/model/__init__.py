"""Tokenizer, Transformer, predictor and losses: what is trained. Imports torch and einops only."""
