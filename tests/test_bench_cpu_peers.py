"""The bench beside llama.cpp, which a fake plays here: what is written for it, and the figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))

import cpu_contenders  # noqa: E402
import cpu_peers  # noqa: E402
import cpu_tape  # noqa: E402
import decode_peers as peers  # noqa: E402
import llama_peer as llama  # noqa: E402
from reports import cpu_peers as report  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure the GPU"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT's own
]


@pytest.fixture(scope="module")
def model() -> Any:
    return peers.random_model(peers.TINY, "cpu", torch.float32)


class FakeWeights:
    """What `llama.Weights` gives, over a model of Transformers."""

    saved: ClassVar[dict[str, Any]] = {}

    def __init__(self, file: Path) -> None:
        self.model, self.bytes = self.saved[file.name.split(".")[0]], 1000


class FakeContext:
    """What `llama.Context` does, all of a row being read anew each time."""

    def __init__(self, weights: FakeWeights, rows: int, tokens: int, threads: int) -> None:
        self.weights, self.rows, self.context, self.tokens = weights, rows, None, tokens
        self.held: list[list[int]] = [[] for _ in range(rows)]

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.held]

    def close(self) -> None:
        self.held = []

    def keep(self, length: int) -> None:
        self.held = [row[:length] for row in self.held]

    def read(self, rows: Sequence[Sequence[int]], every: bool = False) -> np.ndarray:
        for row, tokens in zip(self.held, rows, strict=True):
            row.extend(tokens)
        assert max(self.lengths) <= self.tokens
        with torch.inference_mode():
            logits = self.weights.model(torch.tensor(self.held)).logits
        return (logits[0] if every else logits[:, -1]).numpy()


class FakeAlone(llama.Blended):
    def __init__(self, context: Any) -> None:
        super().__init__([context] * 3)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "INSTALLED", True)
    monkeypatch.setattr(llama, "build", lambda: {"version": "0", "system": "a fake"})
    monkeypatch.setattr(llama, "write", lambda m, f: FakeWeights.saved.update({f.stem: m}))
    monkeypatch.setattr(llama, "quantised", lambda file, kind: file)
    monkeypatch.setattr(llama, "Weights", FakeWeights)
    monkeypatch.setattr(llama, "Context", FakeContext)
    monkeypatch.setattr(llama, "Alone", FakeAlone)


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], faked: None) -> None:
    """Parts that are measured later join those that are in the file."""
    file, options = tmp_path / "peers.json", ["--quick", "--rounds=1", "--new-tokens=12"]
    cpu_peers.main([*options, "--only", "errors", "steps", "--batch", "1", f"--json={file}"])
    cpu_peers.main([*options, "--only", "prompts", f"--json={file}"])
    found = json.loads(file.read_text())
    assert report.render(found) in capsys.readouterr().out
    assert list(found["parts"]) == ["errors", "steps", "prompts"]
    steps = found["parts"]["steps"]["rows"]
    keys = {(r["of"], r["by"], r["weights"]) for r in steps}
    assert len(keys) == len(steps)
    assert {(report.ONE, report.LLAMA, k) for k in llama.KINDS} <= keys
    assert {(report.THREE, report.NUMPY, k) for k in llama.KINDS} <= keys
    assert (report.ADAPTERS, report.MODULES, "float32") in keys
    for r in steps:
        assert r["step_ms"] > 0
        assert r["floor_ms"] == max(r["read_ms"], r["products_ms"]) > 0
    errors = {(r["by"], r["weights"]): r["kl"] for r in found["parts"]["errors"]["rows"]}
    assert errors[report.LLAMA, "F16"] == pytest.approx(0.0, abs=1e-9)


def test_what_a_token_costs_beyond_the_kernels(model: Any) -> None:
    (row,) = cpu_tape.measure([("tiny", cpu_tape.cf.Model(model))], new=12, turns=3)
    assert row["taped"]
    parts = row["other_instructions_ms"] + row["outside_tape_ms"]
    assert row["beyond_ms"] == pytest.approx(parts, abs=0.002)
    assert 0 < row["kernels_ms"] < row["token_ms"]


def test_all_families_are_there() -> None:
    for name, kind in cpu_tape.FAMILIES.items():
        config = cpu_tape.family(kind, cpu_tape.TINY).config
        assert config.model_type == kind, name
        assert config.hidden_size == cpu_tape.TINY["hidden_size"]


def test_the_loop_around_llama_draws_from_the_blend() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(1, 200, generator=generator) for _ in range(3)]
    expected = peers.Recipe(lambda: None).probabilities(torch.zeros(1, 1).long(), logits)[0]
    rows = [x.expand(20_000, -1).numpy() for x in logits]
    drawn = torch.from_numpy(llama.blend(rows, np.random.default_rng(0)))
    found = torch.bincount(drawn, minlength=200) / 20_000
    assert not found[expected == 0].any()
    assert (found - expected).abs().sum() / 2 < 0.02


def test_the_loop_around_llama_reads_a_prompt_once(model: Any, faked: None) -> None:
    FakeWeights.saved["0"] = model
    context = FakeContext(FakeWeights(Path("0.gguf")), 2, 20, 1)
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        tokens = llama.Blended([context] * 3)(ids[:, :], 3, True)
        assert tokens.shape == (2, 3)
        for row, prompt in zip(context.held, ids.tolist(), strict=True):
            assert row[:8] == prompt[:8]


def test_distances(model: Any) -> None:
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([1, 2, 3, 4])
    assert cpu_contenders.distance(logits, logits, ids)["kl"] == 0.0
    other = logits * 0.5
    p, q = logits.double().softmax(-1), other.double().softmax(-1)
    found = cpu_contenders.distance(logits, other, ids)
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    of = [[float(x[i, ids[i + 1]]) for i in range(3)] for x in (p, q)]
    ratio = (np.prod(of[0]) / np.prod(of[1])) ** (1 / 3)
    assert found["perplexity_ratio"] == pytest.approx(ratio)
    assert found["same_best"] == 1.0


def test_ratios_are_of_the_same_rounds() -> None:
    median, low, high = report.ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0])
    assert (median, low, high) == (2.0, 2.0, 3.0)


def test_llama_reads_what_is_written_for_it(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    llama.write(model, tmp_path / "tiny.gguf")
    ids = torch.randint(3, 500, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        truth: Tensor = model(ids).logits[0]
    for kind, most in (("F16", 1e-3), ("Q8_0", 0.1)):
        file = tmp_path / "tiny.gguf"
        if kind != "F16":
            file = llama.quantised(file, kind)
        context = llama.Context(llama.Weights(file), 1, 16, 1)
        logits = torch.from_numpy(context.read(ids.tolist(), every=True).copy())
        assert cpu_contenders.distance(truth, logits, ids[0])["kl"] < most
        context.close()
