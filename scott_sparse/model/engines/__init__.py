"""How the tokenizer's sparse convolutions are computed: `dense`, `halo`, `spconv`."""
