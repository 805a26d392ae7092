"""Learning that goes on and changes nothing is said, once, and in the report."""

import copy
import logging
from types import MethodType

import pytest
from transformers import (
    FlintConfig,
    FlintForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from hf_osd import OnlineAssistant, grow_draft
from hf_osd.learning.trouble import FAILS, STANDS, WAITS, trouble

from ..served import GREEDY, PROMPTS, serve

LEARNS = {"gate": False, "seed": 0, "learning_rate": 1e-2, "learning_budget": 1.0, "warmup_steps": 0}


def failing(draft):
    """It reads any text as long as nobody wants gradients of it."""

    def forward(self, *args, **kwargs):
        if self.training:
            raise RuntimeError("no training here")
        return type(self).forward(self, *args, **kwargs)

    draft.forward = MethodType(forward, draft)
    return draft, {}, FAILS


def cut_off(draft):
    """Its logits do not hang on its weights."""

    def forward(self, *args, **kwargs):
        outputs = type(self).forward(self, *args, **kwargs)
        outputs.logits = outputs.logits.detach() + 0 * outputs.logits
        return outputs

    draft.forward = MethodType(forward, draft)
    return draft, {}, STANDS


def slow(draft):
    return draft, {"learning_rate": 1e-30}, STANDS


@pytest.mark.parametrize("make", [failing, cut_off, slow])
@pytest.mark.parametrize("learn", ["inline", "background"])
def test_a_draft_that_learns_nothing_is_said_once(target, draft, make, learn, caplog):
    given, fields, message = make(copy.deepcopy(draft))
    with OnlineAssistant(given, **{**LEARNS, "update_interval": 10**6, "learn": learn} | fields) as assistant:
        for i in range(4):
            serve(target, assistant, PROMPTS[i : i + 1])
            assistant.flush()
            known = i > (message is FAILS)  # after a failure an update is left out
            assert sum(record.getMessage() == message for record in caplog.records) == known
            assert (assistant.stats.trouble == message) == known
        assert message in assistant.report()
        assert [record.levelno for record in caplog.records if record.getMessage() == message] == [logging.WARNING]


def test_a_draft_that_learns_is_in_no_trouble(target, draft, caplog):
    assistant = OnlineAssistant(draft, **LEARNS, update_interval=1)
    serve(target, assistant, PROMPTS[:4])
    assistant.flush()
    assert assistant.stats.updates > 1
    assert assistant.stats.trouble is None
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_one_failure_or_a_success_between_them_is_no_trouble():
    assert trouble(1, 0, 0) is trouble(5, 1, 0) is trouble(0, 1, 1) is None
    assert trouble(2, 0, 0) == FAILS
    assert trouble(3, 9, 2) == STANDS


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "eos_token_id": None}
SIZES |= {"num_hidden_layers": 4, "num_key_value_heads": 2, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
SHARED = {"num_experts": 4, "shared_expert_intermediate_size": 24}


def flint():
    """Its first two layers have no router by default."""
    return FlintForCausalLM(FlintConfig(**SIZES, **SHARED, head_dim=8, sliding_window=8))


def qwen2_moe():
    config = Qwen2MoeConfig(**SIZES, **SHARED, mlp_only_layers=[0, 1], output_router_logits=True)
    return Qwen2MoeForCausalLM(config)


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True))


@pytest.mark.parametrize("gate", [True, False])
def test_who_flushes_hears_once_that_what_was_learnt_does_not_serve_yet(target, draft, caplog, gate):
    assistant = OnlineAssistant(draft, **{**LEARNS, "gate": gate, "update_interval": 1})
    serve(target, assistant, PROMPTS[:2])
    assert WAITS not in caplog.messages, "nobody has asked"
    for prompt in PROMPTS[2:4]:
        serve(target, assistant, [prompt])
        assistant.flush()
    assert assistant.stats.updates
    assert bool(assistant.stats.draft_version) is not gate
    assert caplog.messages.count(WAITS) == gate


def test_who_flushes_what_serves_hears_nothing(target, draft, caplog):
    assistant = OnlineAssistant(draft, **{**LEARNS, "gate": True, "gate_tolerance": 1.0, "update_interval": 1})
    serve(target, assistant, PROMPTS)
    assistant.flush()
    assert assistant.stats.accepted_updates
    assert WAITS not in caplog.messages


@pytest.mark.parametrize("make", [flint, qwen2_moe, mixtral])
def test_a_draft_of_a_mixture_of_experts_learns_whether_or_not_its_layers_have_a_router(make):
    target = make().eval()
    assistant = OnlineAssistant(grow_draft(target), **LEARNS, update_interval=1)
    before = assistant.stats.draft_version
    for prompt in PROMPTS[:3]:
        assert target.generate(prompt, **GREEDY).equal(target.generate(prompt, assistant_model=assistant, **GREEDY))
    assert assistant.flush()
    assert (assistant.stats.failed_updates, assistant.stats.trouble) == (0, None)
    assert assistant.stats.draft_version > before
    assert not assistant.config.output_router_logits
