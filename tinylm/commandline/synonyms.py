"""What other programs call our settings and commands, for the advice after an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_FLAGS = {
    "adapter": "lora lora_path adapter_path adapter_name_or_path peft",
    "model_path": "model model_name model_name_or_path checkpoint ckpt ckpt_path pretrained base_model weights m "
    "adapter lora lora_path adapter_path",
    "tokenizer_path": "tokenizer tokenizer_name vocab tokenizer_file",
    "data_path": "data dataset dataset_name dataset_path data_dir train_data train_file training_data file files "
    "input input_file text corpus train d",
    "validation_path": "valid_data val_data val_file valid_file validation_file eval_data eval_data_path eval_dataset "
    "test_data val_dir",
    "validation_fraction": "val_split val_size val_fraction test_size",
    "output_dir": "output out out_dir outdir save_dir save_path output_path outfile out_path o",
    "output": "output_dir out out_file outfile output_file output_path save_path o",
    "epochs": "num_epochs num_train_epochs n_epochs max_epochs e",
    "max_steps": "steps num_steps max_iters iters num_iterations iterations total_steps train_steps",
    "batch_size": "bs batch micro_batch_size per_device_train_batch_size train_batch_size device_batch_size b",
    "accumulation_steps": "gradient_accumulation_steps grad_accum grad_accum_steps accumulate accum",
    "max_seq_len": "seq_len sequence_length seq_length block_size context context_length context_size ctx ctx_size "
    "n_ctx max_length max_seq_length model_max_length cutoff_len",
    "learning_rate": "lr max_lr peak_lr rate matrix_lr",
    "weight_decay": "wd decay",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "warmup_fraction": "warmup warmup_ratio warmup_steps warmup_iters num_warmup_steps",
    "final_lr_fraction": "min_lr final_lr min_lr_ratio final_lr_frac",
    "grad_clip": "max_grad_norm clip gradient_clipping clip_grad clip_grad_norm",
    "optimizer": "optim opt",
    "dtype": "precision torch_dtype bf16 fp16 mixed_precision amp",
    "sharding": "fsdp zero deepspeed",
    "num_workers": "workers dataloader_num_workers num_proc",
    "use_compile": "compile torch_compile",
    "seed": "random_seed rng_seed",
    "log_interval": "logging_steps log_every log_steps",
    "eval_interval": "eval_steps eval_every val_interval",
    "eval_batches": "eval_iters val_batches",
    "save_interval": "save_steps save_every checkpoint_interval",
    "resume": "resume_from_checkpoint continue resume_from restart",
    "preset": "size model_size",
    "hidden_size": "n_embd d_model dim embed_dim width embedding_size model_dim",
    "num_hidden_layers": "n_layer n_layers num_layers layers depth",
    "num_attention_heads": "n_head n_heads num_heads heads",
    "num_key_value_heads": "n_kv_head n_kv_heads num_kv_heads kv_heads",
    "lora_rank": "r rank lora_r lora_dim",
    "lora_alpha": "alpha",
    "target_modules": "lora_target lora_target_modules targets",
    "beta": "dpo_beta pref_beta",
    "vocab_size": "vocab num_tokens size",
    "prompt": "question text query input message p",
    "system": "system_prompt instructions",
    "max_new_tokens": "max_tokens max_length num_tokens n_predict n length num_tokens_to_generate max_gen_len",
    "temperature": "temp t",
    "repetition_penalty": "repeat_penalty rep_penalty",
    "num_beams": "beams beam_size beam_width",
    "limit": "num_samples max_samples num_examples num_fewshot",
    "num_items": "limit num_samples",
    "reference_path": "ref_model reference ref reference_model",
    "tasks": "task benchmark benchmarks",
    "format": "type to outtype",
}
_COMMANDS = {
    "tokenizer": "train-tokenizer train_tokenizer tokenize tok bpe vocab",
    "pretrain": "train training train_pretrain pre-train",
    "sft": "finetune fine-tune fine_tune full_sft train_full_sft tune instruct",
    "lora": "train_lora peft adapter qlora",
    "dpo": "train_dpo rlhf align prefer preference orpo",
    "chat": "generate inference sample talk ask cli complete predict",
    "eval": "evaluate test benchmark score measure lm-eval",
    "merge": "merge_and_unload fuse merge-lora merge_lora fold",
    "export": "convert save to",
    "verify": "check info show inspect lineage",
    "quickstart": "start demo init begin",
}


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`did you mean ...? ` for a name of other programs or a mistyped one; empty if no known name is similar.

    Args:
        known: the settings of a command, or the commands.
    """
    known, word = list(known), word.lower()
    others = [name for names in (_FLAGS, _COMMANDS) for name, words in names.items() if word in words.split()]
    matches = [name for name in others if name in known] or difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"did you mean {prefix}{matches[0]}? " if matches else ""
