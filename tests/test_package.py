"""What `import peerify` costs, and that converted models' classes are known after it, in either order."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

KNOWN = "assert 'peer_llama' in transformers.CONFIG_MAPPING"


def python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:peerify", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'pydantic', 'click'}"
    assert python(f"import sys, peerify; print(sorted({heavy} & set(sys.modules)))") == "[]\n"


@pytest.mark.parametrize(
    "code",
    [
        # a mere look for transformers, as accelerate takes, must not use up the watch
        "import importlib.util, peerify\nimportlib.util.find_spec('transformers')\nimport transformers",
        f"import transformers\n{KNOWN.replace(' in ', ' not in ')}\nimport peerify",
        "from peerify import PEER\nimport transformers",
    ],
)
def test_registers_in_either_order(code: str) -> None:
    python(f"{code}\n{KNOWN}")


def test_no_export_is_hidden_by_a_module() -> None:
    """Importing peerify/convert.py would bind that module over a function of the same name."""
    import peerify

    modules = {path.stem for path in Path(peerify.__file__).parent.iterdir()}
    assert "errors" in modules
    assert modules.isdisjoint(peerify.__all__)


# Each package and module imports from those before it, and from itself.
LEVELS = [
    *("errors", "progress", "modules", "memory", "reading", "hub_calls", "config", "discovery", "modeling"),
    *(
        "environment",
        "checkpoint",
        "data",
        "conversion",
        "publishing",
        "usage",
        "continuations",
        "details",
        "evaluation",
        "training",
        "bench",
        "choice",
        "sweep",
        "report",
        "pipeline",
        "cli",
        "__main__",
    ),
]


def test_nothing_imports_upward_or_in_a_circle() -> None:
    root = Path(__file__).parents[1] / "peerify"
    for file in root.rglob("*.py"):
        own = file.relative_to(root).with_suffix("").parts[0]
        text = file.read_text(encoding="utf-8")
        imported = re.findall(r"^ *from peerify\.(\w+)", text, re.MULTILINE)
        imported += re.findall(r"^ *from peerify import (.+)$", text, re.MULTILINE)
        for name in ", ".join(imported).split(", "):
            if own not in ("__init__", "_registration") and name not in ("", "__version__"):
                assert LEVELS.index(name) <= LEVELS.index(own), f"{file} imports peerify.{name}, which is above it"


def test_every_export_exists() -> None:
    python(
        "import peerify\nfor name in peerify.__all__: getattr(peerify, name)\n"
        "assert set(peerify.__all__) <= set(dir(peerify))"
    )


def test_unknown_name() -> None:
    import peerify

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = peerify.nonsense


def test_runs_as_a_module() -> None:
    run = subprocess.run([sys.executable, "-m", "peerify", "--version"], capture_output=True, text=True, check=True)
    import peerify

    assert peerify.__version__ in run.stdout
