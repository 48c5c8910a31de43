"""GGUF files of tiny models."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from dense_checkpoint import WORDS
from transformers import LlamaForCausalLM


def write_gguf(path: Path, model: LlamaForCausalLM, arch: str = "llama", parts: int = 1) -> None:
    """`model` as llama.cpp would store it, the header of the first of `parts` files."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_name("Some name")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*WORDS[:-2], "w", "1"])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(WORDS))
    writer.add_token_merges(["w 1"])  # makes w1
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        array = value.numpy()
        if "q_proj" in key or "k_proj" in key:  # llama.cpp stores rotary halves interleaved
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(key, (".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
