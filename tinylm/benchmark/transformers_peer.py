"""transformers as a contender: the same shape, the same weights, the same work, at its best.

transformers is imported only when it is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tinylm.dataset.batches import Batch
from tinylm.model.hf_config import config_to_hf
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.system.runtime import Runtime


def make_llama(config: TinyLMConfig) -> Any:
    """transformers' Llama of this shape, in float32."""
    import transformers

    transformers.logging.set_verbosity_error()
    named = ("architectures", "model_type", "dtype")
    fields = {key: value for key, value in config_to_hf(config).items() if key not in named}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))


def same_weights(ours: TinyLMForCausalLM) -> Any:
    """transformers' Llama with the weights of our model, on its device."""
    theirs = make_llama(ours.config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert sum(p.numel() for p in theirs.parameters()) == ours.num_parameters()
    return theirs.to(ours.device)


def training_turn(
    model: Any, batch: Batch, runtime: Runtime, steps: int, forward: Callable[..., Any] | None = None
) -> Callable[[], float]:
    """A turn of training steps: SDPA attention, autocast, fused AdamW, clipping; no padding mask, nothing read back.

    Its loss shifts inside, so it is given the inputs as targets; that is one target fewer in a row.

    Args:
        forward: the compiled model.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    input_ids = batch.input_ids.to(runtime.device)
    is_mixed = runtime.compute_dtype != torch.float32
    call = model if forward is None else forward
    model.train()

    def turn() -> float:
        for _ in range(steps):
            with torch.autocast(runtime.device.type, dtype=runtime.compute_dtype, enabled=is_mixed):
                loss = call(input_ids=input_ids, use_cache=False, **{"labels": input_ids}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return steps * batch.count

    return turn


def generation_turn(model: Any, prompts: list[list[int]], max_new_tokens: int) -> Callable[[], float]:
    """Greedy generation of exactly `max_new_tokens` tokens for each prompt; returns how many there were in all."""
    import transformers

    input_ids = torch.tensor(prompts, device=model.device)
    mask = torch.ones_like(input_ids)
    options = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
    )

    def turn() -> float:
        with torch.inference_mode():
            output = model.generate(input_ids, attention_mask=mask, generation_config=options)
        return float(output.shape[0] * (output.shape[1] - input_ids.shape[1]))

    return turn
