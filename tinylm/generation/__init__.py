"""From logits to text: sampling, beam search, the decoding engine."""
