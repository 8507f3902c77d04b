"""What a blend costs: the models of its terms, of which shared ones count once."""

from __future__ import annotations

import pytest
import torch
from crossfade.blends.blend import Model, ValueHead
from crossfade.blends.terms import source_name
from small_terms import LMS, A, B, Q, llama, lora

# PEFT reads a property that Transformers calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


class TestCost:
    def test_shared_models_count_once(self):
        size = sum(p.numel() for p in LMS[0].parameters())
        blend = A + 0.5 * (Model(LMS[0], system="s", name="s") - B) + Q
        assert [(c.names, c.forwards, c.parameters) for c in blend.models] == [
            (("a", "s"), 2, size),
            (("b",), 1, size),
            (("q",), 1, size),
        ]
        assert blend.models.total.forwards == 4
        assert blend.models.total.bytes == 12 * size
        lines = str(blend.models).splitlines()
        assert lines[0].startswith("3 models: 4 forwards a token, ")
        assert lines[1].startswith("  a, s [LlamaForCausalLM]: 2 forwards a token, ")

    def test_peft_wrapper_and_its_base_are_one(self):
        model = lora("x")
        (cost,) = (Model(model, adapter="x") - Model(model.get_base_model())).models
        assert cost.forwards == 2
        assert cost.parameters == sum(p.numel() for p in model.parameters())

    def test_shared_parameters_count_once(self):
        other = llama()
        other.lm_head = LMS[0].lm_head
        first, second = (A + Model(other)).models
        assert second.parameters == first.parameters - LMS[0].lm_head.weight.numel()


class TestNames:
    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2_135M_Instruct"),
            (
                "/home/me/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/"
                "snapshots/12fd25f77366fa6b3b4b768ec3050bf629380bac",
                "SmolLM2_135M_Instruct",
            ),
            ("hub/models--gpt2/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e/", "gpt2"),
            ("C:\\models\\my-model", "my_model"),
            ("runs/dpo-kind/checkpoint-500", "dpo_kind_checkpoint_500"),
            ("/cache/smollm2-135m-instruct-b179c952-v1", "smollm2_135m_instruct"),
            ("org/llama-3.1-8b", "llama_3_1_8b"),
            ("org/gpt-decade", "gpt_decade"),
            ("runs/kind-20240131", "kind_20240131"),
            ("", "model0"),
            ("/", "model0"),
            ("org/7b", "_7b"),
        ],
    )
    def test_a_model_is_named_by_its_source(self, path, name):
        assert Model(llama(path)).__add__(A).names == (name, "a")

    def test_a_folder_that_one_is_in(self, tmp_path, monkeypatch):
        folder = tmp_path / "my-run" / "checkpoint-7"
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)
        assert source_name(".") == "my-run_checkpoint-7"
        assert source_name("..") == "my-run"
        monkeypatch.chdir(folder.parent)
        assert source_name("checkpoint-7") == "my-run_checkpoint-7"

    def test_one_source_in_two_dtypes(self):
        half = llama("org/lm").to(torch.bfloat16)
        blend = Model(llama("org/lm")) + 0.5 * Model(half) + ValueHead(llama("org/lm"))
        assert (*blend.names, *blend.value_names) == ("lm_float32", "lm_bfloat16", "lm_float32_2")
        assert (Model(half) + Model(llama("org/lm"), name="lm")).names == ("lm_bfloat16", "lm")
        assert (Model(half) + Model(half, system="s")).names == ("lm", "lm_2")
