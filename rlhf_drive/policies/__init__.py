"""Policies: tokenizer, backbone, decoding processes, checkpoints."""
