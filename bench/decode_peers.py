"""Who takes part in decode.py: crossfade, and what users write today instead.

The recipes sample from base + 0.8 (tuned - reference) as fast as plain code gets: no gradients,
logits of the last position only, keys and values cached, prompts without padding and so without
masks, and no look at the tokens while decoding.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import crossfade as cf
import torch
from crossfade.progress import OnStep
from reports import OURS
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.generation import logits_process as hf

WEIGHTS = (1.0, 0.8, -0.8)
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_8B = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False, rope_theta=5e5,
)  # fmt: skip
LLAMA_1B = LlamaConfig(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, rope_theta=5e5,
)  # fmt: skip
TINY = LlamaConfig(
    vocab_size=509, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.2,
)  # fmt: skip

Forward = Callable[[Tensor], list[Tensor]]  # new ids [B, n]: each term's logits [B, V]
Tick = Callable[[], object]  # a run that is given one calls it at every token


class Run(Protocol):
    """Decodes `new` tokens after prompts ``[B, n]``, sampled or greedy."""

    def __call__(
        self, ids: Tensor, new: int, sample: bool, tick: Tick | None = None
    ) -> Tensor | cf.Output: ...


class Recipe:
    """A loop over `start()`, which gives the forward of all terms with empty caches."""

    def __init__(self, start: Callable[[], Forward], weights: Sequence[float] = WEIGHTS) -> None:
        self.start, self.weights = start, weights
        self.warpers = hf.LogitsProcessorList(
            [
                hf.TemperatureLogitsWarper(SAMPLING["temperature"]),
                hf.TopKLogitsWarper(SAMPLING["top_k"]),
                hf.TopPLogitsWarper(SAMPLING["top_p"]),
            ]
        )

    def blend(self, logits: Sequence[Tensor]) -> Any:
        terms = zip(self.weights, logits, strict=True)
        return sum(w * z.float().log_softmax(-1) for w, z in terms)

    def probabilities(self, ids: Tensor, logits: Sequence[Tensor]) -> Tensor:
        return self.warpers(ids, self.blend(logits)).softmax(-1)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, new: int, sample: bool, tick: Tick | None = None) -> Tensor:
        """New tokens ``[B, new]`` after prompts ``[B, n]``."""
        forward = self.start()
        tokens = []
        for _ in range(new):
            logits = forward(ids)
            if sample:
                ids = torch.multinomial(self.probabilities(ids, logits), 1)
            else:
                ids = self.blend(logits).argmax(-1, keepdim=True)
            tokens.append(ids)
            if tick is not None:
                tick()
        return torch.cat(tokens, dim=1)


def last(model: Any, ids: Tensor, cache: DynamicCache, **arguments: Any) -> Tensor:
    """Logits ``[B, V]`` after `ids`, which the cache takes in."""
    output = model(
        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments
    )
    return output.logits[:, -1]


def three_forwards(models: Sequence[Any]) -> Recipe:
    """Separate models, one after the other."""

    def start() -> Forward:
        caches = [DynamicCache(config=m.config) for m in models]
        return lambda ids: [last(m, ids, c) for m, c in zip(models, caches, strict=True)]

    return Recipe(start)


def switched_adapters(peft_model: Any, adapters: Sequence[str]) -> Recipe:
    """One PEFT model without adapters, then with each, one after the other."""

    def start() -> Forward:
        caches = [DynamicCache(config=peft_model.config) for _ in WEIGHTS]

        def forward(ids: Tensor) -> list[Tensor]:
            with peft_model.disable_adapter():
                logits = [last(peft_model, ids, caches[0])]
            for adapter, cache in zip(adapters, caches[1:], strict=True):
                peft_model.set_adapter(adapter)
                logits.append(last(peft_model, ids, cache))
            return logits

        return forward

    return Recipe(start)


def mixed_batch(peft_model: Any, adapters: Sequence[str]) -> Recipe:
    """One PEFT model, its adapters as rows of one forward: `adapter_names`."""
    members = ["__base__", *adapters]

    def start() -> Forward:
        cache = DynamicCache(config=peft_model.config)

        def forward(ids: Tensor) -> list[Tensor]:
            names = [m for m in members for _ in ids]
            rows = ids.repeat(len(members), 1)
            return list(last(peft_model, rows, cache, adapter_names=names).chunk(len(members)))

        return forward

    return Recipe(start)


def hugging_face(model: Any) -> Run:
    """`model.generate`, greedy."""

    def run(ids: Tensor, new: int, sample: bool, tick: Tick | None = None) -> Tensor:
        sequences = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
            streamer=tick and OnStep(tick),
        )  # fmt: skip
        return sequences[:, ids.shape[1] :]

    return run


@dataclass(frozen=True)
class Contest:
    """Contenders for one blend.

    The greedy tokens of the first one are the truth; if it is a `Recipe`, so are its probabilities.

    Attributes:
        models: those that a step reads.
        rows: of the caches, for each request.
        tolerance: in nats.
    """

    name: str
    blend: Any
    runs: dict[str, Run]
    models: Sequence[Any]
    rows: int = 1
    sample: bool = True
    tolerance: float = 0.01

    @property
    def weights(self) -> list[Tensor]:
        return [w for model in self.models for w in weights_of(model)]

    def bytes(self, batch: int, tokens: int) -> int:
        """The bytes that a step has to read: weights, and the live keys and values."""
        caches = self.rows * batch * tokens * sum(map(bytes_of_a_token, self.models))
        return sum(w.nbytes for w in self.weights) + caches


def weights_of(model: Any) -> list[Tensor]:
    """The weights that a step reads: of an embedding all, where it is the head too, else a row."""
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    return [p for p in model.parameters() if tied or p is not embedding]


def bytes_of_a_token(model: Any) -> int:
    c = model.config
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return 2 * c.num_hidden_layers * c.num_key_value_heads * head * model.dtype.itemsize


def ours(blend: Any, **options: Any) -> Run:
    def run(ids: Tensor, new: int, sample: bool, tick: Tick | None = None) -> cf.Output:
        return cf.generate(
            blend, ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=sample,
            seed=0, max_batch=len(ids), progress=False, engine=cf.Engine(**options),
            streamer=tick and OnStep(tick),
            **(SAMPLING if sample else {}),
        )  # fmt: skip

    return run


def random_model(config: LlamaConfig, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return unending(model)


def unending(model: Any) -> Any:
    """A model whose rows end at their limit and nowhere else."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def perturbed(model: Any, seed: int) -> Any:
    """A copy with weights of its own."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * (0.1 * p.std() if p.numel() > 1 else 0))
    return other


def adapted(model: Any, rank: int) -> Any:
    """A PEFT model over the same weights, with two adapters that change what it says."""
    from peft import LoraConfig, get_peft_model

    base = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS, task_type="CAUSAL_LM")
    result: Any = get_peft_model(base, config, adapter_name="tuned")
    result.add_adapter("ref", config)
    torch.manual_seed(1)
    for name, p in result.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return result.eval()


def lora_contest(peft_model: Any, runs: dict[str, dict[str, Any]], tolerance: float) -> Contest:
    base, tuned, ref = (cf.Model(peft_model, adapter=a) for a in (None, "tuned", "ref"))
    blend = base + WEIGHTS[1] * (tuned - ref)
    contenders: dict[str, Run] = {
        "three forwards": switched_adapters(peft_model, ["tuned", "ref"]),
        "PEFT mixed batch": mixed_batch(peft_model, ["tuned", "ref"]),
        **{name: ours(blend, **options) for name, options in runs.items()},
    }
    return Contest("LoRA guides", blend, contenders, [peft_model], rows=3, tolerance=tolerance)


def models_contest(
    models: Sequence[Any], runs: dict[str, dict[str, Any]], tolerance: float
) -> Contest:
    base, tuned, ref = map(cf.Model, models)
    blend = base + WEIGHTS[1] * (tuned - ref)
    contenders: dict[str, Run] = {
        "three forwards": three_forwards(models),
        **{name: ours(blend, **options) for name, options in runs.items()},
    }
    return Contest("separate models", blend, contenders, models, tolerance=tolerance)


def model_of(contest: str, device: str, quick: bool) -> str:
    """What a reader must know of the models of a contest."""
    if quick:
        return "a tiny random model"
    if device == "cpu":
        return f"SmolLM2-135M, {'bfloat16' if contest.endswith('bfloat16') else 'float32'}"
    shapes = {"separate models": "8B + 1B + 1B", "LoRA guides": "1B"}[contest]
    return f"random weights of the shape of Llama 3 {shapes}, bfloat16"


def load(dtype: torch.dtype, quick: bool) -> Any:
    if quick:
        return random_model(TINY, "cpu", dtype)
    return unending(cf.models.smollm2(dtype=dtype)[0])


def cpu_contests(args: argparse.Namespace) -> Iterator[list[Contest]]:
    """The sets, all at once, so that each can be set against Hugging Face's own greedy step."""
    model, rank = load(torch.float32, args.quick), 4 if args.quick else 16
    contests = []
    if "single" in args.only:
        runs = {"Hugging Face": hugging_face(model), OURS: ours(model)}
        if args.compile:
            runs[f"{OURS}, compiled"] = ours(model, compile=True)
        contests.append(Contest("single", cf.Model(model), runs, [model], sample=False))
        half = load(torch.bfloat16, args.quick)
        runs = {"Hugging Face": hugging_face(half), OURS: ours(half)}
        name = "single, bfloat16"
        contests.append(Contest(name, cf.Model(half), runs, [half], sample=False, tolerance=0.2))
    if {"lora", "queue"} & set(args.only):
        contests.append(lora_contest(adapted(model, rank), {OURS: {}}, 0.01))
    if "models" in args.only:
        models = [model, perturbed(model, 2), perturbed(model, 3)]
        contests.append(models_contest(models, {OURS: {}}, 0.01))
    yield contests


def gpu_contests(args: argparse.Namespace) -> Iterator[list[Contest]]:
    """The sets, one after the other: the models of one are freed before the next ones are made."""
    runs = {OURS: {}, f"{OURS}, no graph": {"cuda_graph": False}}
    big, small = (TINY, TINY) if args.quick else (LLAMA_8B, LLAMA_1B)
    bf16 = torch.bfloat16
    if "models" in args.only:
        seeds = enumerate((big, small, small))
        yield [models_contest([random_model(c, "cuda", bf16, i) for i, c in seeds], runs, 0.2)]
    if "lora" in args.only:
        yield [lora_contest(adapted(random_model(small, "cuda", bf16), 16), runs, 0.2)]


class Wrong(AssertionError):
    """A contender does not decode what the others do."""


def tokens_of(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    return result.sequences[:, result.prompt_length :]


def check(contest: Contest, ids: Tensor, found: dict[str, Tensor]) -> None:
    """Check the greedy tokens, and in float32 the probability of what crossfade samples.

    Tokens must be the first contender's, but where two are all but equally likely; the probability
    must be the one that the recipe gives.

    Raises:
        Wrong: names the contender.
    """
    (first, truth), *others = found.items()
    for name, tokens in others:
        if tokens.shape != truth.shape:
            raise Wrong(f"{contest.name}: {name} wrote {list(tokens.shape)} tokens")
        for row in (tokens != truth).any(dim=1).nonzero().flatten().tolist():
            n = int((tokens[row] != truth[row]).nonzero()[0]) + 1
            both = [truth[row, :n].tolist(), tokens[row, :n].tolist()]
            one, other = cf.score(contest.blend, [ids[row].tolist()] * 2, both).logprobs[:, n - 1]
            if not abs(one - other) <= contest.tolerance:
                raise Wrong(
                    f"{contest.name}: {name} writes token {both[1][-1]} as number {n - 1} of row "
                    f"{row} ({other:.3f} nats); {first} writes {both[0][-1]} ({one:.3f})"
                )
    recipe = next(iter(contest.runs.values()))
    if isinstance(recipe, Recipe) and contest.models[0].dtype == torch.float32:
        out: Any = contest.runs[OURS](ids, 1, True)
        with torch.inference_mode():
            truth = recipe.probabilities(ids, recipe.start()(ids)).log()
        off = (truth.gather(1, tokens_of(out))[:, 0] - out.sampled_logprobs[:, 0]).abs().max()
        if not off <= 3 * contest.tolerance:
            raise Wrong(f"{contest.name}: {OURS} samples from another distribution, by {off} nats")


def ends_for(written: Sequence[Sequence[int]], shortest: int, mean: float) -> list[int]:
    """Ids that cut the rows to unequal lengths where they end a text, none below `shortest`."""
    early = {t for row in written for t in row[: shortest - 1]}
    late = sorted({t for row in written for t in row} - early)
    order = torch.randperm(len(late), generator=torch.Generator().manual_seed(0)).tolist()
    ends: set[int] = set()
    for i in order:
        ends.add(late[i])
        if sum(cut(row, ends) for row in written) <= mean * len(written):
            break
    return sorted(ends)


def cut(row: Sequence[int], ends: set[int]) -> int:
    return next((i + 1 for i, t in enumerate(row) if t in ends), len(row))
