from tests.known_models import model, reference_logprobs, table_model, tokenizer

__all__ = ["model", "reference_logprobs", "table_model", "tokenizer"]
