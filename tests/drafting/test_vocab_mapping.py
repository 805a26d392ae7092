"""Between vocabularies: what is shared, how text is read anew, and that no token is lost on the way."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_osd.drafting.vocab_mapping import VocabMapping


def words(*vocabulary, eos=None, bos=None, sign=None):
    """A tokenizer of words; with `sign`, one that spells words by characters and a leading sign, as byte-level BPE does."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if sign is not None:
        pieces = pre_tokenizers.Split(Regex(f"{sign}?."), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(replacement=sign, prepend_scheme="never"), pieces]
        )
        made.decoder = decoders.Metaspace(replacement=sign, prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=vocabulary[0], eos_token=eos, bos_token=bos)


def test_one_vocabulary_is_handed_through():
    same = VocabMapping.from_sizes(10, 10)
    tokens, logits = torch.tensor([3, 4]), torch.randn(2, 10)
    assert same.is_identity
    assert same.to_draft_prompt(tokens) is tokens
    assert same.to_target_scores(logits) is logits
    assert same.to_draft_ids([3, 4]) == [[3], [4]]
    assert same.shared_columns(logits.device) is None


@given(st.integers(2, 12), st.integers(2, 12), st.data())
def test_padding_is_never_proposed_and_always_read(target_size, draft_size, data):
    mapping = VocabMapping.from_sizes(target_size, draft_size, unk_id=1)
    shared = min(target_size, draft_size)
    scores = mapping.to_target_scores(torch.randn(3, draft_size))
    assert scores.shape == (3, target_size)
    assert scores[:, :shared].isfinite().all()
    assert (scores[:, shared:] == -torch.inf).all()
    prompt = data.draw(st.lists(st.integers(0, target_size - 1), min_size=1, max_size=5))
    read = mapping.to_draft_prompt(torch.tensor(prompt))
    assert read.tolist() == [i if i < draft_size else 1 for i in prompt]


def test_one_tokenizer_is_recognised_by_its_vocabulary():
    ours, theirs = words("<unk>", "a", "b"), words("<unk>", "a", "b")
    assert VocabMapping.from_tokenizers(ours, theirs, 5, 5).is_identity
    padded = VocabMapping.from_tokenizers(ours, theirs, 5, 4)
    assert padded.shared[0].tolist() == padded.shared[1].tolist() == [0, 1, 2, 3]


def test_words_are_matched_by_string_and_ends_by_meaning():
    ours = words("<unk>", "a", "b", "c", "</s>", eos="</s>")
    theirs = words("<end>", "c", "b", "x", "<unk>", eos="<end>")
    mapping = VocabMapping.from_tokenizers(ours, theirs, 5, 5)
    pairs = dict(zip(*(ids.tolist() for ids in mapping.shared), strict=True))
    assert pairs == {0: 4, 2: 2, 3: 1, 4: 0}
    logits = torch.arange(5.0)[None]
    assert mapping.to_target_scores(logits)[0].tolist() == [4.0, -torch.inf, 2.0, 1.0, 0.0]
    assert mapping.shared_to_draft(torch.tensor([[3]])).tolist() == [[1]]


def test_rows_beyond_the_head_are_not_proposed():
    """Tokenizers may have tokens that a model has no row for."""
    ours, theirs = words("<unk>", "a", "b", "c"), words("<unk>", "c", "b", "a")
    mapping = VocabMapping.from_tokenizers(ours, theirs, 3, 2)
    assert [ids.tolist() for ids in mapping.shared] == [[0], [0]]


def test_the_sign_of_a_space_does_not_matter():
    ours, theirs = words("<unk>", "Ġa", "b", "Ġ", sign="Ġ"), words("<unk>", "▁", "▁a", "b", sign="▁")
    assert ours.convert_ids_to_tokens(ours(" ab")["input_ids"]) == ["Ġa", "b"]
    mapping = VocabMapping.from_tokenizers(ours, theirs, 4, 4)
    assert [ids.tolist() for ids in mapping.shared] == [[0, 1, 2, 3], [0, 2, 3, 1]]


def test_a_prompt_is_read_anew_but_for_its_special_tokens():
    ours = words("<unk>", "<s>", "ab", "c", "</s>", "<chat>", bos="<s>", eos="</s>")
    ours.add_special_tokens({"additional_special_tokens": ["<chat>"]})
    spelling = words("<u>", "</s>", "a", "b", "c", eos="</s>")
    spelling.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    mapping = VocabMapping.from_tokenizers(ours, spelling, 6, 5)
    read = mapping.to_draft_prompt(torch.tensor([1, 2, 3, 4, 5, 3]))
    # <s> and <chat> are nothing to the draft; </s> is its own.
    assert spelling.convert_ids_to_tokens(read.tolist()) == ["a", "b", "c", "</s>", "c"]
    assert mapping.to_draft_ids([2, 3, 1]) == [[2, 3], [4], [0]]  # none has no tokens: the unknown one stands in


def test_a_prompt_of_nothing_the_draft_knows_still_has_a_token():
    ours, theirs = words("<unk>", "<s>", "a", bos="<s>"), words("<u>", "a")
    mapping = VocabMapping.from_tokenizers(ours, theirs, 3, 2)
    assert mapping.to_draft_prompt(torch.tensor([1])).tolist() == [0]


def test_nothing_in_common_is_refused():
    with pytest.raises(ValueError, match=r"share no token.*grow_draft"):
        VocabMapping.from_tokenizers(words("<u>", "a"), words("<x>", "b"), 2, 2)


def test_ids_without_an_embedding_are_replaced():
    """An image's place lies beyond both vocabularies, or below 0; and a tokenizer may know words that the draft has no embedding of."""
    beyond = torch.tensor([3, 10, -200, 4])
    assert VocabMapping.from_sizes(10, 10, unk_id=1, num_embeddings=10).to_draft_prompt(beyond).tolist() == [
        3,
        1,
        1,
        4,
    ]
    assert VocabMapping.from_sizes(12, 10, unk_id=1, num_embeddings=10).to_draft_prompt(beyond).tolist() == [
        3,
        1,
        1,
        4,
    ]
    fewer = VocabMapping.from_sizes(10, 10, unk_id=1, num_embeddings=8)
    assert not fewer.is_identity
    assert fewer.to_draft_ids([7, 8, 9]) == [[7], [1], [1]]
    assert fewer.to_target_scores(torch.zeros(1, 10))[0, 8:].tolist() == [-torch.inf] * 2
    ours, theirs = words("<unk>", "a", "b", "c"), words("<unk>", "b", "c", "a")
    mapping = VocabMapping.from_tokenizers(ours, theirs, 4, 4, num_embeddings=3)
    assert mapping.to_draft_prompt(torch.tensor([1, 2, 9, 3])).max() < 3
    assert mapping.to_draft_ids([1, 2, 9]) == [[0], [1], [0]]
