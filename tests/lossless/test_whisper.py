"""Whisper, whose own `generate` decodes segments, falls back to other temperatures, and treats a call with an assistant in its own way."""

import copy

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

import hf_osd
from hf_osd import OnlineAssistant

EOS, START, TIMESTAMPS = 50, 51, 120  # the last one is <|notimestamps|>; those above it are times
KWARGS = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def target():
    """Says many things at random, and may end."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=200,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=64,
        pad_token_id=EOS,
        bos_token_id=EOS,
        eos_token_id=EOS,
        decoder_start_token_id=START,
    )
    made = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    settings = made.generation_config
    settings.max_length = None
    settings.no_timestamps_token_id, settings.is_multilingual = TIMESTAMPS, False
    settings.suppress_tokens, settings.begin_suppress_tokens = [7], None
    return made


@pytest.fixture
def audio():
    return torch.randn(1, 8, 100, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["draft", "suffix cache"])
def assistant(request, target, noised_copy):
    if request.param == "draft":
        return OnlineAssistant(noised_copy(target, 0.02), learn=False, lookahead="constant", suffix_cache=False)
    return OnlineAssistant(lookahead="constant")


@pytest.fixture
def first(target, audio):
    """What is said first where nothing is suppressed."""
    return int(target.generate(audio, max_new_tokens=3)[0, 0])


def settings_of(target, **changed):
    settings = copy.deepcopy(target.generation_config)
    for name, value in changed.items():
        setattr(settings, name, value)
    return settings


@pytest.mark.parametrize("given", ["by the model", "in a generation config", "as an argument"])
def test_what_is_suppressed_at_the_beginning_is_so_with_an_assistant(
    target, audio, assistant, first, given, monkeypatch
):
    kwargs = dict(KWARGS)
    if given == "by the model":
        monkeypatch.setattr(target.generation_config, "begin_suppress_tokens", [first, EOS])
    elif given == "in a generation config":
        kwargs["generation_config"] = settings_of(target, begin_suppress_tokens=[first, EOS])
    else:
        kwargs["begin_suppress_tokens"] = [first, EOS]
    plain = target.generate(audio, **kwargs)
    assert plain[0, 0] != first
    for _ in range(2):  # the cache knows the answer by then
        assert torch.equal(plain, target.generate(audio, assistant_model=assistant, **kwargs))
    assert assistant.stats.total.accepted > 0


def test_of_several_segments_each_begins_so(target, assistant, first, monkeypatch):
    monkeypatch.setattr(target.generation_config, "begin_suppress_tokens", [first, EOS])
    long = torch.randn(1, 8, 260, generator=torch.Generator().manual_seed(4))
    kwargs = {**KWARGS, "return_timestamps": True}
    plain = target.generate(long, **kwargs)
    assert plain.shape[1] > KWARGS["max_new_tokens"]
    for _ in range(2):
        assert torch.equal(plain, target.generate(long, assistant_model=assistant, **kwargs))
    assert assistant.stats.total.requests > 2


def test_silence_is_found_where_plain_decoding_finds_it(target, audio, assistant):
    """By a processor that looks at the target's first row and is read after the call; what a draft says is not what it looks at."""
    kwargs = {**KWARGS, "return_timestamps": True, "logprob_threshold": 0.0, "temperature": 0.0}
    lengths = set()
    for seed in range(6):
        sound = torch.randn(1, 8, 160, generator=torch.Generator().manual_seed(seed))
        for threshold in (1e-6, 0.5):
            plain = target.generate(sound, no_speech_threshold=threshold, **kwargs)
            lengths.add(plain.shape[1])
            output = target.generate(sound, no_speech_threshold=threshold, assistant_model=assistant, **kwargs)
            assert torch.equal(plain, output)
    assert len(lengths) > 1


def test_the_models_settings_are_left_as_they_are(target, audio, noised_copy, monkeypatch):
    monkeypatch.setattr(target.generation_config, "begin_suppress_tokens", [9, EOS])
    assistant = OnlineAssistant(noised_copy(target, 0.02), learn=False)
    before = target.generation_config.to_dict(), assistant.generation_config.to_dict()
    target.generate(audio, assistant_model=assistant, **KWARGS)
    assert (target.generation_config.to_dict(), assistant.generation_config.to_dict()) == before


def test_a_call_within_a_call_has_the_assistant_that_it_was_given(target, audio):
    outer, inner = OnlineAssistant(), OnlineAssistant()
    plain = target.generate(audio, **KWARGS)
    said = []

    def watch(progress):
        if not said:
            said.append(target.generate(audio, **KWARGS))
            said.append(target.generate(audio, assistant_model=inner, **KWARGS))

    output = target.generate(audio, assistant_model=outer, monitor_progress=watch, **KWARGS)
    assert all(torch.equal(plain, one) for one in (*said, output))
    assert (outer.stats.total.requests, inner.stats.total.requests) == (1, 1)


def test_stock_assistants_see_what_they_saw(target, audio, noised_copy, first, monkeypatch):
    """transformers lets them begin with what is suppressed: no business of ours."""
    monkeypatch.setattr(target.generation_config, "begin_suppress_tokens", [first, EOS])
    draft = noised_copy(target, 0.02)
    hf_osd.disable()
    closed = target.generate(audio, assistant_model=draft, **KWARGS)
    hf_osd.enable()
    assert torch.equal(closed, target.generate(audio, assistant_model=draft, **KWARGS))
    assert closed[0, 0] == first
