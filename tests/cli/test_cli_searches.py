"""``crossfade generate`` by particles, a tilt, uncertain chunks and a budget: as the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
from crossfade import cli
from crossfade.bulk.records import seed_of
from word_models import PROMPTS, WORDS, loaded, make_tokenizer, save_model

SEEDS = [seed_of(0, i) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("two")
    return {n: save_model(folder / n, seed) for seed, n in enumerate(["small", "large"])}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "def longer(prompts, responses):\n    return [0.1 * len(r) for r in responses]\n"
    )


def longer(prompts: list[Any], responses: list[str]) -> list[float]:
    return [0.1 * len(r) for r in responses]


def decoded(two: dict[str, str], search: Any, **more: Any) -> cf.Output:
    blend = cf.Model(loaded(two["small"]), tokenizer=make_tokenizer(WORDS))
    return cf.generate(blend, PROMPTS, search=search, seed=SEEDS, max_new_tokens=6, **more)


def argv(two: dict[str, str], *more: str, both: bool = False) -> list[str]:
    models = [f"--model={n}={two[n]}" for n in (["small", "large"] if both else ["small"])]
    return ["generate", *PROMPTS, *models, "--blend=small", "--max-new-tokens=6", *more]


@pytest.mark.usefixtures("here")
def test_particles(two, run) -> None:
    asked = argv(two, "--reward=own:longer", "--particles=4,2", "--n=4")
    found = run(*asked, "--particle-temperature=0.5", "--chunk-entropy=1.5")
    search = cf.ParticleFilter(4, 2, longer, 0.5, chunk_end=cf.entropy_above(1.5))
    out = decoded(two, search, num_return_sequences=4)
    for i, record in enumerate(found):
        assert [x["text"] for x in record["outputs"]] == out.text[4 * i : 4 * i + 4]
        weights = [x["weight"] for x in record["outputs"]]
        assert weights == pytest.approx(out.weights[i].tolist(), abs=1e-5)
        assert record["effective_sizes"] == pytest.approx(out.effective_sizes[i], abs=1e-4)


@pytest.mark.usefixtures("here")
def test_a_tilt_and_a_budget(two, run) -> None:
    more = ("--tilt=large - small", "--budget=19")
    found = run(*argv(two, "--reward=own:longer", "--search=2,3,3", *more, both=True))
    small, large = (cf.Model(loaded(two[n]), tokenizer=make_tokenizer(WORDS)) for n in two)
    tilt = cf.LogRatio(large, small)
    search = cf.ChunkBeamSearch(1, 3, 3, longer, tilt=tilt)
    out = cf.generate(small, PROMPTS, search=search, seed=SEEDS, max_new_tokens=6)
    assert [r["text"] for r in found] == out.text
    assert [r["value"] for r in found] == pytest.approx(out.values.tolist(), abs=1e-4)
    alone = run(*argv(two, "--tilt=large - small", "--best-of=3", both=True))
    out = cf.generate(small, PROMPTS, search=cf.BestOfN(3, tilt=tilt), seed=SEEDS, max_new_tokens=6)
    assert [r["text"] for r in alone] == out.text


MISTAKES = [
    (["--particles=1,5"], "'1,5' must be two numbers N,L, such as 8,5, the first of at least 2"),
    (["--particles=4"], "must be two numbers N,L"),
    (["--particles=4,5", "--best-of=3"], "not allowed with argument"),
    (["--particles=4,5", "--n=5"], "--n is 5; it must be at most 4, as --particles keeps"),
    (["--particles=4,5", "--particle-temperature=0"], "--particle-temperature is 0"),
    (["--best-of=4", "--particle-temperature=2"], "it belongs to --particles"),
    (["--best-of=4", "--chunk-entropy=2"], "it belongs to --search or --particles"),
    (["--particles=4,5", "--selection-temperature=2"], "it belongs to --best-of or --search"),
    (["--search=2,2,3", "--chunk-entropy=x"], "'x' must be a number of at least 0"),
    (["--tournament=4", "--tilt=large - small"], "--tilt is given with --tournament"),
    (["--best-of=4", "--tilt=0.5 * (large - small)"], "it must be one model less another"),
    (["--best-of=4", "--tilt=large"], "--tilt: it is 'large'; it must be one model less another"),
    (["--best-of=4", "--tilt=small - large"], "its second model must be the one that proposes"),
    (["--best-of=4", "--budget=5"], "--budget is 5; it must be at least 6, the tokens of a text"),
    (["--particles=4,2", "--budget=9"], "--budget is 9; it must be at least 12, the tokens of 2"),
]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[m[1][:30] for m in MISTAKES])
def test_mistakes(two, options: list[str], message: str, capsys) -> None:
    both = any("large" in option for option in options)
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(cli.main(argv(two, "--reward=own:longer", *options, both=both)))
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
