"""``crossfade pareto``: blends at many weightings of rewards, and the fronts that they reach."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import did_you_mean
from ..extras import require
from .options import add_device_option, device_of, note, quiet

if TYPE_CHECKING:
    from ..loading import Loaded, Plan
    from ..pareto import Front

HELP = "Sweep blends over weightings of rewards, and draw the fronts that they reach."
USAGE = "--config FILE --output DIR [options]"
EXAMPLES = """\
keys of the file, which is YAML (relative paths begin at the current folder):
  models      a mapping of names to PATH or PATH@GUIDE, as --model of crossfade
              generate takes them
  methods     a mapping of names to formulas of the models, in which w_NAME is
              the weight of the reward NAME
  rewards     a mapping of names to MODULE:FUNCTION, a function
              fn(prompts, responses) -> scores, or to the PATH of a reward model
  prompts     a list of texts, or a file with one on each line, or a .jsonl file
              with a "prompt" or "messages" on each line
  weights     a number n, for all weightings in steps of 1 / (n - 1), or a list
              of mappings of the rewards' names to numbers [11]
  kl_to       a formula of the models: points have the divergence from it and
              the perplexity under it
  reference   a number for each reward: hypervolumes are measured above it
  generation  arguments of crossfade.generate, such as {max_new_tokens: 48,
              do_sample: true}
  chat        whether texts are sent as chats [as the first method's models say]
  dtype       of the weights: auto, float32, bfloat16 or float16 [auto]
  seed        of all draws [0]

DIR gets front.json, front.png and front.html, and texts.jsonl, to which each
text goes as soon as it is written; --resume goes on from it.

such as pareto.yaml:
  models: {base: smollm2, kind: smollm2@sentiment, brief: smollm2@brevity}
  methods:
    blend: "base + w_sentiment * (kind - base) + w_brevity * (brief - base)"
    mod: "w_sentiment * kind + w_brevity * brief"
  rewards: {sentiment: rewards:sentiment, brevity: rewards:brevity}
  prompts: prompts.txt
  reference: {sentiment: -1, brevity: -60}
  kl_to: base
  generation: {max_new_tokens: 48, do_sample: true}

example:
  crossfade pareto --config pareto.yaml --output fronts
"""
NEEDED = ("models", "methods", "rewards", "prompts")
PREFIX = "w_"  # of the names of weights in formulas


@dataclass(frozen=True)
class Settings:
    """What the file says; `EXAMPLES` has the meaning of each key."""

    models: dict[str, str]
    methods: dict[str, str]
    rewards: dict[str, str]
    prompts: Any
    weights: Any = 11
    kl_to: str | None = None
    reference: Any = None
    generation: dict[str, Any] = field(default_factory=dict)
    chat: bool | None = None
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("models", "methods", "rewards"):
            x = getattr(self, name)
            if not isinstance(x, dict) or not x:
                raise TypeError(f"{name} is {x!r:.80}; it must be a mapping of names to texts")
            for key, text in x.items():
                if not isinstance(key, str) or not isinstance(text, str) or not text.strip():
                    raise TypeError(f"{name}.{key} is {text!r:.80}; it must be a text")
        if not isinstance(self.generation, dict):
            raise TypeError(f"generation is {self.generation!r:.80}; it must be a mapping")
        for name in self.generation:
            if name in ("seed", "kl_to"):
                raise ValueError(
                    f"generation.{name} is given; it must be the key {name}, beside it"
                )
        if self.kl_to is not None and not isinstance(self.kl_to, str):
            raise TypeError(f"kl_to is {self.kl_to!r:.80}; it must be a formula")
        if self.chat is not None and type(self.chat) is not bool:
            raise TypeError(f"chat is {self.chat!r:.80}; it must be true or false")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r:.80}; it must be auto, float32 or another")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="the YAML file, whose keys are below"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="the folder of the results"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from what the folder has, if anything"
    )
    add_device_option(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Sweep, draw and print. After Ctrl-C, do so with the points that are finished."""
    from ..pareto import sweep
    from ..pareto.fronts import check_reference
    from ..pareto.weightings import objectives, weightings

    settings = read(arguments.config)
    names = list(settings.rewards)
    if settings.reference is not None:
        each = weightings(settings.weights, names)
        check_reference(settings.reference, objectives(each, names))
    prompts = _prompts(settings.prompts)
    plan = plan_of(settings)
    texts = arguments.output / "texts.jsonl"
    if texts.exists() and not arguments.resume:
        raise FileExistsError(
            f"--output is {str(arguments.output)!r}, which has {texts.name}; give --resume to go "
            "on, remove it or name another folder"
        )
    require("matplotlib", "plot")  # what is missing is said before the work
    arguments.output.mkdir(parents=True, exist_ok=True)
    quiet()
    loaded = plan.load(device_of(arguments.device), settings.dtype)
    methods = {name: _method(loaded, text, names) for name, text in settings.methods.items()}
    assert loaded.value is not None
    values = dict(zip(loaded.value.names, loaded.value.values, strict=True))
    generation = dict(settings.generation)
    if settings.kl_to is not None:
        generation["kl_to"] = _method(loaded, settings.kl_to, [])({})
    chat = settings.chat
    if chat is None:
        first = next(iter(methods.values()))(dict.fromkeys(settings.rewards, 0.5))
        chat = loaded.answers_chats(first)
        if chat and any(isinstance(prompt, str) for prompt in prompts):
            note(
                arguments, "the models answer chats: texts are sent as chats (chat: false does not)"
            )
    front = sweep(
        methods,
        [
            [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt
            for prompt in prompts
        ],
        {name: values[name] for name in settings.rewards},
        weights=settings.weights,
        seed=settings.seed,
        path=texts,
        **generation,
    )
    front.save(arguments.output / "front.json")
    if front.points:
        _show(arguments, front, settings.reference)
    return 130 if front.interrupted else 0


def _show(arguments: argparse.Namespace, front: Front, reference: Any) -> None:
    """Draw the fronts, and print their figures."""
    volumes = {} if reference is None else front.hypervolume(reference)
    front.plot(arguments.output / "front.png")
    front.to_html(arguments.output / "front.html")
    if arguments.json:
        found = {
            "points": front.points,
            "steerability": front.steerability,
            "correlations": front.correlations,
            "hypervolume": {name: x._asdict() for name, x in volumes.items()},
        }
        print(json.dumps(found))
    else:
        print(front)
        for name, (value, low, high) in volumes.items():
            print(f"hypervolume of {name}: {value:.4g}, 95 % interval {low:.4g} to {high:.4g}")
    where = arguments.output
    said = f"front.json, front.png and front.html are in {str(where)!r}"
    print(said, file=sys.stderr if arguments.json else sys.stdout)


def read(file: str) -> Settings:
    """The settings of a YAML file.

    Raises:
        TypeError, ValueError: the file is not such YAML, or a key is wrong; names it.
        OSError: it is not there.
    """
    from .. import reading

    found = reading.parse_yaml(reading.read_text(file), file)
    if not isinstance(found, dict):
        what = "is empty" if found is None else f"has a {type(found).__name__} at its top"
        raise ValueError(f"{file} {what}; it must have the keys {', '.join(NEEDED)}")
    known = [f.name for f in fields(Settings)]
    meant = {"blends": "did you mean 'methods'?", "model": "did you mean 'models'?"}
    for key in found:
        if key not in known:
            hint = did_you_mean(key, known, meant)
            hint = hint or "; what generate takes goes under generation"
            raise ValueError(
                f"{file} has the key {key!r:.40}; the keys are {', '.join(known)}{hint}"
            )
    for key in NEEDED:
        if key not in found:
            raise ValueError(f"{file} has no key {key!r}; it must have {', '.join(NEEDED)}")
    return Settings(**found)


def plan_of(settings: Settings) -> Plan:
    """All models and rewards of the file as one plan, its formulas checked, nothing loaded.

    Raises:
        ValueError: a formula or a name is wrong; names it. OSError: a model is not there.
    """
    from .. import formula
    from ..loading import Plan

    weights = {PREFIX + name for name in settings.rewards}
    used: set[str] = set()
    for key, text in (
        *((f"methods.{name}", text) for name, text in settings.methods.items()),
        *([] if settings.kl_to is None else [("kl_to", settings.kl_to)]),
    ):
        try:
            names = formula.names_in(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{key} is {text!r:.80}, which is no formula ({error})") from None
        known = {*settings.models, *(weights if key != "kl_to" else ())}
        for name in sorted(names - known):
            said = f"{key} has the unknown name {name!r} (known: {', '.join(sorted(known))})"
            raise ValueError(said + did_you_mean(name, known))
        used |= names
        models = [f"{name}={path}" for name, path in settings.models.items() if name in names]
        faders = [f"{name}=0.5" for name in sorted(names & weights)]
        try:
            Plan.read(models, text, fader=faders).check()
        except ValueError as error:
            raise ValueError(str(error).replace("--blend", key)) from None
    for name in settings.models:
        if name not in used:
            raise ValueError(f"models.{name} is given, but no formula of methods or kl_to uses it")
    functions = {name: text for name, text in settings.rewards.items() if ":" in text}
    others = {name: text for name, text in settings.rewards.items() if name not in functions}
    try:
        plan = Plan.read(
            [f"{name}={path}" for name, path in {**settings.models, **others}.items()],
            " + ".join(settings.models),
            value=" + ".join(settings.rewards),
            reward=[f"{name}={text}" for name, text in functions.items()],
        )
        plan.check()
    except ValueError as error:
        raise ValueError(
            str(error).replace("--reward", "rewards").replace("--value", "rewards")
        ) from None
    return plan


def _method(loaded: Loaded, text: str, rewards: list[str]) -> Callable[[Mapping[str, float]], Any]:
    """The blend of a formula as a function of the weights of the rewards."""
    from .. import formula

    names = formula.names_in(text)
    terms = {name: term for name, term in loaded.terms.items() if name in names}

    def at(weights: Mapping[str, float]) -> Any:
        faders = {PREFIX + name: weights[name] for name in rewards if PREFIX + name in names}
        return formula.parse(text, **terms, **faders)

    return at


def _prompts(given: Any) -> list[Any]:
    from ..bulk import prompts

    if isinstance(given, str):
        given = prompts.read_lines(given)
    if not isinstance(given, list) or not given:
        raise ValueError(f"prompts is {given!r:.80}; it must be a file or a list of texts")
    return [prompts.line_of(item, i, known=()).prompt for i, item in enumerate(given)]
