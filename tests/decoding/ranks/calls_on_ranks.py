"""Calls of models that are whole, or in shards on the ranks of torchrun, and what they give.

``torchrun --nproc_per_node 2 calls_on_ranks.py FOLDER`` runs all of them in shards, and writes what
rank i gets to ``rank<i>.json``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import crossfade as cf
import torch
from crossfade.decoding import ranks
from peft import PeftModel
from tiny_models import lora
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCAB = 1004  # four groups of 256 tokens, of which shards have two and a part of another
OTHER = 1010  # a head with other columns on each rank, of which all but VOCAB are padding
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS = [[5, 9, 100], [7, 300, 8, 8, 21, 4], [900, 2]]
WRITE: dict[str, Any] = {"max_new_tokens": 9, "seed": 3, "do_sample": True, "temperature": 1.3}
WRITE |= {"eos_token_id": 1, "pad_token_id": 0}

Load = Callable[[str], Any]


def write_models(folder: Path) -> None:
    """Three small models with logits that are spread."""
    for seed, (name, size, vocab) in enumerate(
        [("base", 32, VOCAB), ("guide", 16, VOCAB), ("other", 16, OTHER)]
    ):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=size,
            intermediate_size=2 * size,
            tie_word_embeddings=False,
            **SIZES,
        )
        model = LlamaForCausalLM(config)
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.5 if weight.shape[0] >= VOCAB else 0.2)
        model.save_pretrained(folder / name)
    model = lora(1, whole(folder)("base"), "gloomy")
    lora(2, model, "happy").save_pretrained(folder)


def whole(folder: Path) -> Load:
    return lambda name: LlamaForCausalLM.from_pretrained(folder / name).eval()


def in_shards(folder: Path) -> Load:
    from transformers.distributed import DistributedConfig

    def load(name: str) -> PreTrainedModel:
        config = DistributedConfig(tp_size=2)
        return LlamaForCausalLM.from_pretrained(folder / name, distributed_config=config).eval()

    return load


def written(out: Any) -> dict[str, Any]:
    """What a call gave, as JSON."""
    numbers = {n: getattr(out, n) for n in ("logprobs", "sampled_logprobs", "term_logprobs", "kl")}
    return {
        "tokens": [list(map(int, ids)) for ids in out.responses],
        "numbers": {n: x.tolist() for n, x in numbers.items() if x is not None},
        "notes": list(out.stats.notes),
    }


def each_call(load: Load, folder: Path) -> dict[str, Callable[[], Any]]:
    """The calls, by name. Each runs over a base and a guide."""
    base, guide = load("base"), load("guide")
    blend = 1.5 * cf.Model(base, name="base") - 0.5 * cf.Model(guide, name="guide")
    simple = cf.Engine(simple=True)

    def write(which: Any = blend, **options: Any) -> Callable[[], Any]:
        return lambda: written(cf.generate(which, PROMPTS, **{**WRITE, **options}))

    def of_one_whole_model() -> Any:
        return write(1.5 * cf.Model(base) - 0.5 * cf.Model(whole(folder)("guide")))()

    def of_other_columns() -> Any:
        return write(1.2 * cf.Model(base) - 0.2 * cf.Model(load("other")))()

    def of_adapters() -> Any:
        model = PeftModel.from_pretrained(load("base"), folder / "happy", adapter_name="happy")
        model.load_adapter(folder / "gloomy", "gloomy")
        happy, gloomy = (cf.Model(model.eval(), adapter=name) for name in ("happy", "gloomy"))
        return write(happy - 0.5 * gloomy)()

    def of_fsdp() -> Any:
        from torch.distributed import is_initialized
        from torch.distributed.fsdp import fully_shard

        model = whole(folder)("base")
        return write(cf.Model(fully_shard(model) if is_initialized() else model))()

    def by_hook(seed: int | None = 3) -> Any:
        ids = torch.tensor(PROMPTS[:1])
        options = {**WRITE, "seed": seed, "custom_generate": cf.decode, "blend": blend}
        found = base.generate(ids, **options, return_dict_in_generate=True)
        return {"tokens": found.sequences.tolist(), "numbers": {}, "notes": []}

    def from_cache() -> Any:
        first = cf.generate(blend, PROMPTS[:1], **WRITE, return_cache=True)
        on = [*PROMPTS[0], *map(int, first.responses[0]), 7]
        return written(cf.generate(blend, [on], **WRITE, cache=first.cache))

    def scored() -> Any:
        scores = cf.score(blend, PROMPTS, [[5, 6], [7], [800, 9]])
        return {"tokens": [], "numbers": {"logprobs": scores.logprobs.tolist()}, "notes": []}

    mean = cf.power_mean([cf.Model(base), cf.Model(guide)], [0.5, 0.5], 1.0)
    weights = torch.tensor([1.0, 0.5, 0.0])
    values = cf.LogRatio(base, guide, beta=0.3)
    calls: dict[str, Callable[[], Any]] = {
        "sampled": write(),
        "one model": write(cf.Model(base)),
        "greedy": write(do_sample=False, temperature=None),
        "truncated": write(top_k=40, top_p=0.9, min_p=0.01),
        "nucleus": write(top_p=0.97),
        "log-probs of terms": write(return_term_logprobs=True),
        "a support": write(blend.within(cf.Support(top_k=30))),
        "a power mean": write(mean),
        "weights of requests": write(cf.Model(base) + weights * cf.Model(guide)),
        "several samples": write(num_return_sequences=3),
        "a search": write(search=cf.ChunkBeamSearch(2, 2, 3, values)),
        "a processor": write(repetition_penalty=1.3),
        "one whole model": of_one_whole_model,
        "other columns": of_other_columns,
        "the simple path": write(engine=simple),
        "a draft": write(draft=cf.Draft("prompt")),
        "adapters": of_adapters,
        "shards of FSDP": of_fsdp,
        "a cache": from_cache,
        "scores": scored,
        "Hugging Face's generate": by_hook,
    }
    return calls


def mistakes(load: Load, folder: Path, rank: int) -> dict[str, Callable[[], Any]]:
    """What must be refused, or the ranks would wait for each other."""
    base = load("base")
    model = cf.Model(base, name="base")

    def write(prompts: Any = PROMPTS, which: Any = model, **options: Any) -> Callable[[], Any]:
        return lambda: cf.generate(which, prompts, **{**WRITE, **options})

    def of_fsdp() -> Any:
        from torch.distributed.fsdp import FullyShardedDataParallel

        guide = whole(folder)("guide")
        return cf.Model(
            FullyShardedDataParallel(guide, device_id=torch.device("cpu")), name="guide"
        )

    def score(last: int, **options: Any) -> Callable[[], Any]:
        return lambda: cf.score(model, PROMPTS, [[5], [6], [last]], **options)

    return {
        "other requests": write(PROMPTS[rank:]),
        "other seeds": write(seed=rank),
        "other settings": write(temperature=1.0 + rank),
        "other blends": write(which=cf.power_mean([model], [1.0], 1.0 + rank)),
        "other engines": write(engine=cf.Engine(simple=rank == 1)),
        "other batches": write(max_batch=1 + rank),
        "processors on one": write(logits_processor=[lambda ids, scores: scores] * rank),
        "a seed on one": write(seed=rank or None),
        "a bad setting on one": write(temperature=1.0 - 2 * rank),
        "a bad response on one": score([6, VOCAB][rank]),
        "a time limit": write(max_time=60.0),
        "other responses": score(5 + rank),
        "other batches of scores": score(5, max_batch=1 + rank),
        "shards that are quantised": lambda: cf.quantize(base),
        "a wrapper of FSDP": lambda: cf.generate(of_fsdp(), PROMPTS, **WRITE),
        "a session": lambda: cf.Session({"base": model}),
    }


def run(load: Load, folder: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: call() for name, call in each_call(load, folder).items()}


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it ran"


def gathers(load: Load) -> dict[str, Any]:
    """What a call sends between ranks at each step, once the engine knows its models."""
    from torch import distributed

    blend = 1.5 * cf.Model(load("base")) - 0.5 * cf.Model(load("guide"))
    cf.generate(blend, PROMPTS, **WRITE)
    sent: list[int] = []
    gather, whole_rows = distributed.all_gather, ranks.Shard.gathered

    def counted(each: Any, own: Any, *args: Any) -> Any:
        sent.append(own.nbytes)
        return gather(each, own, *args)

    def refused(*_: Any) -> Any:
        raise AssertionError("whole rows of logits were gathered")

    distributed.all_gather, ranks.Shard.gathered = counted, refused
    found = {}
    for name, options in {"plain": {}, "top-k": {"top_k": 20}}.items():
        sent.clear()
        out = cf.generate(blend, PROMPTS, **{**WRITE, **options, "eos_token_id": None})
        found[name] = {"bytes": list(sent), "notes": list(out.stats.notes)}
    distributed.all_gather, ranks.Shard.gathered = gather, whole_rows
    return found


def without_a_seed(load: Load) -> list[Any]:
    """What ranks draw by `generate` and by Hugging Face's, with generators of their own."""
    torch.manual_seed(torch.distributed.get_rank())
    base = load("base")
    options = {**WRITE, "seed": None}
    out = cf.generate(cf.Model(base), PROMPTS, **options)
    options |= {"custom_generate": cf.decode, "blend": cf.as_blend(base)}
    return [out.sequences.tolist(), base.generate(torch.tensor(PROMPTS[:1]), **options).tolist()]


def printed_by_the_page(folder: Path) -> str:
    """What the script of docs/tensor-parallel.md prints on this rank, which is there already."""
    page = (Path(__file__).parents[3] / "docs" / "tensor-parallel.md").read_text()
    script = folder / f"write{os.environ['RANK']}.py"
    script.write_text(page.split("```python write.py\n")[1].split("```")[0])
    sys.argv = [str(script), str(folder / "guide"), str(folder / "base")]
    group = ("init_process_group", "destroy_process_group")
    there = patch.multiple(torch.distributed, **dict.fromkeys(group, lambda *_: None))
    with there, contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(script), run_name="__main__")
    return printed.getvalue()


def main(folder: Path) -> None:
    from torch import distributed

    distributed.init_process_group("gloo")
    rank, load = distributed.get_rank(), in_shards(folder)
    found: dict[str, Any] = {"calls": run(load, folder), "gathers": gathers(load)}
    found["without a seed"] = without_a_seed(load)
    found["mistakes"] = {n: refusal(call) for n, call in mistakes(load, folder, rank).items()}
    found["the page's script"] = printed_by_the_page(folder)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
