"""Models that options name: adapters and heads share weights, and what is unsafe is refused."""

from __future__ import annotations

import json
from pathlib import Path

import crossfade as cf
import pytest
import torch
from crossfade import cli
from crossfade.bulk import records
from word_models import PROMPTS, WORDS, loaded, save_model


def test_inspect_prints_the_formula_and_counts_shared_weights_once(paths, run) -> None:
    one = f"--model=a={paths['base']}", f"--model=b={paths['base']}", f"--model=c={paths['ref']}"
    argv = ["inspect", *one, "--blend", "a + 2 * (b - c) / 4", "--system", "b=x"]
    text = run(*argv, lines=False)
    assert text.splitlines()[0] == "a + 0.5*b - 0.5*c"
    assert "2 models" in text
    (found,) = run(*argv, "--json")
    assert found["formula"] == "a + 0.5*b - 0.5*c"
    assert [m["names"] for m in found["models"]] == [["a", "b"], ["c"]]
    assert [t["system"] for t in found["blend"]["terms"]] == [None, "x", None]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_over_one_base_share_it(paths, run, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(9)
    for name in ("one", "two"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(loaded(paths["base"]), config)
        adapted.save_pretrained(tmp_path / name)
    base = paths["base"]
    models = [
        f"--model=base={base}",
        *(f"--model={n}={base}@{tmp_path / n}" for n in ("one", "two")),
    ]
    (cost,) = run("inspect", *models, "--blend", "base + one + two", "--json")
    assert [m["names"] for m in cost["models"]] == [["base", "one", "two"]]

    greedy = ["--greedy", "--max-new-tokens", "8"]
    for name in ("one", "two", None):
        model = loaded(base)
        if name:
            model = peft.PeftModel.from_pretrained(model, tmp_path / name).eval()
        ids = torch.tensor([[WORDS.index(w) for w in "abc"]])
        expected = cf.generate(cf.Model(model), ids, do_sample=False, max_new_tokens=8)
        used = (
            "base + one + two - one - two" if name is None else f"{name} + 0*base + 0*one + 0*two"
        )
        found = run("generate", "a b c", *models, *greedy, "--blend", used)
        assert found[0]["logprob"] == pytest.approx(float(expected.logprobs.sum()), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:.* has left what its terms would write:UserWarning")
def test_value_heads_over_a_base(paths, run, tmp_path: Path) -> None:
    """A head is a term, or the value of a search, beside an adapter over the same weights."""
    peft = pytest.importorskip("peft")
    from crossfade import training

    torch.manual_seed(9)
    base, folder = loaded(paths["base"]), tmp_path / "head"
    head = training.value_model(base, "q", rank=2)
    torch.nn.init.normal_(head.get_output_embeddings().b)
    training.save_value_head(head, folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(loaded(paths["base"]), config).save_pretrained(tmp_path / "tuned")
    tuned = peft.PeftModel.from_pretrained(loaded(paths["base"]), tmp_path / "tuned").eval()
    terms = {
        "base": cf.Model(base, name="base"),
        "tuned": cf.Model(tuned, name="tuned"),
        "v": cf.ValueHead(head, name="v"),
    }
    options = [f"--model=v={paths['base']}@{folder}", f"--model=base={paths['base']}"]
    options += [f"--model=tuned={paths['base']}@{tmp_path / 'tuned'}", "--max-new-tokens=6"]
    ids = [[WORDS.index(w) for w in p.split()] for p in PROMPTS]

    found = run("generate", *PROMPTS, *options, "--greedy", "--blend=base + 2*v + 0*tuned")
    out = cf.generate(terms["base"] + 2 * terms["v"], ids, do_sample=False, max_new_tokens=6)
    assert [r["logprob"] for r in found] == pytest.approx(out.logprobs.sum(dim=1).tolist())

    value = 0.5 * terms["v"] + cf.LogRatio(terms["tuned"], terms["base"])
    search = cf.BestOfN(4, value)
    seeds = [records.seed_of(0, i) for i in range(4)]
    out = cf.generate(terms["base"], ids, search=search, seed=seeds, max_new_tokens=6)
    search_options = ["--best-of=4", "--blend=base", "--value=0.5*v + tuned - base"]
    found = run("generate", *PROMPTS, *options, *search_options)
    assert [r["tokens"] for r in found] == out.lengths.tolist()
    assert [r["value"] for r in found] == pytest.approx(out.values.tolist(), abs=1e-4)


def test_models_of_different_vocabularies_are_refused(
    tmp_path: Path, paths, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_model(tmp_path / "other", 0, [*WORDS[:10], "other", *WORDS[11:]])
    models = [f"--model=a={paths['base']}", f"--model=b={other}", "--blend", "a + b"]
    assert cli.main(["generate", "a", "--greedy", *models]) == 2
    assert "'other'" in capsys.readouterr().err


def test_pickled_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(save_model(tmp_path / "pickled", 0))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert cli.main(["generate", "a", f"--model={folder}"]) == 2
    assert "safetensors" in capsys.readouterr().err


def test_code_of_a_model_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(save_model(tmp_path / "remote", 0))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nC = M = None\n")
    assert cli.main(["generate", "a", f"--model={folder}"]) == 2
    assert not (tmp_path / "ran").exists()
