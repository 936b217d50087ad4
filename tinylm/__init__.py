"""tinylm: a tiny language model from the first byte to the last reply, in native PyTorch.

Reading order: tokenizer, model, dataset, checkpoint, trainer, generation, evaluation, export.
"""

__version__ = "0.1.0"
