"""A blend as a model of the evaluation harness: log-likelihoods and texts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError
from tqdm import tqdm

from ...bulk.decode import decode
from ...decoding.call import Call, blend_and_search
from ...decoding.scoring import Scoring
from ...decoding.settings import check_int
from ...extras import require
from ...progress import progress_bar
from .arguments import from_names, rows_at_a_time

require("lm_eval", "lm-eval")  # Its error says how to get it.
TemplateLM: Any = require("lm_eval.api.model", "lm-eval").TemplateLM
register_model: Any = require("lm_eval.api.registry", "lm-eval").register_model
harness: Any = require("lm_eval.utils", "lm-eval")
rules: Any = require("lm_eval.models.utils", "lm-eval")  # of the harness's own models

log = logging.getLogger("lm_eval.crossfade")  # The harness shows its own loggers alone.

Pair = tuple[Any, list[int], list[int]]  # a request's arguments, its context and continuation


@register_model("crossfade")
class CrossfadeLM(TemplateLM):
    """A blend for `lm_eval.simple_evaluate`, and the harness's ``--model crossfade``.

    Texts become tokens, and what is too long is cut, by the rules of the harness's `HFLM`: with one
    term, results are those of `HFLM` over its model. In two places, where `HFLM` stops with an
    error, this one goes on: an empty continuation has the log-likelihood 0, and one whose beginning
    would share a token with the end of its context is encoded by itself.

    All terms read the tokens of the harness's context. A term with a system prompt reads the
    context as a user's message after it or, where the harness applies the chat template, the
    harness's own chat with the system prompt in front. Blends with such a term have no rolling
    log-likelihoods and no empty contexts, and their contexts are not cut.

    Args:
        blend: a `Blend`, a `Model`, a bare Hugging Face causal LM, or a `Recipe`.
        tokenizer: of contexts and continuations; by default the first one that a term has.
        batch_size: how many rows share a forward, at most; "auto": as many as memory is meant for.
        max_batch_size: the most that "auto" takes.
        max_length: the context, in tokens; by default the shortest that a model of the blend has.
        max_gen_toks: how many tokens `generate_until` writes, where a task does not say.
        add_bos_token: whether the tokenizer adds its special tokens; None: as it does by itself.
        prefix_token_id: what stands for an empty context; by default the BOS or else the EOS.
        chat_template_args: for the chat template, such as ``{"enable_thinking": False}``.
        think_end_token: the text or the id after which an answer begins: what a task sees.
        seed: of sampling in `generate_until`; None takes one from torch's generator, which the
            harness seeds by ``--seed``.
        generation: arguments of `crossfade.generate` for all of `generate_until`, such as
            `search`, in place of what tasks say.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """

    def __init__(
        self,
        blend: Any,
        *,
        tokenizer: Any = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        think_end_token: str | int | None = None,
        seed: int | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, number in (
            ("max_batch_size", max_batch_size),
            ("max_length", max_length),
            ("max_gen_toks", max_gen_toks),
        ):
            check_int(name, number, 1)
        check_int("prefix_token_id", prefix_token_id, 0)
        check_int("seed", seed, 0)
        self.blend, search = blend_and_search(blend, None)
        call = Call(self.blend, tokenizer)
        if call.tokenizer is None:
            raise ValueError(
                "tokenizer is None; the harness needs one: give it here, or to a Model of the blend"
            )
        self.tokenizer, self._vocabulary = call.tokenizer, call.vocabulary
        self._device = call.device
        self.batch_size = batch_size
        self.max_batch = rows_at_a_time(batch_size, max_batch_size)
        lengths = [rules.resolve_max_length(m.bare.config, self.tokenizer) for m in call.models]
        self.max_length = max_length or min(
            [*lengths, *(m.context for m in call.models if m.context is not None)]
        )
        self.max_gen_toks = max_gen_toks
        self.add_bos_token = add_bos_token
        self._prefix = prefix_token_id
        self.chat_template_args = dict(chat_template_args or {})
        self.think_end_token = think_end_token
        self.seed = seed
        self.generation = {**({} if search is None else {"search": search}), **(generation or {})}
        # Such terms read texts and chats, not the tokens of the harness's contexts.
        terms = zip(self.blend.names, self.blend.terms, strict=True)
        self._reads_text = [n for n, t in terms if t.system is not None or callable(t.prompt)]
        self._chats: dict[str, list[dict[str, str]]] = {}  # by the texts made of them

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> CrossfadeLM:
        """The model that the harness's ``--model_args`` describe, by paths and a formula.

        Args:
            arg_dict: the arguments of this class by name, except `tokenizer` and `generation`, and

                * `blend`: a formula of names, or the file of a saved blend, whose name ends in
                  ``.json``; it may be missing where there is one model,
                * `dtype`: of the models; by default what they were saved in,
                * `device`: where they go,
                * `system`: a mapping of names to system prompts,
                * any other name: the path of the model that the formula calls so, as in
                  ``crossfade generate --model NAME=PATH``, or the number of a fader in it.
            additional_config: what the harness adds, such as `batch_size` and `device`.

        Raises:
            TypeError, ValueError: names the argument, what it was and what it must be.
        """
        more = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**from_names({**more, **arg_dict}))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> CrossfadeLM:
        """The same for arguments as one text, ``"name=value,name=value"``."""
        return cls.create_from_arg_obj(
            harness.simple_parse_args_string(arg_string), additional_config
        )

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        if self._prefix is not None:
            return self._prefix
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells apart the requests that it keeps on the disk."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model."""
        models = {id(t.model): t.model for t in self.blend.terms}.values()
        count = sum(p.numel() for m in models for p in m.parameters())
        dtypes = sorted({str(p.dtype) for m in models for p in m.parameters()})
        return {
            "blend": str(self.blend),
            "model_num_parameters": count,
            "model_dtype": ", ".join(dtypes),
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as a text. Where the template refuses a system message, that is left out."""
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **self.chat_template_args,
        }
        try:
            text = self.tokenizer.apply_chat_template(chat_history, **options)
        except TemplateError:
            log.warning("The chat template takes no system message: it is left out.")
            chat_history = [m for m in chat_history if m["role"] != "system"]
            text = self.tokenizer.apply_chat_template(chat_history, **options)
        if self._reads_text:
            self._chats[text] = chat_history
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a text. One that begins with the prefix token gets no special tokens."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if string.startswith(self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
        if add_special_tokens is not None:
            kwargs["add_special_tokens"] = add_special_tokens
        return self.tokenizer.encode(string, **kwargs)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-prob of each continuation after its context, and whether greedy decoding, which
        takes the lower id of two equal tokens, would write it."""
        pairs = [(r.args, *self._pair(*r.args)) for r in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a context, one at least, and of its continuation."""
        if context in self._chats:
            # What a chat template ends with belongs to the prompt, of every term.
            before = self.tok_encode(context)
            after = self.tok_encode(context + continuation)[len(before) :]
        elif context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [], self.tok_encode(continuation, add_special_tokens=False)
        if not before:
            before = [self.prefix_token_id]
            after = after[1:] if after[:1] == before else after
        elif continuation and not after:
            after = self.tok_encode(continuation, add_special_tokens=False)
        return before, after

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        asked = [i for i, (_, _, after) in enumerate(requests) if after]
        responses = [requests[i][2] for i in asked]
        for i, after in zip(asked, responses, strict=True):
            if len(after) > self.max_length:
                raise ValueError(
                    f"request {i} has a continuation of {len(after)} tokens; max_length is "
                    f"{self.max_length}"
                )
        if asked:
            scoring = Scoring(
                self.blend,
                self._prompts(
                    [requests[i][0] for i in asked],
                    [requests[i][1] for i in asked],
                    [self.max_length + 1 - len(after) for after in responses],
                ),
                responses,
                tokenizer=self.tokenizer,
                max_batch=self.max_batch,
            )
            with _bar("log-likelihoods", len(asked), disable_tqdm) as bar:
                for place, figures in scoring.each():
                    i = asked[place]
                    greedy = bool((figures.ranks == 0).all())
                    found[i] = float(figures.logprobs.double().sum()), greedy
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                    bar.update()
        bad = sum(total != total for total, _ in found)
        if bad:
            log.warning("The blend gave NaN for %d of %d requests.", bad, len(requests))
        return found

    def _prompts(
        self, arguments: Sequence[Any], contexts: Sequence[list[int]], rooms: Sequence[int]
    ) -> list[Any]:
        """What all terms read before a response: the last tokens of each context, as many as there
        is room for, or its text or chat where a term needs that."""
        if self._reads_text:
            return [self._text(given) for given in arguments]
        both = list(zip(contexts, rooms, strict=True))
        cut = sum(len(context) > room for context, room in both)
        if cut:
            log.warning("%d of %d contexts are too long: their last tokens count.", cut, len(both))
        return [context[-room:] for context, room in both]

    def _text(self, arguments: Any) -> Any:
        text = arguments[0] if arguments is not None else ""
        if not text.strip():
            raise NotImplementedError(
                f"{' and '.join(self._reads_text)} has a system prompt or makes its own of a "
                "text: a text without a context has neither log-likelihood nor continuation"
            )
        return self._chats.get(text, text.rstrip())

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-prob of each whole text, read in windows of the context, each token once."""
        windows: list[Pair] = []
        counts = []
        for (text,) in (r.args for r in requests):
            own = harness.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *harness.make_disjoint_window(pair)) for pair in own]
            windows += own
            counts.append(len(own))
        found = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum((next(found)[0] for _ in range(count)), 0.0))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that is written after each context, up to the first of its stop strings."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            settings = sorted(request.args[1].items(), key=lambda item: item[0])
            groups.setdefault(repr(settings), []).append(i)
        found = [""] * len(requests)
        with _bar("texts", len(requests), disable_tqdm) as bar:
            for group, places in enumerate(groups.values()):
                asked = [requests[i].args for i in places]
                for place, text in self._written(asked, group):
                    found[places[place]] = text
                    self.cache_hook.add_partial("generate_until", asked[place], text)
                    bar.update()
        return found

    def _written(
        self, asked: Sequence[tuple[str, Mapping[str, Any]]], group: int
    ) -> Iterator[tuple[int, str]]:
        """The place of each context and the text after it, where all have the same settings."""
        settings = dict(rules.normalize_gen_kwargs(dict(asked[0][1]), self.max_gen_toks))
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = rules.handle_stop_sequences(settings.pop("until"), eos=eos)
        limit = settings.pop("max_gen_toks")
        if limit >= self.max_length:
            raise ValueError(
                f"max_gen_toks is {limit}; it must be below max_length, {self.max_length}"
            )
        if not settings["do_sample"]:
            settings.pop("temperature", None)
        if "max_length" not in settings:
            settings["max_new_tokens"] = limit
        ends, texts = self._ends(until)
        settings |= {"eos_token_id": ends or None, "stop_strings": texts or None}
        settings |= self.generation
        seed = settings.pop("seed", self.seed)
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu"))
        contexts = [self.tok_encode(c) or [self.prefix_token_id] for c, _ in asked]
        outputs = decode(
            self.blend,
            self._prompts(asked, contexts, [self.max_length - limit] * len(asked)),
            tokenizer=self.tokenizer,
            max_batch=self.max_batch,
            seed=seed + group,
            **settings,
        )
        for place, output in outputs:
            yield place, self._answer(output.responses[0], until)

    def _ends(self, until: Sequence[str]) -> tuple[list[int], list[str]]:
        """The tokens that end a text, and the texts that do. The first are never in a text."""
        special = set(self.tokenizer.all_special_ids)
        ids = {text: self.tokenizer.get_vocab().get(text) for text in until}
        ends = [token for token in ids.values() if token in special]
        model = self.blend.terms[0].model
        saved = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends += saved if isinstance(saved, list) else [saved]
        texts = [text for text in until if text and ids[text] not in special]
        return sorted({e for e in ends if e is not None and e < self._vocabulary}), texts

    def _answer(self, response: Sequence[int], until: Sequence[str]) -> str:
        """What a task sees of a response: the text after thinking, before the stop strings."""
        think, ids = self.think_end_token, list(response)
        if isinstance(think, int) and think in ids:
            ids = ids[len(ids) - ids[::-1].index(think) :]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return rules.postprocess_generated_text(
            text.lstrip() if isinstance(think, int) else text,
            stop=until,
            think_end_token=think if isinstance(think, str) else None,
        )


@contextmanager
def _bar(what: str, total: int, disabled: bool) -> Iterator[Any]:
    bar = tqdm(disable=True) if disabled else progress_bar(total, f" {what}")
    try:
        yield bar
    finally:
        bar.close()
