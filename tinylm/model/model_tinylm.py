"""The transformer: embeddings, blocks of attention and feed-forward layers, and the next-token logits.

The shapes and names are Llama's (Qwen2's with `qkv_bias`, Qwen3's with `qk_norm`), so a checkpoint is a Hugging Face
checkpoint.

Shapes: B batch, T time, C width, H query heads, K key/value heads, D head dim, F feed-forward width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.model.attention import AttentionPlan, attention, can_use_varlen, document_starts, plan_attention
from tinylm.model.config import PRESETS, TinyLMConfig
from tinylm.model.kv_cache import KVCache
from tinylm.model.linear import Linear
from tinylm.model.log_probs import blocked_head_log_probs, head_log_probs, target_log_probs
from tinylm.model.parameter_roles import Role, parameter_roles
from tinylm.model.positions import LearnedPositions, RotaryEmbedding, SinusoidalPositions, apply_rotary
from tinylm.system.runtime import to_device

__all__ = [
    "PRESETS",
    "Attention",
    "BackboneOutput",
    "Block",
    "ForwardContext",
    "RMSNorm",
    "SwiGLU",
    "TinyLM",
    "TinyLMConfig",
    "TinyLMForCausalLM",
]

QUERY_KEY_CORRELATION = 0.7
"""Correlation of a query head's first weights with its key head's; chosen by single runs (docs/trials.md)."""


@dataclass(frozen=True)
class ForwardContext:
    """What the blocks share in one forward pass. Each pass has its own, so passes may run side by side on one model.

    rotation: cos and signed sin of the tokens' positions (see `RotaryEmbedding`); None without rotary positions.
    plan: which query may look at which key.
    cache: past keys and values, or None.
    places: where the tokens stand in their rows, for the cache: a slice, or [B, T] where rows have unequal lengths.
    auxiliary_losses: what the blocks have added so far, by name.
    """

    rotation: tuple[Tensor, Tensor] | None
    plan: AttentionPlan
    cache: KVCache | None
    places: slice | Tensor
    auxiliary_losses: dict[str, Tensor] = field(default_factory=dict)

    def add_auxiliary_loss(self, name: str, loss: Tensor) -> None:
        """Add to the sum over blocks a scalar that training should lower too: a mean over the tokens of this pass, with
        its weight multiplied in.
        """
        self.auxiliary_losses[name] = self.auxiliary_losses[name] + loss if name in self.auxiliary_losses else loss


class BackboneOutput(NamedTuple):
    """What a forward pass through the blocks gives.

    hidden_states: [B, T, C] after the final norm.
    auxiliary_losses: scalars by name, each the sum over the blocks (see `ForwardContext.add_auxiliary_loss`); none for
        a plain transformer.
    """

    hidden_states: Tensor
    auxiliary_losses: dict[str, Tensor]


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, 1910.07467)."""

    parameter_roles: ClassVar[dict[str, Role]] = {"weight": "vector"}

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # The kernel computes in float32 inside. Weight and input must share a dtype for its fused path, and
        # autocast may answer in float32: the result goes back to what came in, or q and k would be promoted.
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    K = H is multi-head attention, K = 1 multi-query attention. With `qk_norm` each query and key head is
    normalised before the rotation, as in Qwen3.
    """

    def __init__(self, config: TinyLMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_width
        self.dropout = config.attention_dropout
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        has_bias = config.attention_bias or config.qkv_bias
        self.q_proj = Linear(config.hidden_size, queries, bias=has_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=has_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=has_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.attention_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    @torch.no_grad()
    def mimetic_init(self) -> None:
        """Mimetic initialisation (Trockman and Kolter 2023, arXiv:2305.09828): queries start like their keys.

            W_q = r W_k + sqrt(1 - r^2) W_q'        W_q' the weights that were there, r = QUERY_KEY_CORRELATION

        In trained transformers W_q^T W_k is close to a multiple of the identity: a token looks for others like itself.
        Models that start this way need less data. The weights' variance stays what it was.
        """
        keys = self.k_proj.weight.view(-1, 1, self.head_dim, self.k_proj.in_features)  # [K, 1, D, C]
        queries = self.q_proj.weight.view(keys.shape[0], -1, *keys.shape[2:])  # [K, G, D, C]
        queries.mul_((1 - QUERY_KEY_CORRELATION**2) ** 0.5).add_(QUERY_KEY_CORRELATION * keys)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = (heads.transpose(1, 2) for heads in self.project(x, context.rotation))  # [B, heads, T, D]
        if context.cache is not None:
            k, v = context.cache.update(self.layer_idx, k, v, context.places)  # [B, K, S, D]
        out = attention(q, k, v, context.plan, self.dropout if self.training else 0.0)  # [B, H, T, D]
        return self.o_proj(out.transpose(1, 2).reshape(batch, time, -1))

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D], keys and values [B, T, K, D] of the hidden states x [B, T, C], ready to attend."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.q_proj(x).view(shape), self.k_proj(x).view(shape), self.v_proj(x).view(shape)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = apply_rotary(q, *rotation), apply_rotary(k, *rotation)
        return q, k, v


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: TinyLMConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.ffn_width, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.ffn_width, bias=config.mlp_bias)
        self.down_proj = Linear(config.ffn_width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): normalised before, added after."""

    def __init__(self, config: TinyLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = config.hidden_dropout

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        x = x + self._drop(self.self_attn(self.input_layernorm(x), context))
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class OutputHead(Linear):
    """Hidden states to logits: a row of weights for each token, so a table rather than a map between hidden states."""

    parameter_roles: ClassVar[dict[str, Role]] = {"weight": "table", "bias": "vector"}


class TinyLM(nn.Module):
    """The backbone: token ids in, hidden states (and auxiliary losses) out."""

    def __init__(self, config: TinyLMConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb: RotaryEmbedding | None = None
        self.embed_positions: SinusoidalPositions | LearnedPositions | None = None
        if config.position_embedding_type == "learned":
            self.embed_positions = LearnedPositions(config)
        self.build_position_tables()

    def build_position_tables(self) -> None:
        """Compute the fixed position tables (again, for a model that was built on the meta device)."""
        if self.config.position_embedding_type == "rope":
            self.rotary_emb = RotaryEmbedding(self.config)
        elif self.config.position_embedding_type == "sinusoidal":
            self.embed_positions = SinusoidalPositions(self.config)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        starts: Tensor | None = None,
    ) -> BackboneOutput:
        """As `TinyLMForCausalLM.run_backbone`; `starts` of documents, [N+1], in place of their ids."""
        batch, time = input_ids.shape
        places = self._places(time, document_ids, cache)
        positions = places if position_ids is None else self._checked(position_ids)
        x = self.embed_tokens(input_ids)  # [B, T, C]
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        # The compute dtype: autocast's where it is on, else the weights'.
        device = x.device
        if torch.is_autocast_enabled(device.type):
            x = x.to(torch.get_autocast_dtype(device.type))
        if self.training and self.config.hidden_dropout:
            x = F.dropout(x, self.config.hidden_dropout)
        rotation = self.rotary_emb(positions, x.dtype) if self.rotary_emb is not None else None
        num_keys = time if cache is None else max(cache.lengths) + time
        uneven = None if isinstance(places, slice) else places
        if starts is not None:
            plan = AttentionPlan(cu_seqlens=starts, max_seqlen=time)
        else:
            plan = plan_attention(batch, time, num_keys, device, x.dtype, document_ids, uneven)
        context = ForwardContext(rotation, plan, cache, places)
        for layer in self.layers:
            x = layer(x, context)
        if cache is not None:
            cache.advance(time)
        return BackboneOutput(self.norm(x), context.auxiliary_losses)

    def _places(self, time: int, document_ids: Tensor | None, cache: KVCache | None) -> slice | Tensor:
        """Where the tokens stand in their rows, after what the cache holds: a slice, or [B, T] for uneven rows."""
        past, limit = max(cache.lengths) if cache is not None else 0, self.config.max_position_embeddings
        if past + time > limit:
            raise ValueError(
                f"{past + time} tokens were given; the model has max_position_embeddings {limit}: "
                "shorten the input, or configure a longer context"
            )
        if cache is None:
            return slice(0, time)
        if document_ids is not None:
            raise ValueError("document_ids cannot be used with a cache; generate each document on its own")
        return cache.next_positions(time)

    def _checked(self, position_ids: Tensor) -> Tensor:
        limit = self.config.max_position_embeddings
        # Only where the answer costs nothing: on an accelerator this would wait for the device.
        checkable = position_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if checkable and (highest := int(position_ids.max())) >= limit:
            raise ValueError(
                f"position_ids reach {highest}; they must stay below max_position_embeddings {limit}: "
                "shorten the input, or configure a longer context"
            )
        return position_ids


class TinyLMForCausalLM(nn.Module):
    """The language model: backbone and output projection.

    Args:
        config: its shape. Weights start normal with `initializer_range`; the two projections that write into
            the residual stream (o_proj, down_proj) are scaled by 1/sqrt(2 * layers), so that the stream's
            variance does not grow with depth (Radford et al. 2019, section 2.3). Queries start like their keys.
    """

    def __init__(self, config: TinyLMConfig):
        super().__init__()
        self.config = config
        self.model = TinyLM(config)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._compiled_head: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        self._compiled_shape: tuple[int, int] | None = None
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        std = self.config.initializer_range
        residual_std = std * (2 * self.config.num_hidden_layers) ** -0.5
        roles = parameter_roles(self)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif roles[name] != "vector":
                is_residual = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
                parameter.normal_(0.0, residual_std if is_residual else std)
        for layer in self.model.layers:
            layer.self_attn.mimetic_init()  # type: ignore[union-attr,operator]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def num_parameters(self) -> int:
        """Number of distinct weights (a tied matrix counts once)."""
        return sum(parameter.numel() for parameter in self.parameters())

    def compile_for_training(
        self, with_head: bool = True, batch_shape: tuple[int, int] | None = None, **options: Any
    ) -> None:
        """From now on, forward passes in training mode and without a cache run through `torch.compile`.

        Validation, generation and samples have other lengths at every call and never touch the compiled graph. The
        parameters keep their names, and copies of the model are not compiled.

        Args:
            with_head: compile the output head with the softmax behind it, too. Not for FSDP, which gathers the head's
                weights only where it is called as a module. An adapted head is never compiled.
            batch_shape: (B, T) of the batches to run so; all others run eagerly. An epoch's last batch, which may have
                fewer rows, is not worth half a minute of compilation. None: batches of every shape, each compiled.
            options: of `torch.compile`.
        """
        self.model.compile(dynamic=False, **options)
        self._compiled_shape = batch_shape
        with_head = with_head and type(self.lm_head) is OutputHead
        self._compiled_head = torch.compile(head_log_probs, **options) if with_head else None

    @property
    def is_compiled(self) -> bool:
        """Whether forward passes in training mode run through `torch.compile`. A copy of a compiled model is not."""
        return self.model._compiled_call_impl is not None

    def run_eagerly(self) -> None:
        """Undo `compile_for_training`."""
        self.model._compiled_call_impl = self._compiled_head = None

    def target_log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities [N] float32 of the tokens `targets` [N] that follow the hidden states [N, C]."""
        if self.training and self.is_compiled and self._compiled_head is not None:
            return self._compiled_head(hidden, self.lm_head.weight, targets)
        # FSDP, whose weights are another kind of tensor, gathers them where the head is called as a module.
        is_plain = type(self.lm_head) is OutputHead and type(self.lm_head.weight.data) is Tensor
        if is_plain and hidden.device.type == "cpu":
            return blocked_head_log_probs(hidden, self.lm_head.weight, targets)
        return target_log_probs(self.lm_head(hidden), targets)

    def training_flops_per_token(self, context_length: float) -> float:
        """Floating-point operations of one training step per token: 6 per weight that multiplies, plus attention.

        A matrix product costs 2 operations per weight forwards and 4 backwards (Kaplan et al. 2020, arXiv:2001.08361,
        section 2.1), of which a frozen weight saves the 2 for its own gradient. Attention's two products cost 12 L H D
        operations per token and per position it looks at; causal, so about half of `context_length`. An untied
        embedding table multiplies nothing.
        """
        config = self.config
        embedding = self.model.embed_tokens
        looked_up = {id(getattr(embedding, "lora_embedding_A", None))}
        if not config.tie_word_embeddings:
            looked_up.add(id(getattr(embedding, "base", embedding).weight))
        trained = [(p.requires_grad, p.numel()) for p in self.parameters() if id(p) not in looked_up]
        weights = sum((6.0 if has_gradient else 4.0) * size for has_gradient, size in trained)
        attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_width
        return weights + attention * context_length / 2

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for this model: `batch_size` rows with room for `max_length` tokens each."""
        return KVCache(self.config, batch_size, max_length, self.device, self.dtype)

    def run_backbone(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> BackboneOutput:
        """Hidden states [B, T, C] after the final norm, and the blocks' auxiliary losses: what objectives call.

        Args:
            input_ids: [B, T] integers below vocab_size.
            position_ids: [B, T], or None to count up from 0, or from each row's length in the cache.
            document_ids: [B, T] integers, or None for plain causal attention. Tokens attend only within equal
                ids; a document's tokens must be contiguous in their row. Best left on the CPU: what must be known about
                them before the device can start is then known without waiting for the device.
            cache: past keys and values; the new ones are added to it. Excludes document_ids.

        Raises:
            ValueError: more tokens or higher positions than the model (or the cache) has room for.
        """
        return self._run(input_ids, position_ids, document_ids, cache)

    def _run(
        self, input_ids: Tensor, position_ids: Tensor | None, document_ids: Tensor | None, cache: KVCache | None
    ) -> BackboneOutput:
        """What `run_backbone` and `forward` share. FSDP has hooks on both, so neither may call the other."""
        starts = None
        if document_ids is not None:
            is_autocast = torch.is_autocast_enabled(self.device.type)
            dtype = torch.get_autocast_dtype(self.device.type) if is_autocast else self.dtype
            drops = self.training and self.config.attention_dropout > 0  # which the kernel cannot do
            if cache is None and not drops and can_use_varlen(self.device, dtype, self.config.head_width):
                starts, document_ids = to_device(document_starts(document_ids), self.device), None
            else:
                document_ids = to_device(document_ids, self.device)
        return self._backbone(input_ids, cache)(input_ids, position_ids, document_ids, cache, starts)

    def _backbone(self, input_ids: Tensor, cache: KVCache | None) -> Callable[..., BackboneOutput]:
        """The backbone as a training pass may call it, compiled if it was; as any other pass must call it, never so."""
        has_shape = self._compiled_shape is None or input_ids.shape == self._compiled_shape
        # `_call_impl` is what a module's `__call__` does when it is not compiled.
        return self.model if self.training and cache is None and has_shape else self.model._call_impl

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[B, T, C] after the final norm; arguments and errors as in `run_backbone`."""
        return self.run_backbone(input_ids, position_ids, document_ids, cache).hidden_states

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits [B, T, V] in the compute dtype; arguments and errors as in `run_backbone`."""
        return self.lm_head(self._run(input_ids, position_ids, document_ids, cache).hidden_states)
