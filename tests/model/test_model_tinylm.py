"""The model against transformers, and its cached, packed and padded modes against the plain one."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tests.model.small_models import LLAMA3, YARN, random_ids, reference_of, small_config, small_model, trained_model
from tinylm.model import attention as attention_module
from tinylm.model.attention import document_starts
from tinylm.model.hf_config import config_from_hf, config_to_hf, require_llama_shape, unused_fields
from tinylm.model.lora import PROJECTIONS, TABLES, LoRAConfig, apply_lora
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM

MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192}
SHAPES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "yarn": {"rope_scaling": YARN},
    "yarn_mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False}},
    "yarn_attention_factor": {"rope_scaling": {**YARN, "attention_factor": 1.5, "beta_fast": 16}},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qkv_biases": {"qkv_bias": True},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "llama3": {"rope_scaling": LLAMA3},
    "wide_heads": {"head_dim": 32},
    "qwen3": {"qk_norm": True},
    "qwen3_mqa_yarn": {"qk_norm": True, "num_key_value_heads": 1, "rope_scaling": YARN},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_transformers(shape):
    model = trained_model(**SHAPES[shape])
    reference = reference_of(model)
    ids = random_ids(2, 200)  # two blocks of queries
    weights = torch.randn(2, 200, 300)
    ours, theirs = model(ids), reference(ids).logits
    assert ours.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    (ours * weights).mean().backward()
    (theirs * weights).mean().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset, count", [("tiny", 3_214_592), ("small", 25_829_888), ("large", 104_030_976)])
def test_presets_have_their_exact_parameter_counts(preset, count):
    config = TinyLMConfig.preset(preset)
    with torch.device("meta"):
        model = TinyLMForCausalLM(config)
    assert model.num_parameters() == config.num_parameters() == count


@pytest.mark.parametrize(
    "changes",
    [{"qk_norm": True, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
     {"position_embedding_type": "learned", "head_dim": 10},
     {"qkv_bias": True}],
)  # fmt: skip
def test_parameter_formula_counts_every_option(changes):
    model = small_model(**changes)
    assert model.num_parameters() == model.config.num_parameters()


@pytest.mark.parametrize("tied", [True, False])
def test_training_flops_are_those_that_torch_counts(tied):
    """One causal row, where half of the score matrix counts. Norms multiply too, but not as matrix products."""
    model = small_model(tie_word_embeddings=tied).train()
    ids = random_ids(1, 128)  # one block of queries: the whole square of scores is computed
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    square = model.training_flops_per_token(2 * 128) - 6 * norms
    assert 128 * square == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(("targets", "tied"), [(PROJECTIONS, True), ((*PROJECTIONS, *TABLES), True), (TABLES, False)])
def test_a_frozen_weight_costs_no_gradient_of_its_own(targets, tied):
    """Of the first block's frozen projections, torch leaves out the gradient of the embeddings, unless they learn."""
    model = apply_lora(small_model(tie_word_embeddings=tied), LoRAConfig(rank=3, target_modules=targets)).train()
    ids = random_ids(1, 128)
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    first = model.model.layers[0].self_attn
    left_out = 0
    if targets == PROJECTIONS:
        inputs = (p for q in (first.q_proj, first.k_proj, first.v_proj) for p in (q.base, q.lora_A))
        left_out = 2 * sum(p.weight.numel() for p in inputs)
    square = model.training_flops_per_token(2 * 128) - 4 * norms - left_out
    assert 128 * square == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("kind", ["rope", "sinusoidal", "learned"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_decoding_equals_the_full_forward(kind, kv_heads):
    model = small_model(num_key_value_heads=kv_heads, position_embedding_type=kind)
    ids = random_ids(3, 160)
    cache = model.new_cache(3, 160)
    with torch.no_grad():
        full = model(ids)
        chunks = [(0, 1), (1, 20), (20, 21), (21, 155), *((i, i + 1) for i in range(155, 160))]
        cached = torch.cat([model(ids[:, a:b], cache=cache) for a, b in chunks], dim=1)
        torch.testing.assert_close(cached, full, rtol=1e-5, atol=1e-5)
        cache.rewind([30] * 3)
        torch.testing.assert_close(model(ids[:, 30:40], cache=cache), full[:, 30:40], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rope", "learned"])
def test_rows_of_unequal_length_equal_each_row_alone(kind):
    """Prompts padded on the right, then one token, then two more; the padding must not change any number."""
    model = trained_model(qk_norm=True, position_embedding_type=kind)
    lengths = [5, 150, 1]
    prompts = [random_ids(1, n) for n in lengths]
    batch = torch.cat([torch.nn.functional.pad(p, (0, 150 - p.shape[1]), value=7) for p in prompts])
    more = random_ids(3, 3)
    cache = model.new_cache(3, 153)
    with torch.no_grad():
        first = model(batch, cache=cache)
        cache.rewind(lengths)
        after = torch.cat([model(x, cache=cache) for x in (more[:, :1], more[:, 1:])], dim=1)
        assert cache.lengths == [8, 153, 4]
        for row, prompt in enumerate(prompts):
            alone = model(torch.cat((prompt, more[row : row + 1]), dim=1))[0]
            torch.testing.assert_close(first[row, : lengths[row]], alone[: lengths[row]], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(after[row], alone[lengths[row] :], rtol=1e-5, atol=1e-5)


def test_packed_documents_equal_the_documents_alone():
    model = small_model()
    lengths = (37, 1, 140, 22)
    documents = [random_ids(1, n) for n in lengths]
    ids = torch.cat(documents, dim=1)
    document_ids = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], dim=1)
    positions = torch.cat([torch.arange(n)[None] for n in lengths], dim=1)
    weights = torch.randn(1, 200, 300)

    packed = model(ids, positions, document_ids)
    (packed * weights).mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = torch.cat([model(document) for document in documents], dim=1)
    (alone * weights).mean().backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_documents", [False, True])
def test_the_flash_path_equals_the_blocked_path(monkeypatch, with_documents):
    model = small_model()
    ids = random_ids(2, 140)
    documents = (torch.arange(140) // 50).expand(2, 140) if with_documents else None
    with torch.no_grad():
        blocked = model(ids, document_ids=documents)
        monkeypatch.setattr(attention_module, "MAX_SCORES", 0)
        monkeypatch.setattr(attention_module, "blocked_attention", None)
        torch.testing.assert_close(model(ids, document_ids=documents), blocked, rtol=1e-5, atol=1e-5)


def test_every_row_starts_a_document_and_empty_ones_fill_up_to_a_power_of_two():
    starts = document_starts(torch.tensor([[0, 0, 1, 1], [1, 1, 1, -1]]))
    assert starts.tolist() == [0, 2, 4, 7, 8] and starts.dtype == torch.int32
    assert document_starts(torch.tensor([[3, 3, 3, 4, 5]])).tolist() == [0, 3, 4, 5, 5]
    assert document_starts(torch.tensor([[7, 7]])).tolist() == [0, 2]


def test_bf16_autocast_stays_close_to_float32_and_dropout_acts_only_in_training():
    model = small_model(hidden_dropout=0.5, attention_dropout=0.5)
    ids = random_ids(2, 64)
    with torch.no_grad():
        exact = model(ids)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(ids)
        assert half.dtype == torch.bfloat16
        assert (half.float() - exact).norm() / exact.norm() < 0.02
        model.train()
        assert (model(ids) - exact).norm() / exact.norm() > 0.1
        reference = small_model()
        torch.testing.assert_close(model.eval()(ids), exact)
        assert reference.config.hidden_dropout == 0


def test_attention_dropout_alone_acts():
    model = small_model(attention_dropout=0.5).train()
    ids = random_ids(1, 32)
    assert not torch.equal(model(ids), model(ids))


def test_residual_projections_start_smaller_with_depth():
    model = TinyLMForCausalLM(small_config(num_hidden_layers=8, hidden_size=256))
    layer = model.model.layers[3]
    for name, module in (("o", layer.self_attn.o_proj), ("down", layer.mlp.down_proj)):
        assert module.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05), name
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_queries_start_like_their_own_keys():
    attention = TinyLMForCausalLM(small_config(hidden_size=256)).model.layers[0].self_attn
    queries, keys = attention.q_proj.weight.view(4, -1), attention.k_proj.weight.view(2, -1)  # [H, D*C], [K, D*C]
    correlation = torch.corrcoef(torch.cat((queries, keys)))[:4, 4:]
    expected = torch.tensor([[0.7, 0.0], [0.7, 0.0], [0.0, 0.7], [0.0, 0.7]])
    torch.testing.assert_close(correlation, expected, atol=0.03, rtol=0)


def test_five_gradient_steps_lower_the_loss():
    model = small_model().train()
    ids = random_ids(2, 33)
    before = None
    for _ in range(5):
        logits = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        before = before or loss.item()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    assert loss.item() < before - 0.1


BAD_SHAPES = [
    ({"hidden_size": 65}, "not divisible by num_attention_heads"),
    ({"num_key_value_heads": 3}, "not divisible by num_key_value_heads"),
    ({"head_dim": 15}, "odd"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
    ({"position_embedding_type": "alibi"}, "choose one of rope"),
    ({"position_embedding_type": "sinusoidal", "hidden_size": 65, "head_dim": 4}, "hidden_size 65 is odd"),
    ({"hidden_dropout": 1.0}, "hidden_dropout 1.0"),
    ({"max_position_embeddings": 10**9}, "max_position_embeddings is 1000000000"),
    ({"rope_theta": 0.0}, "rope_theta 0.0"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 8}}, "rope_type 'longrope'"),
    ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type "),
    ({"rope_scaling": {"rope_type": "linear"}}, "no factor; rope_type linear needs it"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 3}}, "unknown key 'beta_fast'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "no low_freq_factor"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, "high_freq_factor above the low one"),
    ({"rope_scaling": {"rope_type": "default", "mrope_section": 2}}, "unknown key 'mrope_section'"),
    ({"attention_bias": True, "qkv_bias": True}, "attention_bias and qkv_bias are both true"),
    ({"qkv_bias": 1}, "qkv_bias is 1"),
    ({"eos_token_id": [2, True]}, "eos_token_id is "),
    ({"eos_token_id": False}, "eos_token_id is False"),
    ({"bos_token_id": [1]}, "bos_token_id is "),
    ({"rope_scaling": {"rope_type": "yarn", "factr": 8}}, "unknown key 'factr'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor of at least 1"),
]


@pytest.mark.parametrize("changes, message", BAD_SHAPES)
def test_impossible_shapes_are_one_line_errors(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        small_config(**changes)
    assert "\n" not in str(caught.value)


def test_preset_overrides_and_unknown_presets():
    wide = TinyLMConfig.preset("small", hidden_size=768)
    assert (wide.head_dim, wide.intermediate_size) == (96, 2048)
    with pytest.raises(ValueError, match="choose one of tiny, small, large"):
        TinyLMConfig.preset("huge")


@pytest.mark.parametrize("kind", ["rope", "sinusoidal", "learned"])
def test_input_longer_than_the_model_is_refused(kind):
    model = small_model(max_position_embeddings=16, position_embedding_type=kind)
    assert model(random_ids(1, 16)).shape == (1, 16, 300)
    with pytest.raises(ValueError, match="17 tokens were given; the model has max_position_embeddings 16"):
        model(random_ids(1, 17))
    with pytest.raises(ValueError, match="position_ids reach 16"):
        model(random_ids(1, 2), position_ids=torch.tensor([[0, 16]]))
    cache = model.new_cache(1, 8)
    model(random_ids(1, 8), cache=cache)
    with pytest.raises(ValueError, match="holds 8 tokens and 1 more"):
        model(random_ids(1, 1), cache=cache)
    with pytest.raises(ValueError, match="document_ids cannot be used with a cache"):
        model(random_ids(1, 1), document_ids=torch.zeros(1, 1), cache=cache)


TINYLM_ONLY: list[dict] = [
    {"position_embedding_type": "learned"},
    {"qkv_bias": True, "mlp_bias": True},
    {"qkv_bias": True, "qk_norm": True},
]


def test_hf_dict_round_trip_and_both_generations_of_keys():
    for changes in (
        {},
        {"qk_norm": True},
        {"rope_scaling": YARN},
        {"qkv_bias": True},
        {"eos_token_id": [2, 9]},
        *TINYLM_ONLY,
    ):
        config = small_config(**changes)
        assert config_from_hf(config_to_hf(config)) == config
    data = config_to_hf(small_config(rope_scaling=YARN, rope_theta=5e5))
    old = {key: value for key, value in data.items() if key != "rope_parameters"}
    new = {key: value for key, value in data.items() if key not in ("rope_theta", "rope_scaling")}
    assert config_from_hf(old) == config_from_hf(new) == config_from_hf(data)
    assert data["torch_dtype"] == data["dtype"] == "float32" and data["model_type"] == "llama"
    assert data["rope_theta"] == data["rope_parameters"]["rope_theta"] == 5e5


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_what_a_config_leaves_out_is_what_transformers_assumes(config_class):
    """Our own defaults differ: an rms_norm_eps of 1e-5, and a head width that follows from the model's."""
    kind = config_class.model_type
    data = {"model_type": kind, "vocab_size": 300, "hidden_size": 512, "num_hidden_layers": 2}
    data |= {"sliding_window": None} if kind == "mistral" else {}
    ours, theirs = config_from_hf(data | {"max_position_embeddings": 64}), config_class(**data)
    for name in ("rms_norm_eps", "tie_word_embeddings", "intermediate_size", "initializer_range", "bos_token_id",
                 "num_attention_heads", "num_key_value_heads", "eos_token_id", "pad_token_id"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 512 // 32) and ours.rms_norm_eps == 1e-6
    longest = config_from_hf(data | {"hidden_size": 2048}).max_position_embeddings
    assert longest == theirs.max_position_embeddings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported; expected llama, mistral, qwen2, qwen3 or"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures .*expected LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        (MISTRAL, "sliding_window 4096 is not supported"),  # which is assumed where the key is absent
        ({**MISTRAL, "sliding_window": 255}, "sliding_window 255 is not supported; .* max_position_embeddings 8192"),
        ({**MISTRAL, "sliding_window": "no"}, "sliding_window 'no'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"layer_types": "full_attention"}, "layer_types has 'full_attention'; expected full_attention in every"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "settings for 'full_attention' alone"),
        ({"rope_scaling": {"type": "su", "factor": 2}}, "rope_type 'su'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"attention_sink_size": 4}, "'attention_sink_size' is 4"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
    ],
)
def test_configs_that_cannot_be_honoured_are_refused_with_the_reason(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**config_to_hf(small_config()), **changes})


def test_a_window_of_the_whole_context_hides_nothing():
    data = {**config_to_hf(small_config()), **MISTRAL, "max_position_embeddings": 256}
    assert config_from_hf({**data, "sliding_window": 256}) == config_from_hf({**data, "sliding_window": None})
    assert config_from_hf({**config_to_hf(small_config()), "sliding_window": 16}) == small_config()  # Qwen's unused one


def test_fields_without_a_meaning_are_named():
    assert unused_fields(config_to_hf(small_config())) == []
    assert unused_fields({**config_to_hf(small_config()), "z_loss": 1, "logit_scale": 2}) == ["logit_scale", "z_loss"]


def test_models_without_a_llama_equivalent_say_so():
    for changes, reason in (
        ({"position_embedding_type": "learned"}, "position_embedding_type 'learned'"),
        ({"position_embedding_type": "sinusoidal"}, "position_embedding_type 'sinusoidal'"),
        ({"qk_norm": True, "mlp_bias": True}, "qk_norm with mlp_bias"),
        ({"qk_norm": True, "qkv_bias": True}, "qkv_bias with qk_norm"),
        ({"mlp_bias": True, "qkv_bias": True}, "qkv_bias with mlp_bias"),
        ({"hidden_size": 66, "head_dim": 16, "mlp_bias": True}, "hidden_size 66 is not divisible"),
    ):
        config = small_config(**changes)
        assert config_to_hf(config)["model_type"] == "tinylm"
        with pytest.raises(ValueError, match=reason):
            require_llama_shape(config)
    require_llama_shape(small_config())
    assert dataclasses.is_dataclass(TinyLMConfig)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # which it hides from users
@pytest.mark.parametrize("with_head", [True, False])
def test_the_output_head_is_compiled_in_training_only(with_head):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = small_model().train()
    model.compile_for_training(with_head=with_head, backend=backend)
    hidden, targets = torch.randn(7, model.config.hidden_size, requires_grad=True) * 3, random_ids(1, 7)[0]
    exact = torch.log_softmax(hidden @ model.lm_head.weight.T, dim=-1)[torch.arange(7), targets]
    torch.testing.assert_close(model.target_log_probs(hidden, targets), exact)
    assert len(graphs) == with_head
    torch.testing.assert_close(model.eval().target_log_probs(hidden[:5], targets[:5]), exact[:5])
    copied = copy.deepcopy(model).train()
    torch.testing.assert_close(copied.target_log_probs(hidden[:4], targets[:4]), exact[:4])
    assert len(graphs) == with_head


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile's own
def test_only_training_passes_are_compiled():
    """Samples and validations once ran through the training graph: one compilation for every length."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, plain = small_model(qk_norm=True), small_model(qk_norm=True)
    plain.load_state_dict(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    model.compile_for_training(backend=backend)
    assert [name for name, _ in model.named_parameters()] == names and model.state_dict().keys() == set(names) | {
        "lm_head.weight"
    }
    ids = random_ids(2, 24)
    for _ in range(2):
        model.train()
        torch.testing.assert_close(model.hidden_states(ids), plain.hidden_states(ids))
        torch.testing.assert_close(model(ids), plain(ids))
        assert len(graphs) == 1
        for length in (5, 9, 14):
            other = random_ids(1, length)
            cache = model.new_cache(1, length)
            torch.testing.assert_close(model(other, cache=cache), plain(other))
            model.eval()
            torch.testing.assert_close(model(other), plain(other))
            copied = copy.deepcopy(model).train()
            torch.testing.assert_close(copied(other), plain(other))
            model.train()
        assert len(graphs) == 1


@pytest.mark.parametrize(
    ("widths", "advice"),
    [
        ({"num_attention_heads": 5}, "choose num_attention_heads 4 or 8, or a hidden_size of 510"),
        ({"num_attention_heads": 7, "hidden_size": 256}, "choose num_attention_heads 4 or 8, or a hidden_size of 259"),
        ({"num_key_value_heads": 3}, "choose num_key_value_heads 2 or 4"),
        ({"hidden_size": 10**12 + 1, "num_attention_heads": 10**12}, "or a hidden_size of 1000000000000"),
    ],
)
def test_widths_that_do_not_divide_get_advice_that_works(widths, advice):
    """The advice was head_dim, which no command has as a flag."""
    with pytest.raises(ValueError, match=advice):
        TinyLMConfig(**widths)
