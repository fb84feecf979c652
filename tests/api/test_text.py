"""Tokens to text in pieces, and stop strings, against decoding and searching at once."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.decoders import Decoder
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from service.api.text import Detokenizer, StopMatcher, TextCodec, TextStream
from service.demo import model_folder
from service.errors import PromptTooLong

CONTEXT = 100


def codec_of(core: Tokenizer) -> TextCodec:
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=core), context_length=CONTEXT)  # type: ignore[no-untyped-call]


BYTE_LEVEL = codec_of(Tokenizer.from_file(str(model_folder() / "tokenizer.json")))


WORDS = ["<unk>", "▁the", "▁sea", "▁", "a", "b", "."]
"""As sentencepiece spells them: a mark is the blank before a word."""
FIRST_BYTE_ID = len(WORDS)


def byte_fallback_codec(decoder: Decoder) -> TextCodec:
    """Words and a token for each byte, and two special tokens, as sentencepiece models have."""
    names = [*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoder
    return codec_of(tokenizer)


def unigram_codec() -> TextCodec:
    """Words and characters alone, decoded by Metaspace."""
    tokenizer = Tokenizer(Unigram([(name, -float(i)) for i, name in enumerate([*WORDS, "é", "€"])], unk_id=0))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return codec_of(tokenizer)


BYTE_FALLBACK = byte_fallback_codec(
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
)
METASPACE = byte_fallback_codec(
    decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
)
UNIGRAM = unigram_codec()
SPECIAL_IDS = [FIRST_BYTE_ID + 256, FIRST_BYTE_ID + 257]

token_ids = st.lists(st.integers(0, BYTE_LEVEL.tokenizer.get_vocab_size() - 1), max_size=40)
# The 256 single bytes of a byte-level vocabulary come first: runs of them are broken and whole characters.
byte_ids = st.lists(st.integers(0, 260), max_size=40)
any_ids = st.one_of(token_ids, byte_ids, st.text().map(lambda text: BYTE_LEVEL.tokenizer.encode(text).ids))


def _joined(runs: list[list[int]]) -> list[int]:
    return [token_id for run in runs for token_id in run]


words = st.lists(st.sampled_from(range(FIRST_BYTE_ID)), min_size=1, max_size=4)
specials = st.lists(st.sampled_from(SPECIAL_IDS), min_size=1, max_size=3)
spelled = st.text(alphabet="é€😀", min_size=1, max_size=3).map(lambda text: [FIRST_BYTE_ID + b for b in text.encode()])
sentencepiece_ids = st.lists(st.one_of(words, specials, spelled), max_size=12).map(_joined)
unigram_ids = st.lists(st.integers(0, UNIGRAM.tokenizer.get_vocab_size() - 1), max_size=20)
demo_ids = st.lists(
    st.one_of(st.just([0]), st.text(max_size=8).map(lambda text: BYTE_LEVEL.tokenizer.encode(text).ids)), max_size=8
).map(_joined)
chunk_sizes = st.lists(st.integers(1, 5), max_size=20)


def _split(ids: list[int], sizes: list[int]) -> list[list[int]]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(ids[start : start + size])
        start += size
    return [*pieces, ids[start:]]


def _pieces(detokenizer: Detokenizer, chunks: list[list[int]]) -> list[str]:
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.finish()]


@given(any_ids, st.lists(st.integers(1, 5), max_size=20))
def test_pieces_together_are_the_text_of_all_ids(ids: list[int], sizes: list[int]) -> None:
    pieces = _pieces(Detokenizer(BYTE_LEVEL, []), _split(ids, sizes))
    assert "".join(pieces) == BYTE_LEVEL.decode(ids)


@given(st.text(min_size=1), st.text())
def test_a_continuation_is_what_the_whole_text_has_more_than_the_prompt(prompt: str, answer: str) -> None:
    prompt_ids = BYTE_LEVEL.tokenizer.encode(prompt).ids
    ids = BYTE_LEVEL.tokenizer.encode(answer).ids
    pieces = _pieces(Detokenizer(BYTE_LEVEL, prompt_ids), [[i] for i in ids])
    assert "".join(pieces) == BYTE_LEVEL.decode(prompt_ids + ids)[len(BYTE_LEVEL.decode(prompt_ids)) :]


@pytest.mark.parametrize(
    ("codec", "all_ids"),
    [
        (BYTE_LEVEL, demo_ids),
        (BYTE_FALLBACK, sentencepiece_ids),
        (METASPACE, sentencepiece_ids),
        (UNIGRAM, unigram_ids),
    ],
    ids=["byte level", "byte fallback", "metaspace", "unigram"],
)
@given(data=st.data(), sizes=chunk_sizes)
def test_every_kind_of_tokenizer_gives_in_pieces_what_it_gives_at_once(
    codec: TextCodec, all_ids: st.SearchStrategy[list[int]], data: st.DataObject, sizes: list[int]
) -> None:
    prompt, ids = data.draw(all_ids), data.draw(all_ids)
    expected = codec.decode(prompt + ids)[len(codec.decode(prompt)) :]
    pieces = _pieces(Detokenizer(codec, prompt), _split(ids, sizes))
    assert "".join(pieces) == expected
    assert "\ufffd" not in expected or codec is BYTE_LEVEL
    assert all(expected.startswith("".join(pieces[:end])) for end in range(len(pieces)))


@given(st.text(alphabet="é€😀ab.", max_size=30))
def test_characters_spelled_in_bytes_come_out_whole(text: str) -> None:
    ids = [FIRST_BYTE_ID + byte for byte in text.encode()]
    pieces = _pieces(Detokenizer(BYTE_FALLBACK, []), [[i] for i in ids])
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_the_blank_before_the_first_word_is_kept_after_a_prompt() -> None:
    the, sea = 1, 2
    assert "".join(_pieces(Detokenizer(BYTE_FALLBACK, [the]), [[sea], [the]])) == " sea the"
    assert "".join(_pieces(Detokenizer(BYTE_FALLBACK, []), [[sea], [the]])) == "sea the"


def test_half_a_character_is_held_back_until_it_is_whole_or_the_end() -> None:
    euro = [FIRST_BYTE_ID + byte for byte in "€".encode()]
    detokenizer = Detokenizer(BYTE_FALLBACK, [1])
    assert [detokenizer.push([i]) for i in euro] == ["", "", "€"]
    assert detokenizer.push(euro[:1]) == ""
    assert detokenizer.finish() != ""


def test_bytes_that_never_make_a_character_are_held_back_for_a_bounded_number_of_tokens() -> None:
    detokenizer = Detokenizer(BYTE_FALLBACK, [])
    pieces = [detokenizer.push([FIRST_BYTE_ID + 0xFF]) for _ in range(1000)]
    assert sum(map(len, pieces)) >= 500
    assert len("".join([*pieces, detokenizer.finish()])) == 1000


def _cut(text: str, stops: list[str]) -> str:
    """What stands before the stop string that is complete first; the longest of those."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


texts = st.text(alphabet="ab\n", max_size=40)
stop_lists = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4)


@given(texts, stop_lists, st.lists(st.integers(1, 4), max_size=40))
def test_no_part_of_a_stop_string_leaks_whatever_the_pieces(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher, released, start = StopMatcher(stops), "", 0
    expected = _cut(text, stops)
    for size in [*sizes, len(text)]:
        released += matcher.push(text[start : start + size])
        start += size
        assert expected.startswith(released)
    assert released + matcher.finish() == expected
    assert matcher.stopped == (expected != text)


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    matcher = StopMatcher(["\n\nEND"])
    assert [matcher.push(piece) for piece in ("one\n", "two", "\n\nEN", "D rest")] == ["one", "\ntwo", "", ""]
    assert matcher.stopped


def test_a_stop_string_is_found_across_tokens() -> None:
    ids = BYTE_LEVEL.tokenizer.encode("The sea was calm.\nThe captain").ids
    stream = TextStream(BYTE_LEVEL, [], [".\nThe"])
    assert "".join(stream.push([i]) for i in ids) + stream.finish() == "The sea was calm"
    assert stream.stopped


@pytest.mark.parametrize("at_once", [False, True], ids=["one-by-one", "at-once"])
def test_a_stop_string_counts_behind_the_text_of_the_first_tokens_only(at_once: bool) -> None:
    text = "The sea was calm.\nThe sea was calm.\nThe sea"
    ids = BYTE_LEVEL.tokenizer.encode(text).ids
    half = BYTE_LEVEL.tokenizer.encode("The sea was calm.\nThe").ids
    assert ids[: len(half)] == half
    for min_tokens, expected in ((0, ""), (1, "The sea was calm.\n"), (len(half), text[:36]), (len(ids), text)):
        stream = TextStream(BYTE_LEVEL, [], ["The"], min_tokens=min_tokens)
        pieces = [stream.push(ids)] if at_once else [stream.push([i]) for i in ids]
        assert "".join(pieces) + stream.finish() == expected
        assert stream.stopped == (min_tokens < len(ids))


def test_a_stop_string_that_begins_in_the_first_tokens_does_not_count() -> None:
    ids = BYTE_LEVEL.tokenizer.encode("one.\n\ntwo").ids
    for min_tokens in range(len(ids) + 1):
        stream = TextStream(BYTE_LEVEL, [], ["one.\n\ntwo"], min_tokens=min_tokens)
        stream.push(ids)
        assert stream.stopped == (min_tokens == 0)


def test_bytes_of_the_first_tokens_that_are_held_back_at_the_end_are_no_stop_string() -> None:
    stream = TextStream(BYTE_FALLBACK, [1], ["\ufffd"], min_tokens=1)
    assert stream.push([FIRST_BYTE_ID + 0xE2]) + stream.finish() == "\ufffd"
    assert not stream.stopped


def test_a_stop_string_in_the_bytes_held_back_at_the_end_still_counts() -> None:
    stream = TextStream(BYTE_FALLBACK, [1], ["\ufffd"])
    assert stream.push([FIRST_BYTE_ID + 0xE2]) == ""
    assert stream.finish() == ""
    assert stream.stopped


def test_encoding_is_the_tokenizers_own() -> None:
    text = "The captain looked at the sea."
    assert asyncio.run(BYTE_LEVEL.encode(text, param="prompt")) == BYTE_LEVEL.tokenizer.encode(text).ids


def test_a_tokenizer_that_cuts_and_pads_does_neither_here() -> None:
    core = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    core.enable_truncation(4)
    core.enable_padding(length=64)
    text = "The captain looked at the sea and at the sky."
    assert asyncio.run(codec_of(core).encode(text, param="prompt")) == BYTE_LEVEL.tokenizer.encode(text).ids


def test_more_characters_than_the_context_can_hold_are_refused() -> None:
    # The longest token of this vocabulary has 14 characters.
    assert BYTE_LEVEL.max_characters == 14 * CONTEXT
    asyncio.run(BYTE_LEVEL.encode("a" * 1400, param="prompt"))
    with pytest.raises(PromptTooLong, match="1401 characters; 100 tokens, the context, hold at most 1400"):
        asyncio.run(BYTE_LEVEL.encode("a" * 1401, param="prompt"))
