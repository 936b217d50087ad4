"""Text to token ids and back: byte-level BPE, and the chat template."""
