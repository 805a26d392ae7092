"""What a program has made torch's defaults changes nothing of what is said, kept and learnt: all tensors have a dtype and a device of their own."""

import ast
import contextlib
import functools
from pathlib import Path

import pytest
import torch

import hf_osd
from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.metrics.intervals import interval
from hf_osd.system.default_device import default_device

PROMPTS = torch.randint(2, 64, (4, 1, 9), generator=torch.Generator().manual_seed(0))
DEFAULTS = ["float64", "bfloat16", "meta"]
SETTINGS = {
    "as it is": {},
    "rates tried, judged": {"learning_rate": "auto", "gate": True, "gate_tolerance": 1.0},
    "two rates": {"ensemble": [1, 2], "positions": "error"},
    "part of the head": {"sampled_columns": 4},
    "an adapter": {"adapter": "lora", "lora": 2},
    "rows of a head": {"draft_head": "traffic", "draft_vocab_size": 16},
    "a low-rank head": {"draft_head": "low_rank", "draft_vocab_size": 16},
    "in a thread": {"learn": "background"},
    "by cost": {"lookahead": "cost", "draft_cost": 0.05},
}


@contextlib.contextmanager
def default(name: str | None):
    if name is None:
        yield
    elif name == "meta":
        torch.set_default_device("meta")
        try:
            yield
        finally:
            torch.set_default_device(None)
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, name))
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=2, eos_token_id=None)


@pytest.fixture(scope="module")
def draft(target, noised_copy):
    return noised_copy(target, 0.1)


def run(target, draft, sample: bool = False, **settings):
    """What is said, kept and learnt of four requests."""
    settings = {
        "lookahead": "constant",
        "gate": False,
        "learning_rate": 1e-2,
        "update_interval": 10**6,
        "seed": 0,
        **settings,
    }
    said = []
    with OnlineAssistant(draft, **settings) as assistant:
        for i, prompt in enumerate(PROMPTS):
            torch.manual_seed(i)
            kwargs = {
                "max_new_tokens": 8,
                "do_sample": sample,
                "pad_token_id": 0,
                "attention_mask": torch.ones_like(prompt),
            }
            said.append(target.generate(prompt, assistant_model=assistant, **kwargs))
        assistant.flush()
        requests = assistant.buffer.requests()
        kept = [tensor for request in requests for tensor in request.tensors().values()]
        learnt = [p.detach().clone() for p in assistant.serving.active.parameters()]
        assert assistant.stats.failed_updates == 0
        return said, kept, learnt, assistant.score(requests), assistant.stats.total.accepted


def same(some, others):
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def plain_run(target, draft):
    """`plain_run(kind)`: `run` with these settings and no default, once for all tests."""
    return functools.cache(lambda kind: run(target, draft, **SETTINGS[kind]))


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("kind", SETTINGS)
def test_all_that_is_said_kept_and_learnt_is_as_without_it(target, draft, plain_run, kind, name):
    plain, settings = plain_run(kind), SETTINGS[kind]
    with default(name):
        under = run(target, draft, **settings)
    # peft draws an adapter's first weights in the default dtype.
    equal = (0, 1) if "adapter" in settings and name != "meta" else range(4)
    for i in equal:
        same(plain[i], under[i])
    assert [p.dtype for p in under[2]] == [p.dtype for p in plain[2]]
    assert under[4] == plain[4]
    assert any((a != b).any() for a, b in zip(under[2], draft.parameters(), strict=True))


@pytest.mark.parametrize("name", DEFAULTS)
def test_sampled_calls_are_served(target, draft, name):
    """transformers' own speculative sampling makes indices where the default is."""
    plain = run(target, draft, sample=True)
    with default(name):
        under = run(target, draft, sample=True)
    same(plain[0], under[0])
    same(plain[2], under[2])


@pytest.mark.parametrize("name", DEFAULTS)
def test_models_of_two_sizes(target, tiny_llama, name):
    """The draft's tokens are others than the target's."""
    small = tiny_llama(layers=1, vocab_size=48, eos_token_id=None)
    plain = [target.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0) for prompt in PROMPTS[:2]]
    from hf_osd.drafting.vocab_mapping import VocabMapping
    from hf_osd.feedback.recording import record_answers

    with default(name):
        translation = VocabMapping.from_sizes(64, 48)
        answers = record_answers(target, [prompt[0] for prompt in PROMPTS[:2]], 6, translation=translation)
        scores = OnlineAssistant(small, learn=False).score(answers)
    assert [answer.tokens.device.type for answer in answers] == ["cpu"] * 2
    for answer, said in zip(answers, plain, strict=True):
        words = [i for i in said[0, 9:].tolist() if i < 48]
        assert [i for i in answer.answer.tolist() if i in words] == words
    assert all(score.dtype == torch.float32 and score.device.type == "cpu" for score in scores)


@pytest.mark.parametrize("name", DEFAULTS)
def test_state_and_figures(target, draft, tmp_path, name):
    scores = [torch.rand(9, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    plain = interval(scores)
    with default(name):
        assert interval(scores) == plain
        config = OnlineConfig(update_interval=2, learning_rate=1e-2, seed=0, lookahead="constant")
        assistant, other = OnlineAssistant(draft, config), OnlineAssistant(draft, config)
        for prompt in PROMPTS:
            kwargs = {"max_new_tokens": 8, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
            target.generate(prompt, do_sample=False, assistant_model=assistant, **kwargs)
        assistant.flush()
        assistant.save_state(tmp_path, with_buffer=True)
        other.load_state(tmp_path)
        assert other.stats.updates == assistant.stats.updates > 0
        same(list(dict(assistant.serving.weights()).values()), list(dict(other.serving.weights()).values()))
        assert len(other.buffer) == len(assistant.buffer) > 0
        assert assistant.report()


def test_a_default_that_is_the_cpu_or_the_same_is_left_alone():
    """A mode in torch's way costs each of its calls a little."""
    assert isinstance(default_device("cpu"), contextlib.nullcontext)
    with torch.device("meta"):
        assert isinstance(default_device("cpu"), torch.device)
        with default_device("meta"):  # where offloaded weights are said to be
            assert torch.zeros(1).device.type == "cpu"
        assert torch.zeros(1).device.type == "meta"


def made_tensors():
    """The calls of torch in hf_osd that make a tensor out of nothing: file and line, name, and what they are told."""
    makers = {
        "zeros",
        "ones",
        "empty",
        "full",
        "rand",
        "randn",
        "randint",
        "randperm",
        "arange",
        "eye",
        "linspace",
        "tensor",
        "as_tensor",
    }
    for path in sorted(Path(hf_osd.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            function = node.func if isinstance(node, ast.Call) else None
            if (
                isinstance(function, ast.Attribute)
                and function.attr in makers
                and ast.unparse(function.value) == "torch"
            ):
                yield f"{path.name}:{node.lineno}", function.attr, {keyword.arg for keyword in node.keywords}


def test_every_tensor_that_is_made_says_where_it_lies_and_of_what_it_is():
    made = list(made_tensors())
    assert len(made) > 40
    whole = {"randint", "randperm", "arange", "tensor"}  # of whole numbers, where nothing else is said
    assert [where for where, _, told in made if "device" not in told] == []
    assert [where for where, name, told in made if "dtype" not in told and name not in whole] == []
