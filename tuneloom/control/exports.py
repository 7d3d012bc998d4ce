"""An adapter as a plain PEFT folder, and that folder as a zip. No torch."""

import json
import tempfile
import time
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tuneloom.domain import AdapterRef
from tuneloom.store.artifacts import ADAPTER_FILES, fetch_adapter
from tuneloom.store.base import BlobNotFound, Blobs
from tuneloom.store.lineage import LINEAGE_FILE

LOOKS_AT_ONCE = 8


def have_lineages(blobs: Blobs, adapters: Iterable[AdapterRef]) -> list[bool]:
    """Of each whether there is a signed document of how it was made. Asked side by side: a bucket is far away."""
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        return list(pool.map(lambda each: blobs.find(f"{each.uri}/{LINEAGE_FILE}") is not None, adapters))


def copy_lineage(blobs: Blobs, adapter: AdapterRef, folder: Path) -> None:
    """Write the signed document of how the adapter was made, if there is one."""
    try:
        lineage = blobs.read(f"{adapter.uri}/{LINEAGE_FILE}")
    except BlobNotFound:
        return
    (folder / LINEAGE_FILE).write_bytes(lineage)


def write_adapter(blobs: Blobs, adapter: AdapterRef, folder: Path, *, name: str, base: str) -> None:
    """Fill `folder` with what plain `peft` loads: the verified weights, the config, naming the base by its id, a
    README that says how, and the lineage if there is one.

    Raises:
        BlobNotFound: a file of the adapter is not stored.
        BlobCorrupt: what is stored is not this adapter.
    """
    config_name, weights_name = ADAPTER_FILES
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as cache:
        fetched = fetch_adapter(blobs, adapter, Path(cache))
        config = json.loads((fetched / config_name).read_bytes())
        if config.get("base_model_name_or_path") == base:
            # As it was written: its hash is in the lineage.
            (fetched / config_name).rename(folder / config_name)
        else:
            # An imported adapter may name a folder of the machine that it was trained on.
            config["base_model_name_or_path"] = base
            (folder / config_name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (fetched / weights_name).rename(folder / weights_name)
    (folder / "README.md").write_text(_readme(name, base), encoding="utf-8")
    copy_lineage(blobs, adapter, folder)


def write_merged_readme(folder: Path, *, name: str, base: str) -> None:
    (folder / "README.md").write_text(_merged_readme(name, base), encoding="utf-8")


def write_archive(path: Path, folder: Path) -> Path:
    """A zip of the files in `folder`. Weights hardly compress: stored, the archive costs no time."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return path


def _readme(name: str, base: str) -> str:
    return f"""---
base_model: {base}
library_name: peft
---

# {name}

A LoRA adapter of `{base}`, exported by tuneloom on {_today()}.

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/of/this/folder")
```
"""


def _merged_readme(name: str, base: str) -> str:
    return f"""---
base_model: {base}
library_name: transformers
---

# {name}

`{base}` with the LoRA adapter `{name}` merged into its weights, exported by tuneloom on {_today()}.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")
```
"""


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())
