"""`SuffixCache`, `CallSuffixes` and `SuffixCaches`: what a match proposes, that borders hold, and that memory is bounded."""

import gc
import random
import threading
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.drafting.suffix_cache import CallSuffixes, Continuation, SuffixCache, SuffixCaches

ROOMY = 2**24
tokens = st.integers(0, 3)  # few, so that phrases recur


def cache_of(*texts, max_bytes=ROOMY):
    cache = SuffixCache(max_bytes)
    for text in texts:
        cache.add(text)
    return cache


def words(seed, count, vocab=30_000):
    return random.Random(seed).choices(range(vocab), k=count)


def brute_force(texts, suffix, most):
    """Every place of every text compared with the suffix, and every vote counted. Without the bound on occurrences."""
    places, longest = [], 0
    for text in texts:
        for at in range(1, len(text)):
            match = 0
            while match < min(at, len(suffix), 32) and text[at - match - 1] == suffix[-match - 1]:
                match += 1
            if match > longest:
                places, longest = [], match
            if match == longest > 0:
                places.insert(0, text[at:])
    proposed, agreement = [], []
    while len(proposed) < most:
        places = [rest for rest in places if rest]
        if not places:
            break
        votes = Counter(rest[0] for rest in places)  # keeps the order in which it met them: the most recent first
        token, count = votes.most_common(1)[0]
        proposed.append(token)
        agreement.append(count / len(places))
        places = [rest[1:] for rest in places if rest[0] == token]
    return Continuation(proposed, longest, agreement) if proposed else None


def test_a_longer_match_wins_over_a_more_recent_one():
    cache = cache_of([1, 2, 3, 4, 5, 60, 61], [9, 2, 3, 4, 5, 70, 71])
    assert cache.continuation([1, 2, 3, 4, 5], 2) == Continuation([60, 61], 5, [1.0, 1.0])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 31, 32])
def test_a_match_of_any_length_is_found_whole(length):
    phrase = list(range(10, 10 + length))
    cache = cache_of([1, *phrase, 5])
    assert cache.continuation([2, *phrase], 1) == Continuation([5], length, [1.0])


def test_a_match_is_no_longer_than_the_suffix():
    cache = cache_of([3, 1, 2, 3, 5], [9, 1, 2, 3, 6])
    assert cache.continuation([1, 2, 3], 1) == Continuation([6], 3, [0.5])


def test_beyond_32_tokens_a_match_counts_as_no_better():
    phrase = list(range(100, 140))
    cache = cache_of([*phrase, 5], [*phrase[8:], 6])
    assert cache.continuation(phrase, 1) == Continuation([6], 32, [0.5])


def test_nothing_is_proposed_where_nothing_matches():
    cache = cache_of([1, 2, 3])
    assert cache.continuation([7], 4) is None


def test_nothing_is_proposed_after_the_end_of_a_text():
    cache = cache_of([1, 2, 3])
    assert cache.continuation([1, 2, 3], 4) is None


@pytest.mark.parametrize("suffix", [[], [1]])
def test_an_empty_suffix_or_cache_proposes_nothing(suffix):
    assert cache_of().continuation(suffix, 4) is None
    assert cache_of([1, 2]).continuation([], 4) is None


def test_no_more_tokens_than_asked_for():
    cache = cache_of([1, 2, 3, 4, 5])
    assert cache.continuation([1], 3).tokens == [2, 3, 4]
    assert cache.continuation([1], 0) is None


def test_most_votes_win_and_shares_count_those_still_agreeing():
    cache = cache_of([1, 2, 5, 7], [1, 2, 5, 8], [1, 2, 5, 8], [1, 2, 6, 9])
    assert cache.continuation([1, 2], 4) == Continuation([5, 8], 2, [3 / 4, 2 / 3])


def test_of_equal_votes_the_most_recent_wins():
    cache = cache_of([1, 5], [1, 6])
    assert cache.continuation([1], 1) == Continuation([6], 1, [0.5])


def test_a_text_that_ends_has_no_vote_on_what_follows():
    cache = cache_of([1, 2, 3], [1, 2], [1, 2])
    assert cache.continuation([1], 5) == Continuation([2, 3], 1, [1.0, 1.0])


def test_only_the_16_most_recent_occurrences_vote():
    cache = cache_of(*[[1, 5]] * 20, *[[1, 6]] * 12)
    assert cache.continuation([1], 1) == Continuation([6], 1, [12 / 16])


def test_a_continuation_stops_at_the_border_of_its_text():
    cache = cache_of([1, 2, 3], [4, 5, 6])
    assert cache.continuation([1, 2], 10).tokens == [3]


def test_a_match_does_not_reach_back_into_the_text_before():
    cache = cache_of([1, 2, 3], [4, 5, 6])
    assert cache.continuation([2, 3, 4], 1) == Continuation([5], 1, [1.0])
    assert cache.continuation([3], 1) is None


def test_a_text_does_not_match_its_own_end():
    assert CallSuffixes([1, 2, 3, 4, 5]).continuation(4) is None


def test_a_phrase_repeated_in_the_prompt_is_found():
    call = CallSuffixes([1, 2, 3, 4, 9, 1, 2])
    assert call.continuation(3) == Continuation([3, 4, 9], 2, [1.0] * 3)


@pytest.mark.parametrize("loop", [[7], [7, 8], [7, 8, 7, 9], list(range(10, 50))])
def test_a_text_that_repeats_itself_goes_on_doing_so(loop):
    """Its last occurrence but one matches the most, and that is followed by one round of the loop alone."""
    text = [1, *loop * 50]
    assert CallSuffixes(text).continuation(9) == Continuation((loop * 9)[:9], 32, [1.0] * 9)
    assert CallSuffixes([*text, 5]).continuation(9) is None


def test_a_text_of_the_cache_is_not_taken_for_a_loop():
    assert cache_of([7] * 6).continuation([7] * 5, 9).tokens == [7]


def test_verified_tokens_are_found_once_they_are_there():
    call = CallSuffixes([1, 2, 3])
    call.extend([8, 9])
    assert call.continuation(2) is None
    call.extend([2, 3])
    assert call.continuation(2) == Continuation([8, 9], 2, [1.0, 1.0])
    assert call.tokens == [1, 2, 3, 8, 9, 2, 3]


@given(text=st.lists(tokens, max_size=60), cuts=st.lists(st.integers(0, 60), max_size=8))
def test_it_does_not_matter_in_what_pieces_a_text_comes(text, cuts):
    ends = [*sorted(cuts), len(text)]
    call = CallSuffixes([])
    for start, end in zip([0, *ends], ends, strict=False):
        call.extend(text[start:end])
    assert call.tokens == text
    assert call.continuation(8) == CallSuffixes(text).continuation(8)


@given(text=st.lists(tokens, max_size=40), tail=st.lists(tokens, max_size=8), more=st.lists(tokens, max_size=8))
def test_a_tail_is_matched_as_though_appended_and_is_not_stored(text, tail, more):
    call, cache = CallSuffixes(text, cache_of([0, 1, 2, 3, 0])), cache_of([0, 1, 2, 3, 0])
    assert call.continuation(8, tail) == CallSuffixes(text + tail, cache).continuation(8)
    assert call.tokens == text
    call.extend(more)
    assert call.continuation(8) == CallSuffixes(text + more, cache).continuation(8)


def test_a_longer_match_in_the_cache_wins_over_the_own_text():
    call = CallSuffixes([1, 2, 50, 3, 1, 2], cache_of([3, 1, 2, 60]))
    assert call.continuation(1) == Continuation([60], 3, [1.0])


def test_of_equal_matches_the_own_text_wins():
    call = CallSuffixes([1, 2, 50, 3, 1, 2], cache_of([4, 1, 2, 60]))
    assert call.continuation(1) == Continuation([50], 2, [1.0])


def test_a_call_finds_what_its_cache_learns_meanwhile_and_adds_nothing_to_it():
    cache = cache_of()
    call = CallSuffixes([1, 2, 1, 2], cache)
    call.extend([3])
    assert len(cache) == 0
    cache.add([3, 4])
    assert call.continuation(1).tokens == [4]


# At most 16 places in all, so that every occurrence votes.
@given(texts=st.lists(st.lists(tokens, max_size=6), max_size=3), suffix=st.lists(tokens, max_size=8))
def test_few_texts_agree_with_brute_force(texts, suffix):
    assert cache_of(*texts).continuation(suffix, 5) == brute_force(texts, suffix, 5)


@given(text=st.lists(tokens, max_size=17))
def test_a_short_call_agrees_with_brute_force(text):
    found, expected = CallSuffixes(text).continuation(5), brute_force([text], text, 5)
    assert (found is None) == (expected is None)
    if expected is not None:  # what reaches the text's end goes on as a loop
        n = len(expected.tokens)
        assert (found.tokens[:n], found.match, found.agreement[:n]) == (
            expected.tokens,
            expected.match,
            expected.agreement,
        )


@given(seed=st.integers(0, 1000), copied=st.integers(4, 40))
def test_phrases_of_four_tokens_or_more_agree_with_brute_force(seed, copied):
    source = random.Random(seed)
    texts = [words(seed + i, 60) for i in range(12)]
    phrase = texts[0][5 : 5 + copied]
    for text in texts[1:]:
        text[10:10] = [*phrase[-source.randint(1, copied) :], source.randint(0, 1)]
    assert cache_of(*texts).continuation(phrase, 5) == brute_force(texts, phrase, 5)


@given(
    texts=st.lists(st.lists(tokens, max_size=40), max_size=12),
    suffix=st.lists(tokens, min_size=1, max_size=40),
    max_bytes=st.integers(1, 40_000),
)
def test_what_is_proposed_followed_the_match_in_a_text_held(texts, suffix, max_bytes):
    proposed = cache_of(*texts, max_bytes=max_bytes).continuation(suffix, 8)
    if proposed is not None:
        run = suffix[-proposed.match :] + proposed.tokens
        assert any(text[at : at + len(run)] == run for text in texts for at in range(len(text)))
        assert len(proposed.agreement) == len(proposed.tokens)
        assert all(0 < share <= 1 for share in proposed.agreement)


@given(
    texts=st.lists(st.lists(tokens, min_size=1, max_size=30), max_size=25),
    suffix=st.lists(tokens, max_size=6),
    max_bytes=st.integers(2048 + 30 * 498, 40_000),
)
def test_a_cache_that_forgot_equals_one_that_never_knew(texts, suffix, max_bytes):
    cache = cache_of(*texts, max_bytes=max_bytes)
    assert cache.nbytes <= max_bytes
    kept = []
    for text in reversed(texts):
        if cache_of(text, *kept).nbytes > max_bytes:
            break
        kept.insert(0, text)
    fresh = cache_of(*kept)
    assert (len(cache), cache.nbytes) == (len(fresh), fresh.nbytes)
    assert cache.continuation(suffix, 8) == fresh.continuation(suffix, 8)


def test_of_a_text_too_long_only_the_last_part_is_kept():
    cache, text = SuffixCache(100_000), list(range(1000))
    cache.add(text)
    kept = len(cache)
    assert kept == (100_000 - 2048) // 498
    assert cache.nbytes <= 100_000
    assert cache.continuation([998], 1).tokens == [999]
    assert cache.continuation([1000 - kept], 1) is not None
    assert cache.continuation([999 - kept], 1) is None


def test_a_bound_below_one_token_keeps_nothing():
    cache = cache_of([1, 2, 3], max_bytes=1)
    assert (len(cache), cache.nbytes, cache.continuation([1], 1)) == (0, 0, None)


def test_an_empty_text_is_left_out():
    assert cache_of([]).nbytes == 0


def test_a_text_that_cannot_be_held_changes_nothing():
    cache = cache_of([1, 2, 3])
    with pytest.raises(OverflowError):
        cache.add([1, 2**40])
    assert cache.nbytes == cache_of([1, 2, 3]).nbytes


def copied(seed, count):
    """A text that mostly repeats phrases of 20 others, so that they have many occurrences."""
    source, text = random.Random(seed), []
    while len(text) < count:
        text += words(source.randrange(20), 30)
    return text[:count]


@pytest.mark.parametrize("text_of", [words, copied])
@pytest.mark.parametrize("case", ["filling", "turning over", "large then small"])
def test_bytes_really_used_are_near_those_counted(text_of, case):
    counts = {"filling": [500] * 20, "turning over": [200] * 150, "large then small": [8000, 5000, 100]}[case]
    max_bytes = {"filling": ROOMY, "turning over": 2_000_000, "large then small": 2**20}[case]
    texts = [text_of(seed, count) for seed, count in enumerate(counts)]
    gc.collect()
    tracemalloc.start()
    try:
        cache = SuffixCache(max_bytes)
        for text in texts:
            cache.add(text)
            used = tracemalloc.get_traced_memory()[0]
            assert 0.4 * cache.nbytes <= used <= 1.25 * cache.nbytes
    finally:
        tracemalloc.stop()


def test_tenants_do_not_see_each_other():
    caches = SuffixCaches(ROOMY)
    caches.for_tenant("a").add([1, 2])
    caches.for_tenant(None).add([1, 3])
    assert caches.for_tenant("a").continuation([1], 1).tokens == [2]
    assert caches.for_tenant(None).continuation([1], 1).tokens == [3]
    assert caches.for_tenant("b").continuation([1], 1) is None


def test_the_tenants_bytes_are_those_of_their_caches():
    caches = SuffixCaches(ROOMY)
    a, b = caches.for_tenant("a"), caches.for_tenant("b")
    for cache, seed in ((a, 1), (b, 2), (a, 3)):
        cache.add(words(seed, 50))
    assert caches.nbytes == a.nbytes + b.nbytes


def test_the_least_recently_used_tenant_goes():
    one = cache_of(words(0, 50)).nbytes
    caches = SuffixCaches(3 * one)
    for seed, tenant in enumerate("abc"):
        caches.for_tenant(tenant).add(words(seed, 50))
    caches.for_tenant("a")
    caches.for_tenant("d").add(words(3, 50))
    assert [len(caches.for_tenant(tenant)) for tenant in "abcd"] == [50, 0, 50, 50]
    assert caches.nbytes == 3 * one


def test_a_cache_held_while_its_texts_go_is_still_its_tenants():
    one = cache_of(words(0, 50)).nbytes
    caches = SuffixCaches(one)
    held = caches.for_tenant("a")
    held.add(words(0, 50))
    caches.for_tenant("b").add(words(1, 50))
    assert len(held) == 0
    held.add([1, 2])
    assert caches.for_tenant("a") is held
    assert caches.nbytes == held.nbytes


def test_tenants_that_add_nothing_leave_nothing_behind():
    caches = SuffixCaches(ROOMY)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for tenant in range(300):
            caches.for_tenant(tenant)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 30_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [SuffixCache, SuffixCaches])
def test_a_bound_that_is_no_size_is_refused(kind):
    with pytest.raises(ValueError, match=r"`max_bytes` is 0; give a whole number ≥ 1\."):
        kind(0)


def test_threads_may_look_up_while_others_add():
    caches, errors = SuffixCaches(400_000), []
    texts = [copied(seed, 200) for seed in range(20)]
    adding = threading.Event()

    def add(tenant):
        try:
            for text in texts:
                caches.for_tenant(tenant).add(text)
        except Exception as error:
            errors.append(error)

    def look_up(tenant):
        try:
            while not adding.is_set():
                proposed = CallSuffixes(texts[0][:50], caches.for_tenant(tenant)).continuation(8, texts[0][50:53])
                assert proposed is None or 0 < len(proposed.tokens) <= 8
        except Exception as error:
            errors.append(error)

    adders = [threading.Thread(target=add, args=(tenant,)) for tenant in "aab"]
    readers = [threading.Thread(target=look_up, args=(tenant,)) for tenant in "ab"]
    for thread in adders + readers:
        thread.start()
    for thread in adders:
        thread.join()
    adding.set()
    for thread in readers:
        thread.join()
    assert not errors
    assert caches.nbytes == sum(caches.for_tenant(tenant).nbytes for tenant in "ab") <= 400_000
