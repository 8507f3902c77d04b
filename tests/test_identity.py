"""The id of a run is the same in every process, and changes with all that changes its tokens."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade import training
from crossfade.extras import old_names
from crossfade.identity import run_id
from tiny_models import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

SHAPE = {
    **{"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2},
}
GOOD = ["nice", "fine"]


def model(seed: int = 0, kind: Any = LlamaForCausalLM, **config: Any) -> Any:
    torch.manual_seed(seed)
    return kind(LlamaConfig(**SHAPE, **config)).eval()


def lora(seed: int = 0, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    with old_names():
        return peft.get_peft_model(model(), config).eval()


def count(word: str, prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(text.count(word)) for text in responses]


def good(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(sum(text.count(word) for word in GOOD)) for text in responses]


def counts(word: Any) -> Callable[..., list[float]]:
    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        return [float(text.count(word)) for text in responses]

    return reward


class Counter:
    def __init__(self, word: str) -> None:
        self.word = word

    def __call__(self, prompts: list[Any], responses: list[str]) -> list[float]:
        return count(self.word, prompts, responses)


def search(value: Any, **options: Any) -> cf.ChunkBeamSearch:
    return cf.ChunkBeamSearch(2, 2, 3, value, **options)


def of(blend: Any, **parts: Any) -> str:
    return run_id(blend=cf.parse("a", a=blend) if isinstance(blend, cf.Model) else blend, **parts)


@torch.no_grad()
def touched(x: Any, name: str, place: int = -1) -> Any:
    """A copy of a model in which one number of one weight is the next larger one."""
    changed = copy.deepcopy(x)
    weight = changed.get_parameter(name).view(-1)
    weight[place] = torch.nextafter(weight[place], torch.tensor(9.0))
    return changed


def weights_of_row(row: list[float]) -> Any:
    a, b = cf.Model(model(), name="a"), cf.Model(model(1), name="b")
    return a + torch.tensor(row) * b


def with_hook() -> Any:
    steered = model()
    steered.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    return cf.Model(steered)


def with_scale(scale: float) -> Any:
    tuned = lora()
    for module in tuned.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)
    return cf.Model(tuned)


def with_template(template: str | None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return cf.Model(model(), tokenizer=tokenizer)


def with_token(token: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([token])
    return cf.Model(model(), tokenizer=tokenizer)


def with_saved(**settings: Any) -> Any:
    saved = model()
    saved.generation_config.update(**settings)
    return cf.Model(saved)


def reward_model(seed: int = 0, **options: Any) -> Any:
    scorer = model(seed, LlamaForSequenceClassification, num_labels=3)
    options = {"label": 1, "tokenizer": make_tokenizer(), **options}
    return cf.RewardModel(scorer, **options)


# Pairs of runs, of which the second writes other tokens than the first.
CHANGES: dict[str, Callable[[], tuple[dict[str, Any], dict[str, Any]]]] = {
    "a weight": lambda: (
        {"blend": cf.Model(model())},
        {"blend": cf.Model(touched(model(), "model.layers.1.mlp.down_proj.weight"))},
    ),
    "a LoRA's weight": lambda: (
        {"blend": cf.Model(lora())},
        {
            "blend": cf.Model(
                touched(
                    lora(), "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"
                )
            )
        },
    ),
    "a LoRA's alpha": lambda: (
        {"blend": cf.Model(lora())},
        {"blend": cf.Model(lora(lora_alpha=99))},
    ),
    "a LoRA's scale": lambda: ({"blend": with_scale(1.0)}, {"blend": with_scale(2.0)}),
    "the adapter": lambda: (
        {"blend": cf.Model(lora(), adapter="default")},
        {"blend": cf.Model(lora(), adapter=None)},
    ),
    "a hook": lambda: ({"blend": cf.Model(model())}, {"blend": with_hook()}),
    "the config": lambda: (
        {"blend": cf.Model(model())},
        {"blend": cf.Model(model(rms_norm_eps=1e-3))},
    ),
    "the dtype": lambda: (
        {"blend": cf.Model(model())},
        {"blend": cf.Model(model().to(torch.bfloat16))},
    ),
    "saved settings": lambda: (
        {"blend": cf.Model(model())},
        {"blend": with_saved(do_sample=True, temperature=0.7)},
    ),
    "the chat template": lambda: ({"blend": with_template("a")}, {"blend": with_template("b")}),
    "the vocabulary": lambda: ({"blend": with_token("x")}, {"blend": with_token("y")}),
    "the system prompt": lambda: (
        {"blend": cf.Model(model(), system="x")},
        {"blend": cf.Model(model(), system="y")},
    ),
    "a prompt": lambda: (
        {"blend": cf.Model(model(), prompt=lambda p: "x" + p)},
        {"blend": cf.Model(model(), prompt=lambda p: "y" + p)},
    ),
    "a blend's weight": lambda: (
        {"blend": weights_of_row([1.0, 2.0])},
        {"blend": weights_of_row([1.0, 3.0])},
    ),
    "the seed": lambda: ({"seed": 1}, {"seed": 2}),
    "a setting": lambda: ({"generation": {"top_k": 3}}, {"generation": {"top_k": 4}}),
    "a setting's kind": lambda: ({"generation": {"top_p": None}}, {"generation": {}}),
    "a reward's code": lambda: (
        {"search": search(cf.Reward(counts("x")))},
        {"search": search(cf.Reward(lambda prompts, responses: [0.0] * len(prompts), name="r"))},
    ),
    "what a reward closes over": lambda: (
        {"search": search(cf.Reward(counts("x")))},
        {"search": search(cf.Reward(counts("y")))},
    ),
    "a list that a reward closes over": lambda: (
        {"search": search(cf.Reward(counts(["x"])))},
        {"search": search(cf.Reward(counts(["y"])))},
    ),
    "a reward's argument": lambda: (
        {"search": search(cf.Reward(functools.partial(count, "x")))},
        {"search": search(cf.Reward(functools.partial(count, "y")))},
    ),
    "a reward's attribute": lambda: (
        {"search": search(cf.Reward(Counter("x")))},
        {"search": search(cf.Reward(Counter("y")))},
    ),
    "a reward's object": lambda: (
        {"search": search(cf.Reward(Counter("x").__call__))},
        {"search": search(cf.Reward(Counter("y").__call__))},
    ),
    "a value's weight": lambda: (
        {"search": search(1.0 * cf.Reward(counts("x")))},
        {"search": search(2.0 * cf.Reward(counts("x")))},
    ),
    "a reward model's weights": lambda: (
        {"search": search(reward_model())},
        {"search": search(reward_model(1))},
    ),
    "a reward model's label": lambda: (
        {"search": search(reward_model())},
        {"search": search(reward_model(label=2))},
    ),
    "a reward model's template": lambda: (
        {"search": search(reward_model(template=lambda p, r: f"{p} {r}"))},
        {"search": search(reward_model(template=lambda p, r: f"{p}\n{r}"))},
    ),
    "a value head": lambda: (
        {"search": search(cf.ValueHead(model(3)))},
        {"search": search(cf.ValueHead(model(4)))},
    ),
    "a log-ratio's model": lambda: (
        {"search": search(cf.LogRatio(model(1), model(2)))},
        {"search": search(cf.LogRatio(model(1), model(3)))},
    ),
    "a log-ratio's beta": lambda: (
        {"search": search(cf.LogRatio(model(1), model(2)))},
        {"search": search(cf.LogRatio(model(1), model(2), beta=2))},
    ),
    "a chunk's end": lambda: (
        {"search": search(cf.Reward(good), chunk_end=lambda text: text.endswith("."))},
        {"search": search(cf.Reward(good), chunk_end=lambda text: text.endswith("!"))},
    ),
    "a search's width": lambda: (
        {"search": cf.BestOfN(2, cf.Reward(good))},
        {"search": cf.BestOfN(3, cf.Reward(good))},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_tokens_changes_the_run(name: str) -> None:
    one, other = CHANGES[name]()
    again, _ = CHANGES[name]()
    assert run_id(**one) == run_id(**again)
    assert run_id(**one) != run_id(**other)


def test_what_a_function_reads_from_its_module_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_id(value=cf.Reward(good))
    assert run_id(value=cf.Reward(good)) == before
    monkeypatch.setitem(globals(), "GOOD", ["bad"])
    assert run_id(value=cf.Reward(good)) != before
    before = run_id(value=cf.Reward(Counter("x")))
    monkeypatch.setitem(globals(), "count", lambda word, prompts, responses: [])
    assert run_id(value=cf.Reward(Counter("x"))) != before


def test_what_changes_no_token_changes_no_run(tmp_path: Path) -> None:
    """The id is the same for a model from another place, after a call, and after padding."""
    own, tokenizer = model(), make_tokenizer()
    before = run_id(blend=cf.Model(own, tokenizer=tokenizer, name="a"))
    own.save_pretrained(tmp_path / "one")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "one").eval()
    loaded.generation_config = own.generation_config
    tokenizer(["a", "a a"], padding=True, truncation=True, max_length=9)
    term = cf.Model(loaded, tokenizer=tokenizer, name="a")
    cf.generate(term, [[3, 4]], max_new_tokens=2, do_sample=False)
    assert run_id(blend=term) == before


def test_what_cannot_be_told_apart_is_refused_by_name() -> None:
    lock = threading.Lock()

    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        with lock:
            return [0.0] * len(responses)

    with pytest.raises(TypeError, match=r"^'lock' in fn of .* of search is or holds"):
        run_id(search=search(cf.Reward(reward)))
    with pytest.raises(ValueError, match=r"embed_tokens.weight of .* on the device meta"):
        run_id(blend=cf.Model(model().to("meta")))


def test_weights_that_are_shared_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    base = model()
    sizes: list[int] = []
    sha256 = hashlib.sha256

    class Counting:
        def __init__(self, data: bytes = b"") -> None:
            self.digest = sha256(data)

        def update(self, data: Any) -> None:
            sizes.append(data.nbytes)
            self.digest.update(data)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    monkeypatch.setattr("crossfade.identity.hashlib.sha256", Counting)
    head = cf.ValueHead(training.value_model(base, rank=2))
    run_id(blend=cf.Model(base), search=search(head))
    own = sum(p.nbytes for p in base.parameters())
    heads = 4 * 2 * (SHAPE["vocab_size"] + SHAPE["hidden_size"])
    assert own <= sum(sizes) <= own + heads + 4096  # the rest is buffers, and a list or two


def test_loops_of_objects_end() -> None:
    a: list[Any] = [1]
    a.append(a)
    assert run_id(x=a) == run_id(x=copy.deepcopy(a))


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import test_identity as t
from crossfade.identity import run_id
print(*(run_id(**t.CHANGES[name]()[0]) for name in t.CHANGES))
"""


def test_another_process_finds_the_same_runs() -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    import test_identity as imported  # the name of the module in the other process

    found = [run_id(**change()[0]) for change in imported.CHANGES.values()]
    assert done.stdout.split() == found
    assert json.dumps(found)
