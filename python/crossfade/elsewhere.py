"""Names that other interfaces have for what crossfade does, and what to say to each of them.

They are OpenAI's, vLLM's, llama.cpp's, Hugging Face's pipelines' and those that are guessed. Each
text ends an error about an unknown name; `checks.did_you_mean` puts it there.
"""

from __future__ import annotations

from collections.abc import Iterable


def _each(names: Iterable[str], says: str) -> dict[str, str]:
    return dict.fromkeys(names, says)


_BEAMS = (
    "there is no beam search by probability; search=ChunkBeamSearch(width=4, value=...) "
    "is one by a value"
)
_INPUTS = "texts, chats and token ids are the second argument: crossfade.generate(blend, inputs)"
_GUESSES = "a model that guesses tokens is draft=crossfade.Draft(model)"
_LOOKED_UP = "tokens are looked up in the prompt by draft=crossfade.Draft('prompt')"
_GUESSED = "how many tokens are guessed at a time is draft=crossfade.Draft(..., length=8)"
_OF_A_MODEL = "it belongs to a term: crossfade.Model(model, {}=...)"

# Arguments of `crossfade.generate`, and of all that hand theirs on to it.
GENERATE: dict[str, str] = {
    **_each(
        (
            *("max_tokens", "max_completion_tokens", "max_output_tokens", "max_gen_toks"),
            *("n_predict", "num_predict", "max_gen_len", "n_tokens", "num_tokens"),
        ),
        "how many new tokens a response may have is max_new_tokens",
    ),
    "min_tokens": "the fewest new tokens of a response are min_new_tokens",
    **_each(
        ("stop", "stop_sequences", "stop_sequence", "stop_words", "stops", "until"),
        "texts that end a response are stop_strings",
    ),
    **_each(("stop_token_ids", "stop_tokens"), "ids that end a response are eos_token_id"),
    "ignore_eos": "min_new_tokens keeps a response from ending before it",
    **_each(
        ("n", "num_samples", "num_generations", "num_responses", "num_completions"),
        "several responses to a prompt are num_return_sequences",
    ),
    "best_of": "search=crossfade.BestOfN(n, value) gives the best of n responses by a value",
    **_each(("use_beam_search", "beam_width", "beam_size", "beams", "num_beams"), _BEAMS),
    **_each(
        ("logprobs", "return_logprobs", "output_logprobs"),
        "Output.logprobs is always given, return_term_logprobs=True adds each term's",
    ),
    "top_logprobs": "Output.logprobs has the tokens that were chosen; those of others are not kept",
    "prompt_logprobs": "crossfade.score gives the log-probs of texts that are there",
    "echo": "Output.sequences begins with the prompt; crossfade.score gives log-probs of texts",
    "return_full_text": "Output.text is the response alone, Output.sequences has the prompt too",
    "skip_special_tokens": "Output.text has no special tokens, Output.sequences has them",
    **_each(
        ("frequency_penalty", "presence_penalty"),
        "there are repetition_penalty, no_repeat_ngram_size and logits_processor",
    ),
    "repeat_penalty": "here it is repetition_penalty",
    "logit_bias": "here it is sequence_bias, {(token_id,): bias}",
    **_each(
        ("stream", "streaming", "callback"),
        "text as it comes goes to a streamer: streamer=transformers.TextStreamer(tokenizer)",
    ),
    **_each(
        ("prompt", "prompts", "message", "messages", "text", "texts", "conversation", "input"),
        _INPUTS,
    ),
    **_each(("input_ids", "inputs_ids", "text_inputs"), _INPUTS),
    **_each(
        ("grammar", "response_format", "json_schema", "guided_json", "guided_choice"),
        "prefix_allowed_tokens_fn and logits_processor decide which tokens are allowed",
    ),
    "structured_outputs": "prefix_allowed_tokens_fn and logits_processor decide which tokens are "
    "allowed",
    **_each(
        ("guidance_scale", "cfg_scale", "negative_prompt", "negative_prompt_ids"),
        "crossfade.presets.cfg is classifier-free guidance",
    ),
    "temp": "here it is temperature",
    **_each(("random_seed", "generator"), "here it is seed, an int or one for each request"),
    "batch_size": "how many rows are decoded at a time is max_batch",
    **_each(
        ("device", "device_map", "dtype", "torch_dtype"),
        "models are decoded where and as they are: model.to(...) before",
    ),
    **_each(
        ("weights", "weight", "alpha", "beta", "lam", "power", "r"),
        "weights are part of the blend: base + 0.8 * (tuned - ref)",
    ),
    **_each(("model", "models", "base", "base_model"), "the blend is the first argument"),
    **_each(("system", "system_prompt"), _OF_A_MODEL.format("system")),
    **_each(("adapter", "adapter_name", "lora"), _OF_A_MODEL.format("adapter")),
    **_each(
        ("value", "reward", "reward_fn", "reward_model"),
        "a search takes it: search=crossfade.BestOfN(n, value)",
    ),
    **_each(
        ("judge", "tournament", "self_rejection"),
        "a search takes it: search=crossfade.Tournament(judge, n=16)",
    ),
    **_each(
        ("support", "plausibility"),
        "here it is part of the blend: blend.within(crossfade.Support(min_p=0.1))",
    ),
    **_each(("enable_thinking", "thinking"), "chat_template_kwargs={'enable_thinking': False}"),
    "functions": "functions that a chat may call are tools",
    **_each(
        ("past_key_values", "kv_cache"),
        "return_cache=True gives Output.cache, and cache=output.cache goes on from it",
    ),
    **_each(
        (
            *("assistant_model", "draft_model", "speculative_model", "model_draft"),
            *("speculative_config", "speculative", "speculation", "speculative_decoding"),
            *("assistant", "drafter"),
        ),
        _GUESSES,
    ),
    "assistant_tokenizer": "a model that guesses tokens has the vocabulary of the blend",
    **_each(
        (
            *("prompt_lookup_num_tokens", "prompt_lookup", "prompt_lookup_decoding"),
            *("ngram_prompt_lookup_max", "prompt_lookup_max", "lookup"),
        ),
        _LOOKED_UP,
    ),
    **_each(
        (
            *("num_assistant_tokens", "num_speculative_tokens", "num_draft_tokens"),
            *("draft_max", "draft_n", "n_draft", "draft_length", "gamma"),
        ),
        _GUESSED,
    ),
    **_each(
        ("prediction", "predictions", "predicted_outputs"),
        "texts that responses will repeat, with changes, are draft=crossfade.Draft(texts=[...])",
    ),
    "custom_generate": "model.generate(..., custom_generate=crossfade.decode, blend=...) has it",
    "trust_remote_code": "code beside a model is run where it is loaded, by transformers",
}

# Arguments of `crossfade.score`.
SCORE: dict[str, str] = {
    **_each(
        ("temperature", "top_k", "top_p", "min_p"),
        "scores are log-probs at temperature 1, before truncation",
    ),
    **_each(
        ("max_new_tokens", "max_tokens", "max_length", "do_sample", "seed", "num_return_sequences"),
        "score reads responses that are there; crossfade.generate writes them",
    ),
    **_each(
        ("completions", "completion", "answers", "targets", "labels", "continuations"),
        "what is scored are the responses",
    ),
    **_each(("inputs", "contexts", "context", "messages"), "what is read first are the prompts"),
    **_each(
        ("return_logprobs", "logprobs"),
        "Scores.logprobs is always given, return_term_logprobs=True adds each term's",
    ),
    "batch_size": "how many texts are read at a time is max_batch",
}

# Arguments of `Model` and the other terms and values over a model.
TERM: dict[str, str] = {
    **_each(("system_prompt", "system_message", "instructions"), "here it is system"),
    **_each(("lora", "adapter_name", "peft", "peft_adapter", "adapters"), "here it is adapter"),
    **_each(("tok", "processor", "processing_class"), "here it is tokenizer"),
    **_each(("weight", "scale", "alpha"), "a term is multiplied by its weight: 0.8 * Model(...)"),
    **_each(
        ("device", "device_map", "dtype", "torch_dtype"),
        "a model is decoded where and as it is: model.to(...) before",
    ),
    **_each(
        ("temperature", "top_k", "top_p", "max_new_tokens", "seed"),
        "crossfade.generate takes it",
    ),
}

# Arguments of `LogRatio`, `RewardModel` and `Reward`.
VALUE: dict[str, str] = {
    **_each(("weight", "scale"), "a value is multiplied by its weight: 0.5 * value"),
    **_each(("reference", "base"), "here it is ref"),
    **_each(("aligned", "policy"), "here it is tuned"),
    "function": "here it is fn",
    "model_tokenizer": "here it is tokenizer",
}

# Arguments of the searches.
SEARCH: dict[str, str] = {
    **_each(("beam_width", "beam_size", "num_beams", "beams", "k"), "here it is width"),
    **_each(("chunk_size", "chunk_len", "chunk", "block_size"), "here it is chunk_length"),
    **_each(("num_samples", "successors", "branching"), "here it is samples"),
    **_each(("reward", "reward_fn", "reward_model", "score", "scorer", "fn"), "here it is value"),
    **_each(
        ("temperature", "top_k", "top_p", "max_new_tokens", "seed"),
        "crossfade.generate takes it, beside search",
    ),
}

# Arguments of `ParticleFilter`.
PARTICLES: dict[str, str] = {
    **_each(
        ("num_particles", "particles", "n_particles", "width", "N"),
        "here it is n",
    ),
    **_each(("ess_threshold", "resample_threshold", "threshold"), "here it is resample_below"),
    **_each(("samples", "num_samples"), "each of the n rows goes on in as many as its weight says"),
    **_each(("beta", "tau", "softmax_temperature"), "values are divided by temperature"),
    **_each(
        ("selection_method", "selection"),
        "rows come back by value, the best first; Output.weights are those to draw one by",
    ),
    **{k: x for k, x in SEARCH.items() if k not in ("temperature", "num_samples")},
}

# Arguments of `crossfade.Judge`.
JUDGE: dict[str, str] = {
    **_each(
        ("system", "system_prompt", "question", "prefix", "labels", "noun"),
        "it belongs to the template: template=JudgeTemplate(...)",
    ),
    **_each(
        ("temperature", "top_p", "top_k", "do_sample", "max_new_tokens", "generation_config"),
        "a judge generates nothing: it compares the probabilities of two labels",
    ),
    **_each(("criteria", "aspects", "objectives", "rubric"), "aspects to judge are principles"),
    **_each(("batch_size", "per_device_eval_batch_size"), "here it is max_batch"),
}

# Arguments of a `Judge` that is called.
JUDGED: dict[str, str] = {
    **_each(
        ("prompts", "prompt", "context", "queries", "questions", "inputs", "messages", "history"),
        "what was answered are the contexts",
    ),
    **_each(
        ("chosen", "first", "a", "answers_a", "responses_a", "completions_a", "better"),
        "the answers a are firsts",
    ),
    **_each(
        ("rejected", "second", "b", "answers_b", "responses_b", "completions_b", "worse"),
        "the answers b are seconds",
    ),
    **_each(
        ("answers", "responses", "completions", "pairs"),
        "the two answers of each pair are in firsts and seconds",
    ),
    **_each(
        ("batch_size", "per_device_eval_batch_size"), "Judge(model, max_batch=...) has how many"
    ),
    **_each(
        ("max_batch", "template", "principles", "tokenizer"), "it belongs to Judge(model, ...)"
    ),
    **_each(("principle", "criteria", "aspects"), "Judge(model, principles=[...]) has them"),
    **_each(
        ("temperature", "top_p", "top_k", "do_sample", "max_new_tokens", "seed"),
        "a judge generates nothing: it compares the probabilities of two labels",
    ),
}

# Arguments of `Tournament`.
TOURNAMENT: dict[str, str] = {
    **_each(
        (
            *("width", "samples", "num_samples", "rows", "N", "k", "size", "best_of"),
            *("num_return_sequences", "num_generations"),
        ),
        "how many rows play is n",
    ),
    **_each(
        ("chunk_length", "chunk_size", "chunk_end", "chunk", "duplicate_finished"),
        "whole responses play; ChunkBeamSearch(value=...) samples in chunks",
    ),
    **_each(
        (
            *("value", "reward", "reward_fn", "reward_model", "score", "scorer", "fn"),
            *("prefer", "preference", "model", "comparator", "referee"),
        ),
        "here it is judge",
    ),
    **_each(
        ("tokenizer", "principles", "template", "labels"),
        "the judge has it: Judge(model, tokenizer=..., principles=...)",
    ),
    **_each(
        ("temperature", "top_k", "top_p", "max_new_tokens", "seed"),
        "crossfade.generate takes it, beside search",
    ),
}

# Arguments of `crossfade.MetaAligner`.
ALIGNER: dict[str, str] = {
    **_each(("name", "template", "query_name"), "what prompts call the query is noun"),
    **_each(("aspects", "principles", "criteria"), "here they are objectives"),
    **_each(
        ("temperature", "top_p", "top_k", "do_sample", "max_new_tokens", "generation_config"),
        "crossfade.correct takes it",
    ),
    **_each(
        ("adapter", "lora"),
        "it belongs to a term: MetaAligner(crossfade.Model(model, adapter=...))",
    ),
}

# Arguments of `crossfade.correct`, besides those of `crossfade.generate`.
CORRECT: dict[str, str] = {
    **_each(
        ("answers", "responses", "policy", "texts", "drafts", "completions"),
        "the answers, or the policy that writes them, are answers_or_policy, the third argument",
    ),
    **_each(
        ("prompts", "inputs", "contexts", "questions", "messages"),
        "what was answered are the queries, the second argument",
    ),
    **_each(("aspects", "principles", "criteria"), "here they are objectives"),
    **_each(("steps", "iterations", "n_rounds", "num_rounds"), "here it is rounds"),
    **_each(
        ("value", "reward", "reward_fn", "reward_model"),
        "search=crossfade.BestOfN(n, value) chooses by it, and accept=value keeps the old answer "
        "unless the new one scores higher",
    ),
}

# Arguments of `Engine`.
ENGINE: dict[str, str] = {
    **_each(
        ("batch_size", "max_batch_size", "max_batch"), "crossfade.generate takes it, as max_batch"
    ),
    **_each(("backend", "attn_implementation"), "simple=True is Hugging Face's own path"),
    "torch_compile": "here it is compile",
}

# Arguments of `Draft`.
DRAFT: dict[str, str] = {
    **_each(
        ("model", "draft_model", "assistant_model", "speculative_model", "blend", "term"),
        "here it is source, the first argument: Draft(model)",
    ),
    **_each(
        ("text", "answers", "responses", "prediction", "drafts"),
        "here it is texts, one for each request",
    ),
    **_each(
        (
            *("num_tokens", "num_assistant_tokens", "num_speculative_tokens", "max_tokens"),
            *("prompt_lookup_num_tokens", "n", "k", "gamma", "draft_max", "window"),
        ),
        "here it is length",
    ),
    **_each(
        ("temperature", "top_k", "top_p", "seed"),
        "a draft draws as the blend does, with the same noise",
    ),
    **_each(
        ("tokenizer", "assistant_tokenizer"),
        "a draft has the vocabulary of the blend",
    ),
}

# Arguments of `Support`.
SUPPORT: dict[str, str] = {
    **_each(("alpha", "threshold"), "contrastive decoding's alpha is min_p"),
    **_each(("model", "by"), "here it is term, the place of a term in the blend"),
}

# Arguments of a blend's `within`.
WITHIN: dict[str, str] = _each(
    ("term", "top_k", "top_p", "min_p"),
    "within(crossfade.Support(min_p=0.1)) takes it in a Support",
)

# Keys of inputs that are a mapping.
INPUTS: dict[str, str] = {
    **_each(
        ("prompt", "text", "texts", "prompts", "query", "question", "input", "inputs"),
        "pass the text itself",
    ),
    **_each(("messages", "conversation", "chat"), "pass the list of messages itself"),
    **_each(("role", "content"), "a message alone is no chat; pass a list: [message]"),
    **_each(("chosen", "rejected", "completion", "label"), "pass the prompts alone"),
}

# Keys of messages.
MESSAGE: dict[str, str] = {
    **_each(("from", "speaker", "author", "name"), "who speaks is 'role'"),
    **_each(("text", "value", "message", "body"), "what is said is 'content'"),
}

# Roles of messages.
ROLES: dict[str, str] = {
    **_each(("human", "customer", "prompter", "instruction"), "who asks is 'user'"),
    **_each(("bot", "ai", "gpt", "model", "assistent", "response"), "who answers is 'assistant'"),
    **_each(("sys", "instructions"), "what comes first is 'system'"),
    "function": "what a tool says is 'tool'",
}
