"""The pages say what is true: their examples run, and the files that they name are there."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "bench/RESULTS.md", *DOCS]
CLUSTER = pytest.param("docs/ray.md", marks=pytest.mark.sweep)  # It starts one of Ray, twice.
EXAMPLES = [p for p in PAGES if re.search(r"(?m)^```(python|bash)$", (ROOT / p).read_text())]
PLACES = [ROOT, ROOT / "python" / "crossfade", ROOT / "python" / "crossfade" / "decoding"]
SIZE = r"[\d.]+ M parameters \(\d+ MB\)"
NAME = r"[\w./-]*(?:\.(?:py|h|cpp|md|svg)|/)"  # the name of a file, or of a folder with its slash


def missing(names: list[str], beside: list[Path]) -> list[str]:
    """The names that are those of no file or folder. A name may leave out the folder of an earlier
    one."""
    found, folders = [], {*PLACES, *beside}
    for name in names:
        there = {path.parent for folder in folders if (path := folder / name).exists()}
        if not there:
            found.append(name)
        folders |= there
    return found


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    code = re.findall(rf"`({NAME})`", text)
    prose = re.sub(r"(?ms)^```.*?^```$", "", text)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", prose)
    assert missing(code, []) == []
    assert missing(links, [(ROOT / page).parent]) == []


@pytest.fixture(scope="session")
def shallow(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose small model has 2 of the 30 layers, and its guides, cut to the same ones."""
    from crossfade import models
    from crossfade.models import small_model
    from safetensors.torch import load_file, save_file

    cache = tmp_path_factory.mktemp("shallow")
    folder = small_model.path(cache)
    shutil.copytree(smollm2_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model, _ = models.load(smollm2_folder)
    first = 10  # of the layers that all guides adapt
    model.model.layers = model.model.layers[first : first + 2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    sizes = {p.name: {"bytes": p.stat().st_size} for p in folder.iterdir()}
    del sizes[small_model.MANIFEST]
    (folder / small_model.MANIFEST).write_text(json.dumps({"files": sizes}))
    for name in models.GUIDES:
        shutil.copytree(models.guide(name), cache / name)
        for file in (cache / name).glob("adapter_model.safetensors"):
            cut = {}
            for i in range(2):
                of_layer = {k: x for k, x in load_file(file).items() if f".{first + i}." in k}
                cut |= {k.replace(f".{first + i}.", f".{i}."): x for k, x in of_layer.items()}
            save_file(cut, file)
            settings = json.loads((cache / name / "adapter_config.json").read_text())
            settings["layers_to_transform"] = None
            (cache / name / "adapter_config.json").write_text(json.dumps(settings))
    return cache


def run_examples(page: str, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """Run a page's examples. Each prints what the page says.

    What a model wrote may differ on another processor, so its lines are counted alone. Without the
    `whole` model there must be some, and the model's size may differ too.
    """
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    import examples

    for example, printed in examples.outputs((ROOT / page).read_text(), page):
        if example.said is None:
            continue
        said, found = ([*map(str.rstrip, x.splitlines())] for x in (example.said, printed))
        if not example.sampled:
            if not whole:
                said, found = ([re.sub(SIZE, "", x) for x in lines] for lines in (said, found))
            assert found == said, example.code
        else:
            assert len(found) == len(said) > 0 if whole else found, example.code


@pytest.mark.model
@pytest.mark.filterwarnings("default")  # other packages warn, as they do for a reader
@pytest.mark.parametrize("page", [CLUSTER if p in CLUSTER.values else p for p in EXAMPLES])
def test_examples_run(page: str, shallow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crossfade import models
    from crossfade.models import small_model

    monkeypatch.setenv("CROSSFADE_CACHE", str(shallow))
    for module in (models, small_model):
        monkeypatch.setattr(module, "guide", shallow.joinpath)
    run_examples(page, monkeypatch, whole=False)


@pytest.mark.model
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.sweep] if p != "README.md" else []) for p in EXAMPLES],
)
def test_examples_print_what_their_page_says(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the whole model."""
    run_examples(page, monkeypatch, whole=True)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_every_page_begins_with_an_example() -> None:
    """All but those that are tables made from results, and the two that walk through the code."""
    others = {"docs/README.md", "docs/architecture.md", "docs/families.md", "docs/mistakes.md"}
    for page in set(DOCS) - others:
        first = re.search(r"(?m)^```(\w+)", (ROOT / page).read_text())
        assert first is not None, page
        assert first[1] in ("python", "bash", "jsonl"), page


def test_files_in_the_picture_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    import architecture

    for files, _, _ in [*architecture.DOWN, *architecture.UP]:
        assert missing(files.split(), []) == []
