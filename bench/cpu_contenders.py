"""Who takes part in cpu_peers.py: crossfade with weights of several kinds, and llama.cpp."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import crossfade as cf
import decode_peers as peers
import llama_peer as llama
import torch
from decode_peers import WEIGHTS
from reports import OURS
from reports.cpu_peers import ADAPTERS, LLAMA, MODULES, NUMPY, ONE, THREE
from torch import Tensor

BITS = (8, 4) if hasattr(cf, "quantize") else ()
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NEAR = 0.02  # nats that 16 bits may be off, on average
TEXT = Path(__file__).parent.parent / "LICENSE"


class Wrong(AssertionError):
    """A contender does not give the distributions of the model's own forward."""


@dataclass(frozen=True)
class Contender:
    """Who decodes what.

    Attributes:
        of, by, weights: the blend, the library and the kind of its weights.
        weight_bytes: that a step reads, whatever its batch.
        token_bytes: of keys and values of a token, in all models.
        products: multiplications of a token, in all models.
    """

    of: str
    by: str
    weights: str
    run: peers.Run
    weight_bytes: int
    token_bytes: int
    products: int

    @property
    def key(self) -> tuple[str, str, str]:
        return self.of, self.by, self.weights


@dataclass
class Lineup:
    """Models of one size, in crossfade's kinds of weights and in llama.cpp's.

    Attributes:
        models: by the kind of their weights, one or three of them.
        adapted: PEFT models with two adapters, by the kind of the weights below them.
        loaded: llama.cpp's models, by their kind.
        products: multiplications of a token in one model.
        contexts: of llama.cpp's that are open.
    """

    name: str
    models: dict[str, list[Any]]
    adapted: dict[str, Any]
    loaded: dict[str, list[Any]]
    text: list[int]
    products: int
    contexts: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, quick: bool, work: Path) -> Lineup:
        """SmolLM2 and two models of its size, or tiny ones."""
        model = peers.load(torch.float32, quick)
        three = [model, peers.perturbed(model, 2), peers.perturbed(model, 3)]
        half = [copy.deepcopy(m).bfloat16() for m in three]
        models = {"float32": three, "bfloat16": half}
        models |= {f"{b} bits": [quantised(m, b) for m in half] for b in BITS}
        adapted = peers.adapted(model, 4 if quick else 16)
        guides = {"float32": adapted, "bfloat16": copy.deepcopy(adapted).bfloat16()}
        guides |= {f"{b} bits": quantised(guides["bfloat16"], b) for b in BITS}
        name = "a tiny random model" if quick else "SmolLM2-135M"
        text = list(range(20, 60))
        if not quick:
            tokenizer = cf.models.smollm2()[1]
            text = tokenizer(TEXT.read_text(encoding="utf-8")).input_ids[:512]
        return cls._with_files(name, models, guides, three, text, work)

    @classmethod
    def big(cls, quick: bool, work: Path) -> Lineup:
        """One model of the shape of Llama 3 1B, with random weights."""
        config = peers.TINY if quick else peers.LLAMA_1B
        model = peers.random_model(config, "cpu", torch.bfloat16)
        models = {"bfloat16": [model]}
        models |= {f"{b} bits": [quantised(model, b)] for b in BITS}
        name = "a tiny random model" if quick else "random weights of the shape of Llama 3 1B"
        return cls._with_files(name, models, {}, [model], [], work / "big")

    @classmethod
    def _with_files(
        cls,
        name: str,
        models: dict[str, list[Any]],
        adapted: dict[str, Any],
        own: Sequence[Any],
        text: list[int],
        work: Path,
    ) -> Lineup:
        loaded: dict[str, list[Any]] = {}
        if llama.INSTALLED:
            work.mkdir(exist_ok=True)
            files = [work / f"{i}.gguf" for i in range(len(own))]
            for model, file in zip(own, files, strict=True):
                if not file.exists():
                    llama.write(model, file)
            for kind in llama.KINDS:
                each = files if kind == "F16" else [llama.quantised(f, kind) for f in files]
                loaded[kind] = [llama.Weights(f) for f in each]
        products = sum(w.numel() for w in peers.weights_of(own[0]))
        return cls(name, models, adapted, loaded, text, products)

    @property
    def vocabulary(self) -> int:
        return next(iter(self.models.values()))[0].config.vocab_size

    def contenders(self, batch: int, tokens: int, compiled: bool) -> list[Contender]:
        """All that decode `batch` rows of up to so many tokens.

        At batch 1 also in float32, which llama.cpp is not set against, and floats without a tape.
        """
        ways: dict[str, dict[str, Any]] = {OURS: {}}
        if batch == 1:
            ways[MODULES] = {"tape": False}
        if compiled:
            ways[f"{OURS}, compiled"] = {"compile": True}
        found = list(self._llamas(batch, tokens))
        for way, options in ways.items():
            for of, weights, blend, models in self._blends():
                if batch > 1 and weights == "float32":
                    continue
                if not options or (weights in FLOATS and (of == ONE or way == MODULES)):
                    found.append(
                        Contender(
                            *(of, way, weights),
                            peers.ours(blend, **options),
                            sum(map(weight_bytes, models)),
                            sum(map(peers.bytes_of_a_token, models)) * (1 + 2 * (of == ADAPTERS)),
                            self.products * (1 if of == ONE else 3),
                        )
                    )
        return found

    def _llamas(self, batch: int, tokens: int) -> Iterator[Contender]:
        for kind, loaded in self.loaded.items():
            for of, by, count in ((ONE, LLAMA, 1), (THREE, NUMPY, 3)):
                if len(loaded) >= count:
                    contexts = [self.open(w, batch, tokens) for w in loaded[:count]]
                    run = llama.Alone(contexts[0]) if count == 1 else llama.Blended(contexts)
                    first = next(iter(self.models.values()))[0]
                    cache = peers.bytes_of_a_token(first) // first.dtype.itemsize * 2  # float16
                    read = sum(w.bytes for w in loaded[:count])
                    yield Contender(of, by, kind, run, read, count * cache, count * self.products)

    def _blends(self) -> Iterator[tuple[str, str, Any, list[Any]]]:
        for weights, models in self.models.items():
            yield ONE, weights, cf.Model(models[0]), models[:1]
            if len(models) == 3:
                base, tuned, ref = map(cf.Model, models)
                yield THREE, weights, base + WEIGHTS[1] * (tuned - ref), models
        for weights, model in self.adapted.items():
            yield ADAPTERS, weights, guided(model), [model]

    def open(self, weights: Any, rows: int, tokens: int) -> Any:
        self.contexts.append(llama.Context(weights, rows, tokens, torch.get_num_threads()))
        return self.contexts[-1]

    def close(self) -> None:
        """Free llama.cpp's contexts."""
        while self.contexts:
            self.contexts.pop().close()

    def readers(self, tokens: int) -> dict[tuple[str, str], Callable[[Tensor], object]]:
        """Who reads prompts of up to so many tokens and says the next one."""
        found: dict[tuple[str, str], Callable[[Tensor], object]] = {}
        for kind, loaded in self.loaded.items():
            context = self.open(loaded[0], 1, tokens)

            def read(ids: Tensor, context: Any = context) -> int:
                context.keep(0)
                return int(context.read(ids.tolist()).argmax())

            found[LLAMA, kind] = read
        for weights, models in self.models.items():
            run = peers.ours(cf.Model(models[0]))
            found[OURS, weights] = lambda ids, run=run: run(ids, 1, True)
        return found

    def taped(self) -> list[tuple[str, Any]]:
        """What is looked at for what its tokens cost beyond the kernels."""
        one = [(f"SmolLM2, {w}", cf.Model(m[0])) for w, m in self.models.items()]
        return [*one, ("SmolLM2, float32, two adapters", guided(self.adapted["float32"]))]


def guided(model: Any) -> Any:
    base, tuned, ref = (cf.Model(model, adapter=a) for a in (None, "tuned", "ref"))
    return base + WEIGHTS[1] * (tuned - ref)


def quantised(model: Any, bits: int) -> Any:
    """A copy with weights of so many bits, the head's too, as llama.cpp's files have them."""
    return cf.quantize(copy.deepcopy(model), bits=bits, head=True)


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a step reads: of an embedding that is no head, none."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = getattr(head, "weight", None) is embedding
    each = {x.data_ptr(): x.nbytes for x in model.state_dict().values()}
    return sum(each.values()) - (0 if tied else embedding.nbytes)


def errors(lineup: Lineup) -> list[dict[str, Any]]:
    """How far everybody's next-token distributions are off the float32 model's own, on a text.

    Weights that came from 4 bits fit into 4 bits again, which says little; so there is a model
    whose weights have noise as well.

    Raises:
        Wrong: names who is off, though the weights have 16 bits.
    """
    ids, rows = torch.tensor([lineup.text]), []
    for place, model in enumerate((lineup.name, f"{lineup.name} with noise")):
        with torch.inference_mode():
            truth = lineup.models["float32"][place](ids).logits[0]
            found = {
                (OURS, weights): models[place](ids).logits[0]
                for weights, models in lineup.models.items()
            }
        for kind, loaded in lineup.loaded.items():
            context = lineup.open(loaded[place], 1, len(lineup.text))
            found[LLAMA, kind] = torch.from_numpy(context.read([lineup.text], every=True).copy())
        lineup.close()
        for (by, weights), logits in found.items():
            row = {"model": model, "by": by, "weights": weights, **distance(truth, logits, ids[0])}
            if weights in ("float32", "bfloat16", "F16") and not row["kl"] <= NEAR:
                raise Wrong(f"{by}, {weights}: {row['kl']:.3g} nats off {model}'s own forward")
            rows.append(row)
    return rows


def distance(truth: Tensor, logits: Tensor, ids: Tensor) -> dict[str, float]:
    """The divergence from the truth to logits ``[n, V]`` in nats, a mean; and both perplexities."""
    p, q = (x.double().log_softmax(-1) for x in (truth, logits))
    own, other = (float(x[:-1].gather(1, ids[1:, None]).mean()) for x in (p, q))
    return {
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "perplexity_ratio": float(torch.tensor(own - other).exp()),
        "same_best": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    }
