"""A converted model's folder in the hands of someone who has transformers and nothing of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, VOCAB, inputs_for, logits

from peerify.checkpoint.files import CODE, CODE_FOLDER
from peerify.config.grow import GrowConfig
from peerify.config.peer import PeerConfig
from peerify.conversion.growth import grow
from peerify.conversion.model import convert
from peerify.modules import peer_layers

# Runs before anything else in the other process: peerify cannot be imported there, wherever it is installed.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peerify":
            raise ImportError("peerify is not here")

sys.meta_path.insert(0, Block())
try:
    import peerify
except ImportError:
    pass
else:
    raise AssertionError("peerify can be imported")
"""

# For each model of the folder: load through its Auto class, compare bit by bit, save again, load that again.
STRANGER = """
import json, pathlib, torch, transformers
from safetensors.torch import load_file

torch.set_num_threads(1)
root = pathlib.Path(sys.argv[1])
folder = root / "tied-sharded"
try:
    transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
    print("no trust, no model")

for name, auto in json.loads((root / "models.json").read_text()).items():
    inputs, expected = load_file(root / f"{name}.inputs"), load_file(root / f"{name}.logits")["logits"]
    dtype = getattr(torch, (root / f"{name}.dtype").read_text())
    auto = getattr(transformers, auto)
    model, info = auto.from_pretrained(root / name, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], (name, info)
    assert model.dtype == dtype, (name, model.dtype)
    assert type(model).__name__.startswith("Peer"), name
    assert {"PEER", "ElasticPEER"} & {type(module).__name__ for module in model.modules()}, name
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits.float(), expected), name
    model.save_pretrained(root / (name + "-again"))
    again = auto.from_pretrained(root / (name + "-again"), trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits.float(), expected), name
    memories = [module for module in again.modules() if type(module).__name__ == "Memory"]
    print("same", name, len(memories), len({id(memory.pool) for memory in memories}))

ids = load_file(root / "tied-sharded.inputs")["input_ids"]
expected = load_file(root / "budgets.logits")
for active in ("0.3", "0.7", "1"):
    options = dict(trust_remote_code=True, peer_active=float(active))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, peer_prefill="budget", **options).eval()
    assert (model.config.peer_active, model.config.peer_prefill) == (float(active), "budget")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected[active]), active
    model.save_pretrained(root / ("at-" + active))
    again = transformers.AutoModelForCausalLM.from_pretrained(root / ("at-" + active), trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected[active]), active
    # By default a sequence is read with everything on, whatever the budget.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected["1"]), active
print("budgets")

model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert model.lm_head.weight is model.model.embed_tokens.weight
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("the same ", return_tensors="pt")
settings = dict(max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=-1)
model.set_active(0.5, prefill="budget")  # or else the prompt, read again and again, would be read in full
cached = model.generate(**prompt, use_cache=True, **settings)
plain = model.generate(**prompt, use_cache=False, **settings)
assert torch.equal(cached.sequences, plain.sequences)
assert cached.sequences.shape[1] == prompt["input_ids"].shape[1] + 12
torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
print("cache")
model.set_active(0.5, prefill="all")

pipe = transformers.pipeline("text-generation", model=str(folder), trust_remote_code=True)
text = pipe("the same ", max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
single = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1]:]
assert text == tokenizer.decode(single, skip_special_tokens=True), (text, single)
print("pipeline")

bare = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    hidden = bare(**prompt).last_hidden_state
    assert torch.equal(hidden, model.model(**prompt).last_hidden_state)
print("backbone")

labelled = transformers.AutoModelForSequenceClassification.from_pretrained(
    folder, trust_remote_code=True, num_labels=3, pad_token_id=0
)
assert torch.equal(labelled.model.layers[1].mlp.pool.u, model.model.layers[1].mlp.pool.u)
print("another head")

assert not any(name.partition(".")[0] == "peerify" for name in sys.modules)
"""

# With peerify imported no trust is needed.
FRIEND = """
import json, pathlib, sys, torch, peerify, transformers
from safetensors.torch import load_file

torch.set_num_threads(1)
root = pathlib.Path(sys.argv[1])
for name, auto in json.loads((root / "models.json").read_text()).items():
    inputs, expected = load_file(root / f"{name}.inputs"), load_file(root / f"{name}.logits")["logits"]
    model = getattr(transformers, auto).from_pretrained(root / name).eval()
    assert type(model).__module__ == "peerify.modeling.modeling_peer", type(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits.float(), expected), name
    model.save_pretrained(root / (name + "-friend"))
    assert (root / (name + "-friend") / "modeling_peer.py").is_file()
    print("same", name)
"""

PRODUCT = {"keys": "product", "active": 0.4}
MODELS: dict[str, tuple[str, str, dict[str, Any], torch.dtype, str | int]] = {
    # name: family, Auto class, options, dtype, shard size
    "gpt2-bf16": ("gpt2", "AutoModelForCausalLM", {"active": 0.4}, torch.bfloat16, "5GB"),
    "gpt2-product-bf16": ("gpt2", "AutoModelForCausalLM", PRODUCT, torch.bfloat16, "5GB"),
    "opt-spliced": ("opt", "AutoModelForCausalLM", {"active": 0.4}, torch.float32, "5GB"),
    "opt-product-spliced": ("opt", "AutoModelForCausalLM", PRODUCT, torch.float32, "5GB"),
    "bert-shards": ("bert", "AutoModelForMaskedLM", {"gates": "sigmoid", "num_shared": 5}, torch.float32, "30KB"),
    "t5": ("t5-gated", "AutoModelForSeq2SeqLM", {"active": 0.6, "layers": "first-last"}, torch.float32, "5GB"),
    "vit": (
        "vit",
        "AutoModelForImageClassification",
        {"preset": "peer-paper", "num_heads": 2, "topk": 6},
        torch.float32,
        "5GB",
    ),
    "gpt2-grown-bf16": ("gpt2", "AutoModelForCausalLM", {"active": 0.4}, torch.bfloat16, "5GB"),
    "opt-grown-spliced": ("opt", "AutoModelForCausalLM", {"active": 0.4}, torch.float32, "20KB"),
    "t5-grown": ("t5-gated", "AutoModelForSeq2SeqLM", PRODUCT, torch.float32, "20KB"),
}
# The memories that some of them have, as if they had learned something.
GROWN: dict[str, dict[str, Any]] = {
    "gpt2-grown-bf16": {"layers": "0"},
    "opt-grown-spliced": {"layers": "all", "share_pool": True},
    "t5-grown": {"layers": "1-3", "share_pool": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Converted models, with inputs and what they answered in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes: to the bit means the same sums in the same order
    root = tmp_path_factory.mktemp("models")
    autos = {}

    def keep(name: str, auto: str, model: Any, inputs: dict[str, torch.Tensor], shard_size: str | int) -> None:
        model.save_pretrained(root / name, max_shard_size=shard_size)
        save_file(inputs, root / f"{name}.inputs")
        save_file({"logits": logits(model, inputs)}, root / f"{name}.logits")
        (root / f"{name}.dtype").write_text(str(model.dtype).removeprefix("torch."))
        autos[name] = auto

    for name, (family, auto, options, dtype, shard_size) in MODELS.items():
        model = FAMILIES[family](seed=int(torch.randint(2**31, ()))).to(dtype)
        inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs_for(model).items()}
        data = [inputs] if "pixel_values" in inputs else torch.randint(3, VOCAB, (8, 24))
        convert(model, PeerConfig(**options), data)
        if name in GROWN:
            grow(model, GrowConfig(num_experts=144, num_heads=2, topk=4, **GROWN[name]), [inputs])
            for layer in peer_layers(model).values():
                if layer.memory is not None:
                    torch.nn.init.normal_(layer.memory.pool.v)
        model.set_active(model.config.peer_active, prefill="budget")  # so that what was saved shows
        keep(name, auto, model, inputs, shard_size)

    model = tiny_model("llama")
    tokenizer = tiny_tokenizer()
    convert(model, PeerConfig(active=0.5), torch.randint(0, 256, (8, 32)))
    tokenizer.save_pretrained(root / "tied-sharded")
    ids = torch.randint(0, 256, (2, 9))
    keep("tied-sharded", "AutoModelForCausalLM", model, {"input_ids": ids}, "8KB")
    answers = {}
    for active in ("0.3", "0.7", "1"):
        model.set_active(float(active), prefill="budget")
        answers[active] = logits(model, {"input_ids": ids})
    assert not torch.equal(answers["0.3"], answers["0.7"])
    assert not torch.equal(answers["0.7"], answers["1"])
    save_file(answers, root / "budgets.logits")

    # Its constructor asks an Auto class for another architecture with its own config.
    model = shieldgemma2()
    picture = {"pixel_values": torch.randn(1, 3, 16, 16), "input_ids": torch.tensor([[3, *[5] * 4, 7, 8, 9]])}
    picture["token_type_ids"] = (picture["input_ids"] == 5).long()
    convert(model, PeerConfig(active=0.5), [picture])
    assert len(model.config.peer["layers"]) == 5  # one of them pools what the tower sees
    keep("shieldgemma2", "AutoModelForImageClassification", model, picture, "5GB")
    (root / "models.json").write_text(json.dumps(autos))
    yield root
    torch.set_num_threads(threads)


def shieldgemma2() -> Any:
    part = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ShieldGemma2Config(
        text_config={**part, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "pad_token_id": 0},
        vision_config={**part, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_id=5,
        boi_token_id=6,
        eoi_token_id=7,
        yes_token_index=10,
        no_token_index=11,
    )
    return transformers.ShieldGemma2ForImageClassification(config).eval()


def python(code: str, folder: Path, *options: str) -> str:
    run = subprocess.run(
        [sys.executable, *options, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=folder,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_fixture_is_what_it_says(folder: Path) -> None:
    assert len(list((folder / "tied-sharded").glob("model-*.safetensors"))) > 2
    assert len(list((folder / "bert-shards").glob("model-*.safetensors"))) > 2
    assert next(iter(load_file(folder / "gpt2-bf16" / "model.safetensors").values())).dtype == torch.bfloat16
    config = json.loads((folder / "opt-spliced" / "config.json").read_text())
    assert config["model_type"] == "peer_opt"
    assert len(config["peer"]["identities"]) == 4
    assert all(
        (folder / name / file).read_bytes() == (CODE_FOLDER / file).read_bytes() for name in MODELS for file in CODE
    )


def test_without_peerify(folder: Path) -> None:
    said = python(BLOCK + STRANGER, folder, "-I").splitlines()
    for line in ("cache", "pipeline", "backbone", "another head", "no trust, no model", "budgets"):
        assert line in said
    memories = {"gpt2-grown-bf16": "1 1", "opt-grown-spliced": "2 1", "t5-grown": "3 1"}  # and pools
    assert {line for line in said if line.startswith("same ")} == {
        f"same {name} {memories.get(name, '0 0')}" for name in [*MODELS, "tied-sharded", "shieldgemma2"]
    }


def test_with_peerify_no_trust_is_needed(folder: Path) -> None:
    said = python(FRIEND, folder).splitlines()
    assert {line for line in said if line.startswith("same ")} == {
        f"same {name}" for name in [*MODELS, "tied-sharded", "shieldgemma2"]
    }
