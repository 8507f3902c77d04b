"""Whatever is wrong with pairs or options of ``crossfade judge``, a sentence says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from crossfade import cli
from judge_pairs import LETTERS, PAIRS, write
from word_models import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("judge") / "model", 1, LETTERS)


MISTAKES: dict[str, tuple[list[Any], list[str], str]] = {
    "no answers": ([{"prompt": "a"}], [], 'pair 0 has no answers; it must have "first" and "secon'),
    "one answer": ([{"prompt": "a", "first": "b"}], [], 'pair 0 has no "second"; it must have'),
    "misspelt": (
        [{"prompt": "a", "chosen": "b", "rejcted": "c"}],
        [],
        "pair 0 has the unknown key 'rejcted'; did you mean 'rejected'?",
    ),
    "others' names": (
        [{"prompt": "a", "response_a": "b", "response_b": "c"}],
        [],
        "the unknown key 'response_a'; did you mean \"first\"?",
    ),
    "both forms": (
        [{"prompt": "a", "first": "b", "second": "c", "chosen": "b"}],
        [],
        "pair 0 has the answers first, second, chosen; it must have",
    ),
    "context": (
        [{"context": "a", "first": "b", "second": "c"}],
        [],
        "pair 0 has the unknown key 'context'; did you mean \"prompt\"?",
    ),
    "no prompt": ([{"first": "b", "second": "c"}], [], 'it must have a "prompt" or "messages"'),
    "a setting": (
        [{"prompt": "a", "first": "b", "second": "c", "seed": 1}],
        [],
        "pair 0 has the unknown key 'seed'; what is not for the models goes under",
    ),
    "a number": ([{"prompt": "a", "first": "b", "second": 3}], [], '"second" of pair 0 is 3; it'),
    "ids": (
        [{"prompt": [1], "first": "b", "second": "c"}],
        [],
        "the prompt of pair 0 is token ids",
    ),
    "a bad chat": (
        [{"prompt": [{"role": "user"}], "first": "b", "second": "c"}],
        [],
        "the prompt of pair 0, message 0, has the keys ['role']",
    ),
    "a question as an answer": (
        [{"prompt": "a", "first": [{"role": "user", "content": "b"}], "second": "c"}],
        [],
        "it must be a text or [one message of the assistant]",
    ),
    "chats that part too soon": (
        [
            {
                "chosen": [{"role": r, "content": "a"} for r in ("user", "assistant")],
                "rejected": [{"role": r, "content": "b"} for r in ("user", "assistant")],
            }
        ],
        [],
        "two answers that are chats; they must differ in the last message alone",
    ),
    "another prompt": (
        [
            {
                "prompt": "c",
                "chosen": [{"role": r, "content": "a"} for r in ("user", "assistant")],
                "rejected": [{"role": r, "content": "a"} for r in ("user", "assistant")],
            }
        ],
        [],
        'has a "prompt" that is not how its answers, which are chats, begin; leave it out',
    ),
    "no pair": ([], [], "there is nothing to judge: the input is empty"),
    "an empty prompt": (
        [{"prompt": "", "first": "b", "second": "c"}],
        [],
        'the "prompt" of pair 0 is empty',
    ),
    "template": (PAIRS, ["--template=hhh"], "did you mean 'hh'?"),
    "template's file": (PAIRS, ["--template=x.yaml"], "there is no file 'x.yaml'"),
    "template's keys": (
        PAIRS,
        ["--template={folder}/typo.yaml"],
        "typo.yaml: has the key 'label'; known ones are question, principle, ",
    ),
    "labels of two tokens": (
        PAIRS,
        ["--template={folder}/long.yaml"],
        "labels has 'a b', which is the tokens ['a', 'b'] after",
    ),
    "template that is a list": (PAIRS, ["--template={folder}/list.json"], "must have fields of a"),
    "principle": (
        PAIRS,
        ["--principle=helpfull"],
        "the template knows helpful, harmless, honest: another is given with its phrase, as "
        "NAME=PHRASE; did you mean 'helpful'?",
    ),
    "principle twice": (PAIRS, ["--principle=honest", "--principle=honest=x"], "given twice"),
    "principle of nothing": (PAIRS, ["--principle=x="], "it must be NAME or NAME=PHRASE"),
    "no chat template": (
        PAIRS,
        ["--model={bare}"],
        "is a model whose tokenizer has no chat template; a judge must have one",
    ),
    "a term's own prompt": (
        PAIRS,
        ["--blend=cfg(model, 2, negative_system='x')"],
        "with a system of its own; a judge's must have none, as its template is the prompt: "
        "system: in the file of --template",
    ),
    "a result's key": (PAIRS, ["--keep=orders"], "--keep is 'orders', which results have"),
    "resume what": (PAIRS, ["--resume"], "--resume is given without --output"),
    "no model": (PAIRS, ["--model="], "--model is ''; it must be NAME=PATH"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_a_sentence(model, capsys, tmp_path: Path, name: str) -> None:
    pairs, options, message = MISTAKES[name]
    (tmp_path / "typo.yaml").write_text("label: [a, b]\n")
    (tmp_path / "long.yaml").write_text("labels: [a b, c]\n")
    (tmp_path / "list.json").write_text("[]")
    bare = str(tmp_path / "bare")
    if any("{bare}" in x for x in options):
        save_model(tmp_path / "bare", 0, LETTERS, template="")
    given = [x.format(folder=tmp_path, bare=bare) for x in options]
    models = [] if any(x.startswith("--model") for x in given) else [f"--model={model}"]
    assert cli.main(["judge", write(tmp_path / "p.jsonl", pairs), *models, *given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_a_judge_has_no_system_prompt_of_an_option(model, capsys, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["judge", write(tmp_path / "p.jsonl", PAIRS), f"--model={model}", "--system=x"])
    assert "there is no option --system" in capsys.readouterr().err
