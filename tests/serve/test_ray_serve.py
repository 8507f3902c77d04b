"""The server as a deployment of Ray Serve: the page's example, with a tiny model in its place."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_models import make, make_tokenizer

pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("default")]
PAGE = Path(__file__).parents[2] / "docs" / "ray.md"


def small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the page, whose model is saved in a folder."""
    sys.path.insert(0, str(PAGE.parent))
    import examples

    make("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    files = dict(e for e in examples.examples(PAGE.read_text()) if isinstance(e, tuple))
    load = f"cf.models.load({str(folder / 'model')!r}, 'cpu')"
    code = files["deployment.py"].replace("cf.models.smollm2()", load)
    assert load in code
    (folder / "ray_deployment.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    import ray_deployment

    return ray_deployment


def test_a_replica_serves_blends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc_reflection", reason="ray[serve] is not installed")
    from crossfade.bulk.ray.driver import cluster
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    deployment = small(tmp_path, monkeypatch)
    with cluster(1):
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(deployment.app)
        asked = {"model": "crossfade", "prompt": "the film", "max_tokens": 5, "temperature": 0}
        url = f"http://127.0.0.1:{port}/v1/completions"
        texts = []
        for w in (0, 1, 2):
            answer = httpx.post(url, json={**asked, "weights": {"w": w}}, timeout=60)
            assert answer.status_code == 200, answer.text
            texts.append(answer.json()["choices"][0]["text"])
        assert len(set(texts)) > 1
        with httpx.stream("POST", url, json={**asked, "stream": True}, timeout=60) as answer:
            assert answer.status_code == 200, answer.read()
            events = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        pieces = [choice["text"] for e in events[:-1] for choice in json.loads(e)["choices"]]
        assert "".join(pieces) == texts[0]
        serve.shutdown()
