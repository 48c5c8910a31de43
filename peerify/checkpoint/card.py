"""The model card of a converted model: README.md, made from peerify.json and config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from peerify.checkpoint import frontmatter
from peerify.checkpoint.atomic import write_text
from peerify.checkpoint.files import CARD
from peerify.checkpoint.layer_options import check_layers
from peerify.checkpoint.record import read_record, write_record
from peerify.errors import PublishError
from peerify.reading import local_path, read_object

PLACEHOLDER = "PATH_OR_ID"
# Several Auto classes load the same class; the card shows the one that people know, with what it is used for.
USUAL_LOADERS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": None,
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageClassification": "image-classification",
    "AutoModel": "feature-extraction",
}
CARRIED_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")  # from the source model's card
TEXT_FILES = (".txt", ".text", ".raw", ".md", ".jsonl", ".parquet")
RELATION = "finetune"  # the nearest of the Hub's words
CITATION = """@article{he2024mixture,
  title   = {Mixture of A Million Experts},
  author  = {He, Xu Owen},
  journal = {arXiv preprint arXiv:2407.04153},
  year    = {2024}
}"""


def write_card(folder: Path) -> None:
    """Write README.md of a converted model, or write its generated part anew; what people edited in it stays."""
    write_text(folder / CARD, frontmatter.render(fresh_card(folder)))


def fresh_card(folder: Path, name: str = PLACEHOLDER) -> frontmatter.Card:
    """The card as peerify would write it now, with the edits found in the folder's README.md.

    Args:
        folder: holds peerify.json, config.json and possibly README.md.
        name: what the code in the card loads.

    Raises:
        PublishError: the YAML in README.md, or one of the other two, cannot be read.
    """
    record = read_record(folder, PublishError)
    config = read_object(folder / "config.json", PublishError, "convert again")
    _check_config(config, str(folder / "config.json"))
    path = folder / CARD
    old = frontmatter.Card()
    if path.exists():
        old = frontmatter.parse(frontmatter.card_text(path, "write it anew, or remove it"), str(path))
    source = record["source"]
    values = metadata(record, config)
    edited = {key: old.metadata.get(key) for key in ("base_model", "license", "license_name") if old.edited(key)}
    told = {key: value for key, value in edited.items() if isinstance(value, str)}
    if "base_model" in told:
        values["base_model_relation"] = RELATION
    title = f"# {(source.get('base_model') or source['model']).split('/')[-1]} with PEER layers"
    return frontmatter.regenerate(old, values, title, _block(record, config, name, told))


def edited_card(folder: Path) -> str | None:
    """The text of README.md in a folder that peerify wrote, where people wrote something into it; else None.

    Raises:
        PublishError: the card cannot be read.
    """
    path = folder / CARD
    if not path.exists():
        return None
    text = frontmatter.card_text(path, "write it anew, or remove it")
    card = frontmatter.parse(text, str(path))
    return text if any(card.edited(key) for key in {**card.values(), **card.generated}) else None


def record_results(folder: Path, result: Mapping[str, Any]) -> None:
    """Note what `peerify eval --json` said in peerify.json, and card; an older result on the same text is replaced."""
    record = read_record(folder, PublishError)
    rows = record.get("evaluation", [])
    for text in result.get("texts", [result]):
        kept = _kept(text)
        rows = [*(row for row in rows if _task(row) != _task(kept)), kept]
    record["evaluation"] = rows
    write_record(folder, record)
    write_card(folder)


def _kept(result: Mapping[str, Any]) -> Any:
    """What is noted of a result on one text; a local dense model by its name only."""
    kept: Any = {key: result[key] for key in ("data", "context", "tokens", "perplexity", "against") if key in result}
    if kept.get("against"):
        model = str(kept["against"].get("model"))
        is_path = model.startswith(("/", ".", "~")) or local_path(model, PublishError).exists()
        kept["against"] = {**kept["against"], "model": Path(model).name if is_path else model}
    return kept


def _task(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row.get("data"), row.get("context"), row["tokens"], (row.get("against") or {}).get("model")


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise PublishError unless config.json says what a card is made from."""
    auto_map, names = config.get("auto_map"), config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise PublishError(f"{where}: architectures is no list of class names; convert again")
    if not isinstance(auto_map, dict) or not all(isinstance(name, str) for name in auto_map.values()):
        raise PublishError(f"{where}: auto_map is not what peerify writes; convert again")
    check_layers(config, where, PublishError)
    if not config["peer"]["layers"]:
        raise PublishError(f"{where}: peer has no layers, so nothing was converted; convert again")


def loader(config: Mapping[str, Any]) -> str:
    """Name of the Auto class that loads the model which `config` (config.json) describes."""
    name = (config.get("architectures") or [""])[0]
    loaders = [auto for auto, reference in config["auto_map"].items() if reference.endswith(f".{name}")]
    return next((auto for auto in USUAL_LOADERS if auto in loaders), loaders[0] if loaders else "AutoModel")


def metadata(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML of the card."""
    source, training = record["source"], record.get("training") or {}
    tag = USUAL_LOADERS.get(loader(config))
    values = {key: source.get(key) for key in CARRIED_OVER}
    names = [*record["recipe"]["calibration"]["data"], *_texts(training)]
    datasets = [name.split(":")[0] for name in names if not name.lower().endswith(TEXT_FILES)]
    values |= {
        "library_name": "transformers",
        "pipeline_tag": values["pipeline_tag"] or tag,
        "base_model": source.get("base_model"),
        "base_model_relation": RELATION if source.get("base_model") else None,
        "tags": ["peer", "peerify", "custom_code"],
        "datasets": list(dict.fromkeys(datasets)) or None,
        "model-index": _model_index(record) or None,
    }
    return {key: value for key, value in values.items() if value}


def _model_index(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": row["data"], "type": row["data"].split(":")[0]},
            "metrics": [
                {
                    "type": "perplexity",
                    "name": f"perplexity, first {row['tokens']:,} tokens in windows of {row.get('context', 512)}",
                    "value": round(row["perplexity"], 4),
                }
            ],
        }
        for row in record.get("evaluation", [])
        if row.get("data") and row.get("perplexity") is not None
    ]
    return [{"name": f"{record['source']['model'].split('/')[-1]}-peer", "results": results}] if results else []


def _block(record: Mapping[str, Any], config: Mapping[str, Any], name: str, told: Mapping[str, str]) -> str:
    """The generated part of the card; `told`: what people wrote into its YAML, which wins over the record."""
    source, layers = record["source"] | told, config["peer"]["layers"]
    base = source.get("base_model")
    origin = f"[{base}](https://huggingface.co/{base})" if base else source["model"]
    if source.get("revision") and "base_model" not in told:
        origin += f" at {source['revision'][:12]}"
    licence = source.get("license_name") or source.get("license")
    experts = _span([layer["num_experts"] for layer in layers.values()])
    elastic = any(layer.get("kind") == "elastic" for layer in layers.values())
    parts = [
        f"{len(layers)} dense feed-forward layers of {origin} were replaced by PEER layers "
        "([Mixture of A Million Experts](https://arxiv.org/abs/2407.04153)): each expert is a single neuron, and "
        f"{experts} in each layer, of which a token uses a part. "
        f"For a token at batch 1 a converted layer reads {record['bytes_fraction']:.1%} of the dense layer's bytes (in "
        f"bfloat16) and takes {record['macs_fraction']:.1%} of its multiply-adds, everything counted.",
        "## How to load it",
        _snippet(loader(config), record.get("files", []), name),
        *([_BUDGETS.format(experts="copied neuron" if "growth" in record else "expert")] if elastic else []),
        "The code is `modeling_peer.py` and what it imports, beside the weights; it needs torch and transformers 5.17 "
        "or newer.",
        "## Base model and licence",
        f"Base model: {origin}. "
        + (f"This model stays under its licence, {licence}." if licence else "This model stays under its licence."),
        "## Results",
        _results(record),
        "## How it was converted",
        _conversion(record, layers),
        _layers(record, layers),
        *_growth(record, layers),
        "## Healing",
        _healing(record.get("training")),
        "## Limits",
        f"- {_SPEED if elastic else 'Time follows what is retrieved only where many experts face few tokens.'}\n"
        "- Quality is lower on inputs unlike those it was calibrated on.\n"
        "- What the base model should not be used for, this one should not be used for either.\n"
        "- It cannot be written as GGUF: llama.cpp has no PEER layer.",
        "## Environment",
        ", ".join(f"{key} {value}" for key, value in {"peerify": record["peerify"], **record["versions"]}.items()),
        "<details><summary>Recipe</summary>",
        f"```yaml\n{yaml.safe_dump(record['recipe'], sort_keys=False, allow_unicode=True).strip()}\n```",
        "</details>",
        "## Citation",
        f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts)


_BUDGETS = (
    "`model.set_active(0.25)` spends another share of the dense layers' bytes from then on, and `1` evaluates every "
    "{experts} in full; `from_pretrained(..., peer_active=0.25)` begins so. Where a sequence brings more than a few "
    "tokens at once, all experts are evaluated in full; `peer_prefill` and `prefill` set to `budget` keep to the "
    "budget there, too."
)


_SPEED = (
    "Up to eight tokens at once are decoded faster on a CPU where numba is installed (`pip install numba`). Everywhere "
    "else, on GPUs too, it takes the dense model's time."
)


def _snippet(auto: str, files: Sequence[str], name: str) -> str:
    """Python that loads the model, and what turns raw inputs into its inputs."""
    kind, variable = "", ""
    if {"preprocessor_config.json", "processor_config.json"} & set(files):
        kind, variable = "AutoProcessor", "processor"
    elif any(file.startswith(("tokenizer", "vocab", "spiece")) for file in files):
        kind, variable = "AutoTokenizer", "tokenizer"
    lines = [
        f"from transformers import {', '.join(sorted(filter(None, (auto, kind))))}",
        "",
        f'model = {auto}.from_pretrained("{name}", trust_remote_code=True)',
        *([f'{variable} = {kind}.from_pretrained("{name}")'] if kind else []),
    ]
    return "\n".join(["```python", *lines, "```"])


def _conversion(record: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> str:
    product = [layer for layer in layers.values() if layer.get("kind") != "elastic"]
    chosen = any(_added(layer) < layer["num_experts"] - layer["num_shared"] for layer in product)
    convert, calibration = record["recipe"]["convert"], record["calibration"]
    router = "the router was fitted in closed form"
    if not product:
        router = "unchanged, with copies in a few bits as keys; what reading them more closely is worth was measured"
    elif chosen and convert.get("refine_steps") != 0:
        router += " and refined by gradient together with the experts, a layer at a time"
    if chosen and convert.get("refit") is not False:
        router += ", the experts' output vectors refitted to what it retrieves"
    seen = f"{calibration['tokens']:,} tokens" if "tokens" in calibration else f"{calibration['inputs']:,} inputs"
    return (
        f"By peerify {record['peerify']}, without training the model: the experts are the dense layers' neurons, "
        f"{router}, on {seen} of {_listed(record['recipe']['calibration']['data'])}. "
        "*Output error* is how far a layer's output is from the dense layer's on that data, relative to its size."
    )


def _added(layer: Mapping[str, Any]) -> int:
    """Experts that are added up for a token, beside those that are always on."""
    return int(layer["num_heads"] * layer["topk"])


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _results(record: Mapping[str, Any]) -> str:
    rows = record.get("evaluation", [])
    if not rows:
        return (
            "Not measured yet. Expect a loss of quality against the dense model: "
            "`peerify eval MODEL --against DENSE --data TEXT` tells how much."
        )
    alike = [(row.get("against") or {}).get("continuation") for row in rows]
    measured = any(alike)
    heads = ["text", "tokens", "perplexity", "dense base", "ratio", "KL from dense", *(["tokens alike"] * measured)]
    table = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row, same in zip(rows, alike, strict=True):
        against = row.get("against") or {}
        cells = [
            row.get("data") or "–",
            f"{row['tokens']:,}",
            f"{row['perplexity']:.2f}",
            f"{against['perplexity']:.2f}" if against else "–",
            f"{against['ratio']:.3f} ×" if against else "–",
            f"{against['kl']:.4f}" if against.get("kl") is not None else "–",
            *([f"{same['mean']:.1f} of {same['of']}" if same else "–"] * measured),
        ]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join([*table, *(["", _ALIKE] * measured)])


_ALIKE = (
    "*Tokens alike*: how many tokens this model and the dense base add to a prompt, always the most likely one, before "
    "they part, as a mean over prompts from the text."
)


def _layers(record: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> str:
    table = ["| layer | experts | keys | used | output error |", "|---|---|---|---|---|"]
    order = {path: i for i, path in enumerate(record["layer_errors"])}  # as they run; config.json sorts them as text
    for path in sorted(layers, key=lambda path: order.get(path, len(order))):
        layer = layers[path]
        error = record["layer_errors"].get(path)
        last = "–" if error is None else f"{error:.4f}"
        if layer.get("kind") == "elastic":
            shares = [row[0] for row in layer["budgets"]]
            budgets = f"{min(shares):.1%} to {max(shares):.1%} of the bytes, or all" if shares else "all"
            keys = f"copies of {layer['bits']} bits"
            table.append(f"| `{path}` | {layer['num_experts']} | {keys} | {budgets} | {last} |")
            continue
        heads, (rows, columns) = layer["num_heads"], layer["grid"]
        router = f"product keys, {heads} × ({rows} × {columns})"
        always = f", {layer['num_shared']} always" if layer["num_shared"] else ""
        used = f"{_added(layer)}{always}"
        table.append(f"| `{path}` | {layer['num_experts']} | {router} | {used} | {last} |")
    return "\n".join(table)


def _growth(record: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What layers were given to grow, as paragraphs."""
    growth = record.get("growth")
    if not growth:
        return []
    rows = ["| layer | new experts | keys | found for a token |", "|---|---|---|---|"]
    for path, memory in ((path, layer["memory"]) for path, layer in layers.items() if layer.get("memory")):
        where = f", in the pool of `{memory['pool_of']}`" if memory.get("pool_of") else ""
        keys = "{} × {}".format(*memory["grid"])
        found = f"{memory['num_heads']} × {memory['topk']}"
        rows.append(f"| `{path}` | {memory['num_experts']:,}{where} | {keys} | {found} |")
    fitted = (f"{each['calibration'].get('tokens', 0):,} tokens of {_listed(each['data'])}" for each in growth)
    said = (
        "Layers were given new experts, which product keys find, beside the neurons. Their output vectors were zero, "
        f"so that the model computed what it did before, until they were trained. Keys were fitted on "
        f"{', then on '.join(dict.fromkeys(fitted))}."
    )
    return ["## How it was grown", said, "\n".join(rows)]


def _healing(training: Mapping[str, Any] | None) -> str:
    """Continued training, from the record's "training": {"recipe", "tokens", "steps"}, or {"steps", "unfinished"}."""
    if not training:
        return "None: no weight was trained after the conversion."
    if training.get("unfinished"):
        return f"This is a checkpoint at step {training['steps']:,} of a training run that goes on."
    said = f"Trained on {training['tokens']:,} tokens of {_listed(_texts(training))} in {training['steps']:,} steps."
    settings = yaml.safe_dump(training["recipe"], sort_keys=False, allow_unicode=True).strip()
    return f"{said}\n\n<details><summary>Settings</summary>\n\n```yaml\n{settings}\n```\n\n</details>"


def _texts(training: Mapping[str, Any]) -> list[str]:
    """The training texts, as published: file names and Hub datasets."""
    return [source["path"] for source in training.get("recipe", {}).get("data", {}).get("sources", [])]


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "data that was not named"
