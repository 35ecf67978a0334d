"""Frozen features and the probes that are fitted on them."""
