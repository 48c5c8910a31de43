"""Converted models in other people's libraries. docs/ecosystem.md says where each condition comes from.

Loading without peerify, pipeline() and generate() are in test_round_trip.py.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import tiny_model, tiny_tokenizer
from tiny import FAMILIES, VOCAB, inputs_for, logits
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peerify.config.peer import PeerConfig
from peerify.config.recipe import Recipe
from peerify.conversion.model import convert
from peerify.errors import UsageError
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modeling.peer_layer import PEER

DECODERS = ("llama", "qwen3", "gpt2", "gpt_neox", "opt")


def converted(family: str, changes: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
    model = FAMILIES[family](seed=int(torch.randint(2**31, ())), **(changes or {}))
    convert(model, PeerConfig(**{"active": 0.5} | options), torch.randint(3, VOCAB, (8, 24)))
    return model.eval()


@pytest.fixture(scope="module")
def dense() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module", params=["copies", "product"])
def folder(dense: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A converted Llama with its tokenizer, in shards; it keeps to a budget for every token."""
    path = tmp_path_factory.mktemp("model") / "peer"
    model = copy.deepcopy(dense)
    convert(model, PeerConfig(active=0.75, keys=request.param), torch.randint(0, 256, (16, 32)))
    model.set_active(model.config.peer_active, prefill="budget")
    model.save_pretrained(path, max_shard_size="8KB")
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 256, (2, 11))


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


# Training


@pytest.mark.filterwarnings("ignore")
def test_trainer_trains_saves_and_reloads(folder: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    model = load(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    with torch.no_grad():
        first = model(ids, labels=ids).loss.item()
    trainer.train()
    with torch.no_grad():
        assert model.eval()(ids, labels=ids).loss.item() < first
    for table in ("u", "v", "gate"):
        key = f"model.layers.0.mlp.pool.{table}"
        assert not torch.equal(model.state_dict()[key], before[key]), f"{key} did not train"
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "modeling_peer.py").is_file()
    again = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_lora_saves_loads_and_merges(folder: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "query_proj"], "target_parameters": ["pool.v"], "r": 2}
    model = peft.get_peft_model(
        load(folder), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    )
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert type(loaded.get_base_model()).__name__ == "PeerLlamaForCausalLM"
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert not torch.allclose(load(folder)(ids).logits, expected, atol=1e-3)
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(load(tmp_path / "merged")(ids).logits, merged(ids).logits)


# Running


@pytest.mark.filterwarnings("ignore")
def test_big_model_loading(folder: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    """device_map with layers on disk, and accelerate's own load_checkpoint_and_dispatch."""
    accelerate = pytest.importorskip("accelerate")
    with torch.no_grad():
        expected = load(folder)(ids).logits
        parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.1")
        places = {**dict.fromkeys(parts, "cpu"), "model.layers.0": "disk", "model.layers.2": "disk"}
        model = load(folder, device_map=places, offload_folder=str(tmp_path / "offload"))
        assert model.model.layers[0].mlp.pool.u.device.type == "meta"
        assert torch.equal(model(ids).logits, expected)
        config = transformers.AutoConfig.from_pretrained(folder)
        with accelerate.init_empty_weights():
            empty = AutoModelForCausalLM.from_config(config)
        empty.tie_weights()
        size = sum(parameter.numel() * 4 for parameter in empty.parameters())
        split = accelerate.infer_auto_device_map(
            empty, max_memory={"cpu": size * 2 // 3, "disk": 10**9}, no_split_module_classes=["LlamaDecoderLayer"]
        )
        assert set(split.values()) == {"cpu", "disk"}
        model = accelerate.load_checkpoint_and_dispatch(
            empty, str(folder), device_map=split, offload_folder=str(tmp_path / "more"), strict=True
        )
        assert torch.equal(model.eval()(ids).logits, expected)


PRODUCT = {"keys": "product"}
WAYS = [{}, {"active": 1.0}, PRODUCT, {"gates": "softmax"}, PRODUCT | {"active": 1.0}]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_compiles_to_one_graph(options: dict[str, Any]) -> None:
    """No graph breaks, so nothing on the way waits for a value; eager code runs the graph."""
    model = converted("llama", {"num_hidden_layers": 1}, **options)
    model.set_active(model.config.peer_active, prefill="budget")  # for layers with copies, which many tokens pass by
    compiled = torch.compile(model.model, backend="eager", fullgraph=True, dynamic=True)
    for rows, tokens in ((2, 12), (3, 7)):
        inputs = inputs_for(model, rows=rows, tokens=tokens)
        with torch.no_grad():
            expected = model.model(**inputs).last_hidden_state
            torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, PRODUCT], ids=str)
def test_compiles_with_inductor(options: dict[str, Any]) -> None:
    model = converted("llama", **options)
    model.set_active(model.config.peer_active, prefill="budget")
    compiled = torch.compile(model, dynamic=True)
    for tokens in (12, 40):
        inputs = inputs_for(model, tokens=tokens)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_assistant_of_the_dense_original(folder: Path, dense: Any) -> None:
    """Speculative decoding, with either as the draft of the other, gives what the main model alone gives."""
    model = load(folder)
    prompt = torch.randint(3, 256, (1, 6))
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    for main, draft in ((dense, model), (model, dense)):
        alone = main.generate(prompt, **settings)
        assert alone.shape == (1, 18)
        assert torch.equal(main.generate(prompt, assistant_model=draft, **settings), alone)


@pytest.mark.parametrize("options", [{}, PRODUCT], ids=str)
def test_sentence_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = tiny_model("bert")
    convert(model, PeerConfig(active=0.5, **options), torch.randint(0, 256, (8, 32)))
    model.set_active(0.5, prefill="budget")  # or else a text that is padded beside a long one would be read in full
    model.save_pretrained(tmp_path / "bert")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(tmp_path / "bert")
    encoder = library.SentenceTransformer(str(tmp_path / "bert"), device="cpu", trust_remote_code=True)
    assert {"PEER", "ElasticPEER"} & {type(module).__name__ for module in encoder.modules()}
    texts = ["same", "another one"]
    vectors = encoder.encode(texts, convert_to_tensor=True)
    bare = AutoModel.from_pretrained(tmp_path / "bert").eval()
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            hidden = bare(**tokenizer(text, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(vector, hidden[0].mean(0), rtol=1e-4, atol=1e-5)
    encoder.save(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    torch.testing.assert_close(again.encode(texts, convert_to_tensor=True), vectors)


def test_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be written as GGUF: llama\.cpp has no PEER layer"):
        Recipe.load(None, (), {"model": ("MODEL", "gpt2"), "output": ("OUT", "out.gguf")})
    gguf = pytest.importorskip("gguf")
    # llama.cpp's converter goes by architectures[0] and knows none that starts with Peer, so it stops as well.
    names = set(gguf.MODEL_ARCH_NAMES.values())
    model = converted("llama")
    assert model.config.model_type not in names
    assert model.config.architectures[0].removeprefix("Peer") == "LlamaForCausalLM" != model.config.architectures[0]


# What the transformers backends of vLLM and SGLang rely on


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """As both build a model: each parameter is made anew on meta from its own attributes, buffers stay."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            made = module._parameters[name]
            assert made is not None
            attributes = dict(made.__dict__) | {"requires_grad": made.requires_grad}
            module._parameters[name] = type(made)(made.to("meta"), **attributes)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class TheirLinear(nn.Module):
    """In place of every nn.Linear: it can be called, and that is all (vLLM's may hold no `weight` of that shape)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = nn.Parameter(linear.weight.detach().t().contiguous())
        self.shift = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.packed
        return y if self.shift is None else y + self.shift


@pytest.mark.parametrize("family", DECODERS)
def test_config_says_what_the_backends_ask(family: str) -> None:
    config = converted(family).config
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(config.auto_map)
    module, name = config.auto_map["AutoModel"].split(".")
    assert module == "modeling_peer"
    from peerify.modeling import modeling_peer as modeling

    base = getattr(modeling, name)
    assert not name.endswith(("LMHeadModel", "ForCausalLM")), "the backends put a head of their own on the base model"
    if family in ("llama", "qwen3", "gpt2", "gpt_neox", "opt"):
        assert base.is_backend_compatible(), "_supports_attention_backend"
    # Either of these would send it to the code for mixtures of experts.
    text = config.get_text_config()
    for key in ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"):
        assert not getattr(text, key, None), key
    assert not re.search("moe|mixtral", config.architectures[0].lower())
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        assert isinstance(getattr(text, key), int)


PAPER = {"preset": "peer-paper", "active": None, "num_heads": 2, "topk": 4}


@pytest.mark.parametrize("options", [{}, PRODUCT, PAPER], ids=str)
def test_module_and_parameter_names_mean_nothing_else(options: dict[str, Any]) -> None:
    model = converted("llama", **options)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, PEER | ElasticPEER)}
    assert layers
    plan = {**(model.tp_plan or {})}
    assert plan, "the architecture has a tensor-parallel plan, which must not name parts of a PEER layer"
    for path, layer in layers.items():
        for name, part in layer.named_modules():
            assert name.rpartition(".")[2] != "experts"
            assert not type(part).__name__.endswith("RMSNorm")
            full = f"{path}.{name}" if name else path
            hits = [rule for rule in plan if re.fullmatch(rule.replace(".", r"\.").replace("*", r"\d+"), full)]
            assert name == "" or not hits, (full, hits)
        for name, _ in layer.named_parameters():
            assert not any(word in name for word in ("shared_expert", "LayerNorm.gamma", "weight_g")), name
        # Their loaders, and accelerate's for layers on disk, fill parameters and the statistics of batch norms.
        extra = layer.state_dict().keys() - dict(layer.named_parameters()).keys()
        norms = [(at, part) for at, part in layer.named_modules() if isinstance(part, nn.BatchNorm1d)]
        assert extra <= {f"{at}.{stat}" for at, part in norms for stat in part.state_dict()}


@pytest.mark.parametrize("options", [{}, PRODUCT], ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_base_model_runs_as_the_backends_run_it(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built from the config on meta, filled by name, linear layers swapped, attention theirs, no batch to speak of."""
    model = converted(family, **options)
    model.set_active(model.config.peer_active, prefill="budget")
    inputs = inputs_for(model, rows=1, tokens=9)
    with torch.no_grad():
        expected = model.base_model(**inputs).last_hidden_state

    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = "theirs"
    seen: list[Any] = []
    instances = {i: object() for i in range(config.num_hidden_layers)}

    def attention(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        seen.append(options["attention_instances"][module.layer_idx])
        q, k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (query, key, value))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options.get("scaling"))
        return y.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "theirs", attention)
    with parameters_on_meta():
        base = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=True).eval()
    weights = model.base_model.state_dict()
    for module in list(base.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    assert set(base.state_dict()) == set(weights), "every weight finds its place by name"
    base.load_state_dict(weights)
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, TheirLinear(child))
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    with torch.no_grad():
        hidden = base(
            input_ids=inputs["input_ids"],
            inputs_embeds=None,
            use_cache=False,
            position_ids=positions,
            attention_instances=instances,
            return_dict=False,
        )[0]
    assert seen == list(instances.values()), "each layer asked for its own attention once"
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


def test_saved_config_is_enough_for_them(folder: Path) -> None:
    """SGLang resolves every entry of auto_map as a class in the repository's own file."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    config = json.loads((folder / "config.json").read_text())
    for reference in config["auto_map"].values():
        assert get_class_from_dynamic_module(reference, str(folder)).__name__ == reference.split(".")[1]
    assert logits(load(folder), {"input_ids": torch.randint(3, 256, (1, 5))}).shape == (1, 5, config["vocab_size"])
