"""`crossfade pareto`: a sweep from a settings file, its files, and mistakes in the settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import yaml
from crossfade import cli
from crossfade.pareto import Front
from tiny_models import lora
from word_models import loaded, save_reward_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

REWARDS = """\
def short(prompts, responses):
    return [-float(len(text.split())) for text in responses]


def vowels(prompts, responses):
    return [float(sum(text.count(x) for x in "aeiou")) for text in responses]
"""
GOOD = {"short": "rewards:short", "vowels": "rewards:vowels"}


@pytest.fixture
def config(
    paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    Path("rewards.py").write_text(REWARDS)
    Path("prompts.txt").write_text("a b c\nd\n")
    return {
        "models": dict(paths),
        "methods": {
            "blend": "base + w_short * (tuned - base) + w_vowels * (ref - base)",
            "mod": "w_short * tuned + w_vowels * ref",
        },
        "rewards": dict(GOOD),
        "prompts": "prompts.txt",
        "weights": 3,
        "kl_to": "base",
        "reference": {"short": -9, "vowels": -1},
        "generation": {"max_new_tokens": 4, "do_sample": True},
    }


@pytest.fixture(scope="session")
def policy(paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a policy of both rewards over the base, in which each has its adapter."""
    folder = tmp_path_factory.mktemp("policies")
    for seed, name in enumerate(GOOD):
        model = lora(seed, loaded(paths["base"]), name)
        model.save_pretrained(folder, save_embedding_layers=False)
    adapters = {name: folder / name for name in GOOD}
    made = cf.ConditionedPolicy.from_adapters(loaded(paths["base"]), adapters)
    made.save(folder / "clp")
    return folder / "clp"


def pareto(config: Any, *options: str) -> int:
    text = config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False)
    Path("pareto.yaml").write_text(text)
    return cli.main(["pareto", "--config=pareto.yaml", "--output=out", *options])


def test_a_sweep_leaves_its_files_and_goes_on(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert pareto(config) == 0
    said = capsys.readouterr().out
    assert "blend: 3 points" in said
    assert "hypervolume of mod: " in said
    front = Front.load("out/front.json")
    assert [p["weights"]["short"] for p in front.points] == [0.0, 0.5, 1.0] * 2
    assert Path("out/front.png").stat().st_size > 1000
    assert "tap it" in Path("out/front.html").read_text()
    assert pareto(config) == 2
    assert "which has texts.jsonl; give --resume to go on" in capsys.readouterr().err
    written = Path("out/texts.jsonl").read_bytes()
    assert pareto(config, "--resume", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["points"] == front.points
    assert found["hypervolume"]["mod"]["value"] > 0
    assert Path("out/texts.jsonl").read_bytes() == written
    assert pareto({**config, "seed": 1}, "--resume") == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err


def test_a_reward_model_scores_and_one_reward_is_drawn_over_its_weight(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    config["rewards"] = {"good": save_reward_model(tmp_path / "good")}
    config["methods"] = {"dera": "(1 - w_good) * base + w_good * (0.5 * tuned + 0.5 * ref)"}
    config["weights"] = [{"good": 0.0}, {"good": 1.0}]
    del config["reference"], config["kl_to"]
    config["prompts"] = ["a b", "c"]
    assert pareto(config) == 0, capsys.readouterr().err
    assert len(Front.load("out/front.json").whole("dera")) == 2


def test_policies_are_methods(
    config: dict[str, Any], policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy that is saved, the same adapters as a soup, and a formula with it."""
    pytest.importorskip("matplotlib")
    base = config["models"]["base"]
    config["models"] = {
        "base": base,
        "kind": f"{base}@{policy / 'short'}",
        "clp": f"{base}@{policy}",
        "soup": {name: f"{base}@{policy / name}" for name in GOOD},
    }
    config["methods"] = {
        "clp": "clp",
        "soup": "soup",
        "dera": "(1 - w_kl) * kind + w_kl * base",
        "more": "base + 2 * (clp - base)",
    }
    config["weights"] = [
        {"short": 0.5, "vowels": 0.5, "kl": 0.0},
        {"short": 1.0},
        {"vowels": 0.5, "kl": 0.5},
        {"kl": 1.0},
    ]
    config["reference"]["kl"] = -9
    assert pareto(config) == 0, capsys.readouterr().err
    front = Front.load("out/front.json")
    assert front.rewards == ("short", "vowels", "kl")
    clp, soup, dera, more = (front.texts[4 * i : 4 * i + 4] for i in range(4))
    assert clp == soup
    assert (clp[1], clp[3], clp[3]) == (dera[1], dera[3], more[3])
    assert clp[:3] != more[:3]


def test_searches_are_methods(
    config: dict[str, Any], policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    base = config["models"]["base"]
    config["models"] = {"base": base, "clp": f"{base}@{policy}"}
    config["methods"] = {
        "base": "base",
        "best": {"blend": "base", "best_of": 4},
        "shortest": {"blend": "base", "tournament": 4, "value": "short"},
        "searched": {"blend": "clp", "search": [2, 2, 2], "value": "clp - base", "top_k": 20},
    }
    config["weights"] = [{"short": 1.0}, {"vowels": 1.0}]
    assert pareto(config) == 0, capsys.readouterr().err
    front = Front.load("out/front.json")
    base, best, shortest, _ = (front.points[2 * i : 2 * i + 2] for i in range(4))
    assert best[0]["rewards"] == shortest[0]["rewards"] == shortest[1]["rewards"]
    assert best[0]["rewards"]["short"] > base[0]["rewards"]["short"]
    assert best[1]["rewards"]["vowels"] > base[1]["rewards"]["vowels"]


def soup(**adapters: Any) -> dict[str, Any]:
    return {"models": {"soup": adapters}, "methods": {"a": "soup"}}


def of(**method: Any) -> dict[str, Any]:
    return {"methods": {"a": method}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": {"short": GOOD["short"], "other": GOOD["vowels"]}},
         "models.clp is a policy of short, vowels, and 'other' is weighed; the rewards must"),
        ({"models": {"clp": "base@nowhere"}}, "the guide is 'nowhere'; it must be a folder"),
        ({"weights": [{"short": 0.5}]}, "methods['a'] at short=0.5, vowels=0: weights sum to 0.5"),
        ({"policies": {"clp": "base@clp"}}, "'policies'; .*; a policy is one of the models, as"),
        ({"kl_to": "clp"}, "kl_to has 'clp', a policy, which follows the weights"),
        (soup(short="base@clp/short"), "models.soup is a policy of short, and 'vowels' is weighed"),
        (soup(shrt="base@clp/short"), "models.soup has 'shrt'; .*; did you mean 'short'?"),
        (soup(short="base@clp/short", vowels="tuned@clp/vowels"),
         "models.soup has 'short' over 'base' and 'vowels' over 'tuned'; the adapters"),
        (soup(short="base", vowels="tuned"), "models.soup.short is 'base'; it must be BASE@ADAP"),
        (soup(short="base@clp"), "the guide is 'clp', a conditioned policy"),
        (soup(short=3), "models.soup.short is 3; it must be a text"),
        (soup(), "models.soup is {}; it must be"),
        ({"methods": {"a": [1]}}, "methods.a is [1]; it must be a text"),
        ({"methods": {"a": "w_kl * clp"}}, "methods.a has the unknown name 'w_kl'"),
        (of(best_of=4), "methods.a.blend is None; it must be a formula"),
        (of(blend="clp", best_of=0), "methods.a.best_of: n is 0; it must be at least 1"),
        (of(blend="clp", search=4), "methods.a.search is 4; it must be three numbers"),
        (of(blend="clp", search=[4, 4, "5"]), "methods.a.search: chunk_length is '5'"),
        (of(blend="clp", value="short"), "methods.a.value is given without best_of, tournament or"),
        (of(blend="clp", best_of=2, search=2), "methods.a has best_of and search, two searches"),
        (of(blend="clp", best_of=2, value="shrt"), "unknown name 'shrt' .*did you mean 'short'?"),
        (of(blend="clp", best_of=2, value="clp"), "methods.a.value: value is clp; it must be"),
        (of(blend="clp", seed=2), "methods.a.seed is given; it must be the key seed"),
    ],
)  # fmt: skip
def test_mistakes_with_policies_are_named(
    change: dict[str, Any],
    message: str,
    config: dict[str, Any],
    policy: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    for name, place in {**config["models"], "clp": policy}.items():
        Path(name).symlink_to(place)
    config |= {"models": {"clp": "base@clp"}, "methods": {"a": "clp"}}
    config |= {"kl_to": None, "reference": None}
    check(config | change, message, capsys)


def check(config: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Require that the parts of a message between ``.*`` are said, one after the other."""
    assert pareto(config) == 2
    error = capsys.readouterr().err
    at = 0
    for part in message.split(".*"):
        at = error.find(part, at)
        assert at >= 0, error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, "has the key 'model'; the keys are .*; did you mean 'models'?"),
        ({"max_new_tokens": 3}, "what generate takes goes under generation"),
        ({"rewards": None}, "rewards is None; it must be a mapping of names to texts"),
        ({"models": {"base": 3}}, "models.base is 3; it must be a text"),
        ({"methods": {"a": "base + w_shrt * tuned"}}, "methods.a has the unknown name 'w_shrt' "
         "(known: base, ref, tuned, w_short, w_vowels); did you mean 'w_short'?"),
        ({"methods": {"a": "base +"}}, "methods.a is 'base +', which is no formula"),
        ({"methods": {"a": "w_short * base"}}, "models.tuned is given, but no formula of methods"),
        ({"kl_to": "w_short * base"}, "kl_to has the unknown name 'w_short'"),
        ({"rewards": {**GOOD, "short": "rewards:shrt"}}, "rewards is 'short=rewards:shrt'"),
        ({"rewards": {**GOOD, "short": "nowhere"}}, "there is no folder 'nowhere'"),
        ({"generation": {"seed": 3}}, "generation.seed is given; it must be the key seed"),
        ({"generation": {"max_tokens": 3}}, "how many new tokens a response may have is"),
        ({"prompts": "none.txt"}, "there is no file 'none.txt'"),
        ({"prompts": []}, "prompts is []; it must be a file or a list of texts"),
        ({"weights": [{"shrt": 1}]}, "weights[0] has 'shrt'; the rewards are short, vowels"),
        ({"chat": "maybe"}, "chat is 'maybe'; it must be true or false"),
        ({"dtype": "half"}, "dtype is 'half'; it must be auto"),
        ({"reference": {"short": 1}}, "reference has no 'vowels'"),
    ],
)  # fmt: skip
def test_mistakes_in_the_settings_are_named(
    change: dict[str, Any],
    message: str,
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    check({**config, **change}, message, capsys)


def test_a_file_without_a_key_or_settings_is_named(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    del config["rewards"]
    assert pareto(config) == 2
    assert "pareto.yaml has no key 'rewards'" in capsys.readouterr().err
    for text, message in (("", "is empty"), ("[1]", "has a list at its top")):
        assert pareto(text) == 2
        assert message in capsys.readouterr().err
