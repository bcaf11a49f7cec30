"""Tokens to text: whole characters, stop texts across token borders, and nothing lost."""

from hypothesis import given
from hypothesis import strategies as st

from onebase.serve.text import UNFINISHED, TextStream
from texts import tokenizer


def decode_bytes(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(ids, stops=(), decode=decode_bytes):
    stream, found = TextStream(decode, stops), []
    for token in ids:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.finish()]


def test_half_a_character_waits_for_its_other_half():
    assert pieces("aé€😀".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]
    assert pieces("a😀".encode()[:-1]) == ["a", "", "", "", ""]  # and is left out if that never comes


def test_a_stop_text_is_found_across_tokens_and_left_out():
    assert pieces(b"one STOP two", ["STOP"]) == [*"one ", "", "", "", "", ""]
    assert pieces(b"aSTOx", ["STOP"]) == ["a", "", "", "", "STOx", ""]
    assert pieces(b"aSTO", ["STOP"]) == ["a", "", "", "", "STO"]
    assert "".join(pieces(b"abab", ["bb", "ba"])) == "a"


def test_the_earliest_of_several_stop_texts_counts():
    assert "".join(pieces([0, 1], ["cd", "bc"], lambda ids: "".join("ab cde".split()[i] for i in ids))) == "a"


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_the_pieces_are_the_text_up_to_the_first_stop(text, stops):
    ids = text.encode("utf-8", errors="ignore")
    text = ids.decode()
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    ends = [end for end, _ in found]
    wanted = text if not found else text[: min(start for end, start in found if end == min(ends))]
    assert "".join(pieces(ids, stops)) in {
        wanted,
        text[: min((start for _, start in found), default=len(text))],
    }


@given(st.text(alphabet="aé€😀 b\n", max_size=20))
def test_a_real_tokenizers_pieces_are_its_whole_text(text):
    words = tokenizer()
    ids = words(text, add_special_tokens=False)["input_ids"]

    def decode(part):
        return words.decode(part, skip_special_tokens=True)

    assert "".join(pieces(ids, decode=decode)) == decode(ids)


def test_bytes_that_are_no_character_do_not_hold_back_what_follows():
    assert "".join(pieces(b"\xff\xff\xff\xff\xff\xffabc")).endswith("abc")


@given(st.lists(st.sampled_from([*b"a", *"é€😀".encode(), 0xFF, 0x80, 0xE2]), max_size=30))
def test_bytes_that_are_no_character_change_nothing_of_those_that_are(ids):
    assert "".join(pieces(ids)).rstrip(UNFINISHED) == decode_bytes(ids).rstrip(UNFINISHED)
