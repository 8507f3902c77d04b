"""What the caller asks for, as token ids for each term, each with its own prompt and padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import did_you_mean
from ..elsewhere import INPUTS
from ..reading import check_unicode
from .chats import plain_text, render
from .forms import Request, is_chat, is_ids, is_numbers, request, tensor, token_ids


@dataclass(frozen=True)
class Prompts:
    """Token ids ``[rows, length]`` int64, left-padded, and their mask (1 is a token, 0 padding).

    Attributes:
        items: the texts and chats that the ids were made of; None where they came as ids.
        chat: what chat templates are given besides a chat.
    """

    ids: Tensor
    mask: Tensor
    items: Sequence[Request] | None = None
    chat: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Prompts:
        return Prompts(self.ids.to(device), self.mask.to(device))

    def unpadded(self) -> list[list[int]]:
        rows = zip(self.ids.tolist(), self.mask.tolist(), strict=True)
        return [[i for i, real in zip(*row, strict=True) if real] for row in rows]


@dataclass(frozen=True)
class Requests:
    """Some requests, which may be a part of the caller's list.

    Attributes:
        padded: the tensors that they came in, if they did.
        numbers: the place of each in the caller's list. None: they are the whole list.
        total: how long the caller's list is; None if that is not known.
        chat: what chat templates are given besides a chat.
        refused: the places among these of those that are not decoded. They fail, and whoever made
            the requests has said why.
    """

    items: list[Request]
    padded: Prompts | None = None
    numbers: Sequence[int] | None = None
    total: int | None = None
    chat: Mapping[str, Any] = field(default_factory=dict)
    refused: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.items)

    def part_of(self, each: Any) -> Any:
        """These requests' part of a list or a tensor with an entry for each of the caller's."""
        if self.numbers is None:
            return each
        if isinstance(each, Tensor):
            return each[list(self.numbers)]
        return [each[i] for i in self.numbers]

    def number(self, i: int) -> int:
        """The place in the caller's list of the request that is number `i` here."""
        return i if self.numbers is None else self.numbers[i]


def left_pad(rows: Sequence[Sequence[int]], pad: int = 0) -> Prompts:
    """Rows of different lengths as one tensor on the CPU, with `pad` in front of the shorter ones.

    All rows end in the last column. Causal models read prompts so, as every row goes on from there;
    and texts whose last tokens are asked about, as those are then the last columns of all rows.
    """
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return Prompts(_int64(ids), _int64(mask))


def right_pad(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths ``[rows, longest]``, on the CPU, and their mask.

    Shorter rows end in `pad`. Encoders and classifiers read texts so. Hidden states are read so
    too: a causal model sees nothing of what follows a text, and tokens get the positions that
    Hugging Face counts by default.
    """
    width = max(map(len, rows))
    ids = [[*row, *[pad] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return _int64(ids), _int64(mask)


def _int64(rows: Sequence[Sequence[int]]) -> Tensor:
    # Without the dtype, rows that are all empty would be floats.
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def asks_nothing(name: str, value: Any, multimodal: bool = False) -> bool:
    """Whether an argument of a model changes nothing, so that it can be left out.

    That is so for None, for False, and for an empty list, mapping or tensor, as the processor of a
    multimodal model gives for a text without pictures. It is also so for token types which say
    that every token is text.
    """
    if value is None or value is False:
        return True
    if isinstance(value, (Mapping, list, tuple)):
        return not value
    of_types = name == "mm_token_type_ids" or (name == "token_type_ids" and multimodal)
    return isinstance(value, Tensor) and (value.numel() == 0 or (of_types and not value.any()))


def read_requests(
    inputs: Any,
    attention_mask: Any = None,
    pad: int | None = None,
    eos: Sequence[int] = (),
    multimodal: bool = False,
    name: str = "inputs",
) -> Requests:
    """The requests in `inputs`, in any of the forms that `crossfade.generate` takes.

    A tensor that comes without a mask counts as padded where it holds `pad`, unless `pad` is one
    of `eos`, as in Hugging Face. `multimodal` says whether the inputs are for a model that can also
    read other things than text. `name` is what errors call them.
    """
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            keys = [key for key in inputs if key != "attention_mask"]
            says = did_you_mean(keys[0], ["input_ids"], INPUTS) if keys else ""
            raise ValueError(f"{name} has the keys {[*inputs]}; it must have 'input_ids'{says}")
        for key, value in inputs.items():
            known = key in ("input_ids", "attention_mask")
            if not known and not asks_nothing(key, value, multimodal):
                says = did_you_mean(key, ["input_ids", "attention_mask"])
                raise NotImplementedError(
                    f"{name} has {key!r}, which is not supported; only 'input_ids' and "
                    f"'attention_mask' are{says}"
                )
        if attention_mask is not None and inputs.get("attention_mask") is not None:
            raise ValueError(f"attention_mask is given twice: in {name} and as an argument")
        if attention_mask is None:
            attention_mask = inputs.get("attention_mask")
        inputs = inputs["input_ids"]
    if isinstance(inputs, Tensor) or is_numbers(inputs):
        return _padded(tensor("input_ids", inputs), attention_mask, pad, eos)

    if hasattr(inputs, "tolist"):  # It is an array of texts or of rows.
        inputs = inputs.tolist()
    one = isinstance(inputs, str) or is_chat(inputs) or token_ids(name, inputs) is not None
    if one:
        inputs = [inputs]
        if attention_mask is not None:
            mask = tensor("attention_mask", attention_mask)
            attention_mask = mask[None] if mask.dim() == 1 else mask
    if not isinstance(inputs, Sequence) or isinstance(inputs, (bytes, bytearray)):
        raise TypeError(
            f"{name} is a {type(inputs).__name__}; it must be a text, a chat, token ids, a list of "
            "one of these, a tensor, or a mapping with input_ids and attention_mask"
        )
    if not inputs:
        raise ValueError(f"{name} is empty; it must have at least one request")
    items = [request(f"{name}[{i}]", item) for i, item in enumerate(inputs)]
    if attention_mask is not None:
        if not all(is_ids(item) for item in items):
            raise ValueError(f"attention_mask is set, but {name} has texts or chats; it is for ids")
        return _padded(tensor("input_ids", items), attention_mask, pad, eos)
    return Requests(items)


def term_prompts(
    requests: Requests,
    *,
    term: str,
    tokenizer: Any,
    system: str | Sequence[str] | None = None,
    prompt: Any = None,
    pad: int = 0,
) -> Prompts:
    """What one term reads: the requests, or prompts of its own, after its system prompt if any.

    The system prompt is one for all requests, or a list of one a request. With one, a text becomes
    a chat of the system prompt and the text. A chat that has a system message already gets the
    term's system prompt in front of it, in the same message.
    """
    if system is None and prompt is None and requests.padded is not None:
        return requests.padded
    items = requests.items if prompt is None else _own_prompts(requests, prompt, term)
    if system is not None:
        if isinstance(system, str):
            each = [system] * len(requests)
        else:
            each = _one_each(requests, f"system of {term}", system)
        items = [with_system(*pair, term) for pair in zip(items, each, strict=True)]
    rows = []
    for i, item in enumerate(items):
        try:
            rows.append(encode(item, tokenizer, term, requests.chat))
        except ValueError as error:
            raise ValueError(f"request {requests.number(i)}: {error}") from error
        if not rows[-1]:
            where = f"the prompt of request {requests.number(i)}"
            raise ValueError(f"{where} has no tokens for {term}")
    return replace(left_pad(rows, pad), items=items, chat=requests.chat)


def encode(
    item: Request,
    tokenizer: Any,
    term: str,
    chat: Mapping[str, Any] | None = None,
    *,
    whole: bool = False,
) -> list[int]:
    """Token ids of a request; a chat goes through the chat template, as `render` says.

    A text that already begins with a BOS gets no second one from its tokenizer.

    Args:
        term: what errors call its reader.
        chat: what the chat template is given besides.
    """
    if is_ids(item):
        return list(item)
    if tokenizer is None:
        kind = "text" if isinstance(item, str) else "chat"
        raise ValueError(
            f"tokenizer is None for {term}, whose prompt is a {kind}; "
            "give Model(..., tokenizer=...) or tokenizer=..., or pass token ids"
        )
    check_unicode(item, term)
    if not isinstance(item, str):
        try:
            text = render(item, tokenizer, chat, whole=whole)
        except Exception as error:  # A template is a program, which may raise whatever it likes.
            raise ValueError(
                f"the chat template of {term} cannot take the chat {item!r:.200}: {error}"
            ) from error
        # The template has written the special tokens already.
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(item)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _padded(ids: Tensor, mask: Any, pad: int | None, eos: Sequence[int]) -> Requests:
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.is_complex():
        raise TypeError(f"input_ids has dtype {ids.dtype}; it must be an integer tensor")
    if ids.dim() == 1:
        ids = ids[None]
        mask = None if mask is None else tensor("attention_mask", mask)
        mask = mask[None] if mask is not None and mask.dim() == 1 else mask
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"input_ids has shape {list(ids.shape)}; it must be [requests, length], not empty"
        )
    if mask is None:
        inferable = pad is not None and pad not in eos
        mask = ids.ne(pad) if inferable else torch.ones_like(ids)  # type: ignore[arg-type]
    else:
        mask = tensor("attention_mask", mask)
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}; it must be {list(ids.shape)}, as "
            "input_ids"
        )
    odd = (mask != 0) & (mask != 1)
    if odd.any():
        row, column = odd.nonzero()[0].tolist()
        raise ValueError(
            f"attention_mask of request {row} has {mask[row, column].item()}; it must be 1 for a "
            "token and 0 for padding"
        )
    mask = mask.long().to(ids.device)
    bad = (mask.diff(dim=1) < 0).any(dim=1) | (mask[:, -1] == 0)
    if bad.any():
        raise ValueError(
            f"attention_mask of request {int(bad.nonzero()[0])} is 0 after or without a 1; prompts "
            "must be left-padded (padding_side='left') and not empty"
        )
    prompts = Prompts(ids.long(), mask)
    return Requests(list(prompts.unpadded()), prompts)


def _own_prompts(requests: Requests, prompt: Any, term: str) -> list[Request]:
    """The prompts that `Model.prompt` gives: one for all requests, one each, or by a function."""
    if callable(prompt):
        own = [prompt(item) for item in requests.items]
    elif isinstance(prompt, str) or is_chat(prompt) or is_ids(prompt):
        own = [prompt] * len(requests)
    else:
        own = _one_each(requests, f"prompt of {term}", prompt)
    return [
        request(f"prompt of {term} for request {requests.number(i)}", item)
        for i, item in enumerate(own)
    ]


def _one_each(requests: Requests, name: str, each: Sequence[Any]) -> list[Any]:
    """The entries that these requests have in a list of one a request, which errors call `name`."""
    total = requests.total or len(requests)
    if requests.numbers is not None and requests.total is None:
        raise ValueError(
            f"{name} is a list with an entry a request, and the prompts have no length; they must "
            "be a list"
        )
    if len(each) != total:
        raise ValueError(f"{name} has {len(each)} entries; it must have {total}, one a request")
    return requests.part_of(list(each))


def with_system(item: Request, system: str, term: str) -> Request:
    """A request with a system prompt in front; a text becomes a chat, see `term_prompts`."""
    if isinstance(item, str):
        return [{"role": "system", "content": system}, {"role": "user", "content": item}]
    if is_ids(item):
        raise ValueError(
            f"system of {term} is set, but the request is token ids; a system prompt needs a text "
            "or a chat, which the chat template joins it to"
        )
    if item[0]["role"] == "system":
        joined = f"{system}\n\n{plain_text(item[0]['content'])}"
        return [{"role": "system", "content": joined}, *item[1:]]
    return [{"role": "system", "content": system}, *item]
