"""The model card of a converted model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

CITATION = """@article{he2024mixture,
  title={Mixture of A Million Experts},
  author={He, Xu Owen},
  journal={arXiv preprint arXiv:2407.04153},
  year={2024}
}"""


def model_card(record: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]], auto_class: str) -> str:
    """README.md of the folder, from peerify.json's content, the layers' arguments and the Auto class that loads it."""
    source = record["source"]["model"]
    metadata: dict[str, Any] = {"library_name": "transformers", "tags": ["peer", "peerify", "custom_code"]}
    if "/" in source:  # a Hub id; a local folder has no address to link to
        metadata["base_model"] = source
    texts = ", ".join(record["recipe"]["calibration"]["data"])
    rows = "\n".join(
        f"| `{path}` | {layer['num_experts']} | {layer['num_heads']} x ({layer['grid'][0]} x {layer['grid'][1]}) "
        f"| {layer['num_heads'] * layer['topk']} of {layer['num_heads'] * layer['candidates']} "
        f"| {record['layer_errors'][path]:.4f} |"
        for path, layer in layers.items()
    )
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---
# {source.split("/")[-1]} with PEER layers

{len(layers)} dense feed-forward layers of {source} were replaced by PEER layers (product-key retrieval over
single-neuron experts, [arXiv 2407.04153](https://arxiv.org/abs/2407.04153)) with peerify {record["peerify"]}.
The experts spend {record["active_fraction"]:.1%} of the dense layers' multiply-adds per token, retrieving them another
{record["router_fraction"]:.1%}.

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("PATH_OR_ID", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
```

The conversion is training-free: closed-form, from {record["calibration"]["tokens"]} tokens of {texts}. Expect a loss of
quality against the dense model; `peerify eval` measures it.

| layer | experts | heads x grid | evaluated of retrieved | output error |
|---|---|---|---|---|
{rows}

## Citation
```bibtex
{CITATION}
```
"""
