"""Models that compute log-probs by `linear_logp`: every field, every kind of head, no logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from crossfade.ops import native
from crossfade.training import add_linear_logp
from crossfade.training.fused_head import FIELDS
from crossfade.training.logits import Logits
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from trained_models import make
from trainer_runs import OLD_NAMES, trainer

pytestmark = OLD_NAMES


def ids_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(tiny.VOCAB, (3, 11), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)
    return ids, labels


@pytest.mark.parametrize("name", ["llama", "tied", "softcap", "scale", "scaling", "bias"])
def test_every_field(name: str) -> None:
    """Fields are compared with the log-softmax, in float64, of the model's own logits."""
    model, ids = make(name).eval(), ids_and_labels()[0]
    labels = ids_and_labels()[1]
    z = model(input_ids=ids).logits[:, :-1].double()
    temperature = 1.7
    z, targets = z / temperature, labels[:, 1:]
    log_p, mask = z.log_softmax(-1), targets != -100
    logp = log_p.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    add_linear_logp(model, temperature, outputs=FIELDS)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    expected = {
        "log_probs": logp,
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == targets,
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "label_mask": mask,
    }
    for field, want in expected.items():
        got = getattr(found, field)
        want = want & mask if want.dtype == torch.bool else (want * mask).float()
        torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-4, atol=2e-5, msg=field)
    want = -(logp * mask).sum() / mask.sum()
    torch.testing.assert_close(found.loss, want.float(), rtol=1e-5, atol=1e-6)
    sevenths = model(input_ids=ids, labels=labels, fused_lm_head=True, num_items_in_batch=7).loss
    torch.testing.assert_close(sevenths, found.loss * mask.sum() / 7)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    same = model(input_ids=ids, shift_labels=shifted, fused_lm_head=True)
    torch.testing.assert_close(same.log_probs[:, :-1], found.log_probs)

    grads = []
    for loss in (want.float(), found.loss):
        model.zero_grad()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


def test_own_calls_are_left(tmp_path: Path) -> None:
    model, (ids, labels) = make().eval(), ids_and_labels()
    before = model(input_ids=ids, labels=labels)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=ids * 0 + 1)
    add_linear_logp(model)
    after = model(input_ids=ids, labels=labels)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    again = model.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=ids * 0 + 1)
    assert torch.equal(generated, again)


def test_no_labels_at_all() -> None:
    """A microbatch may be without labels: its gradient is 0, and nothing fails."""
    model, ids = make(), ids_and_labels()[0]
    add_linear_logp(model, outputs=FIELDS)
    found = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    found.loss.backward()
    assert found.loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("scale", "softcap"), [(1.0, None), (0.25, None), (3.0, None), (0.25, 2.0), (3.0, 2.0)]
)
def test_scale_and_softcap(scale: float, softcap: float | None) -> None:
    """A cap and a temperature are enough to express ``c tanh(s x / c) / T``."""
    x = torch.linspace(-9, 9, 31, dtype=torch.float64)
    z = scale * x
    z = z if softcap is None else softcap * (z / softcap).tanh()
    cap, temperature = Logits(scale, softcap, 1.3).settings()
    y = x if cap == 0 else cap * (x / cap).tanh()
    torch.testing.assert_close(y / temperature, z / 1.3)


def test_autocast_leaves_the_head_alone() -> None:
    model, (ids, labels) = make(), ids_and_labels()
    add_linear_logp(model)
    hidden: list[torch.Tensor] = []
    model.base_model.register_forward_hook(lambda _, __, out: hidden.append(out[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    log_p = (hidden[0][:, :-1].double() @ model.lm_head.weight.double().T).log_softmax(-1)
    targets = labels[:, 1:]
    want = log_p.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1) * (targets != -100)
    torch.testing.assert_close(found, want.float(), rtol=1e-5, atol=1e-5)


def backward(**options: Any) -> tuple[int, list[torch.Tensor]]:
    """The head's products in the backward pass of the loss, and the gradients that it leaves."""
    model, (ids, labels) = make(), ids_and_labels()
    add_linear_logp(model, **options)
    loss = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        loss.backward()
    products = [e for e in seen.events() if e.name in ("aten::mm", "aten::addmm_")]
    of_head = [e for e in products if any(tiny.VOCAB in shape for shape in e.input_shapes)]
    return len(of_head), [p.grad for p in model.parameters()]


@pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="the native module is not built"
)
def test_mean_only() -> None:
    """With it the head's products are all made in the forward pass, and gradients are the same."""
    products, want = backward()
    assert products == 3
    products, got = backward(mean_only=True)
    assert products == 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(TypeError, match="mean_only is 1; it must be True or False"):
        add_linear_logp(make(), mean_only=1)


def test_former_name_of_mean_only() -> None:
    """It is taken for one release, with a warning that says what to write."""
    said = "add_linear_logp's uniform is now called mean_only"
    with pytest.warns(FutureWarning, match=said):
        products, got = backward(uniform=True)
    again, want = backward(mean_only=True)
    assert products == again
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    with (
        pytest.warns(FutureWarning, match=said),
        pytest.raises(TypeError, match="uniform is 1; it must be True or False"),
    ):
        add_linear_logp(make(), uniform=1)


class _Logits(TorchDispatchMode):
    """Notes all operations that make a float tensor of tokens times vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() < 2:
                continue
            if x.shape[-1] == tiny.VOCAB and x.shape[-2] != tiny.SIZES["hidden_size"]:
                self.found.append((str(func), list(x.shape)))
        return result


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_no_logits_in_a_step(tmp_path: Path, kind: str, lora: bool) -> None:
    """TRL's step makes logits. Ours does not, outside of the op, which has tests of its own."""
    for trls in (False, True):
        made = trainer(kind, tmp_path, trls=trls, lora=lora)
        batch = next(iter(made.get_train_dataloader()))
        made.create_optimizer_and_scheduler(1)
        made.current_gradient_accumulation_steps = 1
        with _Logits() as mode:
            made.training_step(made.model, batch, torch.tensor(5))
        assert bool(mode.found) == trls, mode.found


def test_adapter_on_head(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lm_head"):
        trainer("dpo", tmp_path, lora={"target_modules": ["lm_head"]})


def test_head_of_another_kind() -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = make()
    model.lm_head = Scaled(16, tiny.VOCAB, bias=False)
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM is a Scaled"):
        add_linear_logp(model)


def test_logits_that_config_does_not_tell() -> None:
    """A scale under a name that is not known here is found by what it does."""
    model = make()
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = forward
    with pytest.raises(NotImplementedError, match="more to its logits"):
        add_linear_logp(model)
    assert model.forward is forward
    scale = make("scale")
    scale.config.logit_scale = -0.5
    with pytest.raises(ValueError, match=r"-0\.5"):
        add_linear_logp(scale)


def test_modes_are_put_back() -> None:
    model = make()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    add_linear_logp(model)
    assert [m.training for m in model.modules()] == modes


def test_fields_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="outputs has 'mean_logit'; it must be among log_probs"):
        add_linear_logp(make(), outputs=("log_probs", "mean_logit"))


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_temperatures_that_are_none(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature is {temperature}"):
        add_linear_logp(make(), temperature)


def test_weight_in_pieces_is_trls() -> None:
    model, (ids, labels) = make(), ids_and_labels()
    add_linear_logp(model)
    want = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    model.lm_head.weight.ds_id = 1  # ZeRO-3 marks parameters so
    with pytest.warns(UserWarning, match="in pieces"):
        found = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, want)
