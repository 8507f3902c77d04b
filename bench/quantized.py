"""What rounding to 8 and 4 bits costs: perplexity, and KL from the float32 model, of SmolLM2.

    python bench/quantized.py --tokens 2000 --json bench/results/quantized.json

The text is what the float32 model itself samples at temperature 1, so that its own perplexity is
the exponential of its entropy. SmolLM2's
own weights come from a file of 4 bits.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAYERS = [(8, 32, False), (8, 32, True), (4, 32, False), (4, 32, True), (4, 64, True)]


@torch.no_grad()
def logps(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits[:, :-1].log_softmax(-1)


def compare(want: Tensor, got: Tensor, ids: Tensor) -> dict[str, float]:
    """Perplexity of the text under the model, and the mean KL a token, in nats."""
    own = got.gather(-1, ids[:, 1:, None])
    kl = (want.exp() * (want - got)).sum(-1)
    return {"perplexity": own.mean().neg().exp().item(), "kl": kl.mean().item()}


def measure(name: str, build: Any, ids: Tensor) -> list[dict[str, Any]]:
    import crossfade as cf

    want = logps(build(), ids)
    rows = [{"bits": 32, **compare(want, want, ids)}]
    for bits, group, head in LAYERS:
        got = logps(cf.quantize(build(), bits, group, head=head), ids)
        rows.append({"bits": bits, "group": group, "head": head, **compare(want, got, ids)})
    for row in rows:
        print(name, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import crossfade as cf

    torch.manual_seed(0)
    model, _ = cf.models.smollm2()
    start = torch.full((max(1, args.tokens // 100), 1), model.config.bos_token_id)
    ids = model.generate(start, do_sample=True, top_k=0, max_new_tokens=100, min_new_tokens=100)
    found = {"smollm2": measure("smollm2", lambda: cf.models.smollm2()[0], ids)}
    if args.json:
        about = {"torch": torch.__version__, "machine": platform.processor(), "command": __doc__}
        args.json.write_text(json.dumps({**about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
