"""`crossfade.score`: log-probs of given responses under a blend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..blend import Blend, as_blend
from ..ops import check
from ..reading import check_unicode
from ..terms import is_multimodal
from .call import Call
from .contexts import check_context
from .forms import tensor, token_ids
from .inputs import Prompts, read_requests
from .members import references_of
from .mixer import Mixer
from .output import Scores
from .own_loop import why_alone
from .simple_runner import forced
from .term_model import TermModel, positions_of
from .writing import Writing


@torch.no_grad()
def score(
    blend: Any,
    prompts: Any,
    responses: Any,
    *,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
    return_term_logprobs: bool = False,
    kl_to: Any = None,
) -> Scores:
    """Teacher-forced log-probs of `responses` after `prompts` under a blend at temperature 1.

    What `crossfade.generate` gives as `logprobs` when it writes the same tokens, in one forward of
    each model over all of them: perplexities, harnesses, importance weights. The whole batch is
    read at once; cut it where its logits ``[requests, tokens, V]`` do not fit. A model whose rows
    depend on what is beside them (recurrent states, RoPE frequencies that change with the length)
    reads each row alone, a token of the response at a time, as it would write it.

    Args:
        blend: a `Blend`, a `Model` or a bare Hugging Face causal LM.
        prompts: as `inputs` of `crossfade.generate`; every term reads its own.
        responses: one a prompt (or one alone): lists of token ids, as `Output.responses` gives
            them, or texts, as `Output.text` does. The tokens of a text are those by which prompt
            and response together go on from the first term's prompt, without an EOS. Where a token
            would span the two, the prompt stays as it is, and the response is encoded as if after a
            character that it shares no token with. In a chat it is the content of an answer.
        tokenizer, attention_mask, return_term_logprobs, kl_to: as in `crossfade.generate`.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """
    blend = as_blend(blend)
    check.flag("return_term_logprobs", return_term_logprobs)
    call = Call(blend, tokenizer, references_of(blend, kl_to))
    members, models = call.members, call.models
    requests = read_requests(
        prompts, attention_mask, multimodal=is_multimodal(blend.terms[0].model)
    )
    read = call.prompts(requests)
    writing = call.writing(read)
    written = _responses(responses, writing, len(requests), members.vocabulary)
    device = models[0].device

    def mixer_of(x: Blend, references: Any = ()) -> Mixer:
        weights = x.row_weights(len(requests), device), x.row_value_weights(len(requests), device)
        return Mixer(x, *weights, members.vocabulary, references=references)

    references = [(mixer_of(r.blend), r.columns) for r in members.references]
    mixer = mixer_of(blend, references)

    tokens, real = _right_pad(written)
    steps = tokens.shape[1]
    logits = []
    for model, prompt in zip(models, read, strict=True):
        check_context(model, prompt.mask.sum(dim=1), written)
        logits.append(_logits(model, prompt, written).to(device))

    tokens, real = tokens.to(device), real.to(device)
    log_p, terms, kl = [], [], []
    for t in range(steps):
        at, now = tokens[:, t : t + 1], [z[:, t] for z in logits]
        log_p.append(mixer.log_probs(now).gather(1, at))
        if return_term_logprobs:
            terms.append(torch.cat([p.gather(1, at) for p in mixer.term_log_probs(now)], dim=1))
        if references:
            kl.append(mixer.divergences(now))
    return Scores(
        logprobs=torch.cat(log_p, dim=1).masked_fill(~real, 0.0),
        lengths=real.sum(dim=1),
        term_logprobs=torch.stack(terms, dim=1).masked_fill(~real[..., None], 0.0)
        if return_term_logprobs
        else None,
        kl=torch.cat(kl, dim=1).masked_fill(~real, 0.0) if references else None,
    )


def _logits(model: TermModel, prompts: Prompts, responses: list[list[int]]) -> Tensor:
    """Logits ``[requests, tokens, V]`` before each token of the responses, padded on the right.

    The last token of a response is not read.
    """
    tokens, real = _right_pad([r[:-1] for r in responses])
    read = Prompts(
        torch.cat([prompts.ids.cpu().masked_fill(prompts.mask.cpu() == 0, 0), tokens], dim=1),
        torch.cat([prompts.mask.cpu(), real.long()], dim=1),
    ).to(model.device)
    if why_alone(model, read.ids.shape[1]) is not None:
        each = zip(prompts.unpadded(), responses, strict=True)
        return pad_sequence([forced(model, p, r) for p, r in each], batch_first=True)
    mask = None if read.mask.all() else read.mask
    return model.read(read.ids, mask, positions_of(read.mask), keep=tokens.shape[1] + 1)


def _responses(
    responses: Any, writing: Writing | None, requests: int, vocabulary: int
) -> list[list[int]]:
    if isinstance(responses, str) or token_ids("responses", responses) is not None:
        responses = [responses]
    elif hasattr(responses, "tolist"):  # a tensor or an array, a row a response
        responses = tensor("responses", responses)
        responses = list(responses) if responses.dim() else responses
    if not isinstance(responses, Sequence):
        raise TypeError(
            f"responses is a {type(responses).__name__}; it must be a list of texts or of token ids"
        )
    if len(responses) != requests:
        raise ValueError(
            f"responses has {len(responses)} entries; it must have {requests}, one a prompt"
        )
    rows = []
    for i, given in enumerate(responses):
        if isinstance(given, str):
            if writing is None:
                raise ValueError("tokenizer is None; texts as responses need one (or give ids)")
            check_unicode(given, f"responses[{i}]")
            (response,) = writing.tokens([i], [given])
        else:
            response = token_ids(f"responses[{i}]", given) or []
        if not response:
            raise TypeError(
                f"responses[{i}] is {given!r:.80}; it must be a text or token ids, not empty"
            )
        outside = [t for t in response if not 0 <= t < vocabulary]
        if outside:
            raise ValueError(
                f"responses[{i}] has id {outside[0]}; ids must be within [0, {vocabulary})"
            )
        rows.append(response)
    return rows


def _right_pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids ``[rows, longest]`` with zeros after the end, and which of them are real."""
    width = max(map(len, rows))
    padded = [row + [0] * (width - len(row)) for row in rows]
    ids = torch.tensor(padded, dtype=torch.int64, device="cpu")  # all of them may be empty
    lengths = torch.tensor([len(row) for row in rows], device="cpu")
    return ids, torch.arange(width, device="cpu") < lengths[:, None]
