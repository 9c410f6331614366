"""Word boundaries: a place becomes whole words, in every script."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptj.data.words import Words

BUILT = "It was built in 1951, by O'Neil's firm for $1,000.50."
SCHOOL = "全学年にわたって小学校の国語の教科書に挿し絵が用いられている"


@pytest.mark.parametrize(
    ("text", "cut", "whole"),
    [
        (BUILT, "uil", "built"),
        (BUILT, "95", "1951"),
        (BUILT, "rm", "firm"),
        (BUILT, "by", "by"),
        (BUILT, "as built i", "was built in"),
        (BUILT, "Neil", "O'Neil's"),
        (BUILT, "000", "1,000.50"),
        (BUILT, "1951,", "1951,"),
        ("cafe\u0301 noir", "fe", "cafe\u0301"),
        ("cafe\u0301 noir", "\u0301", "cafe\u0301"),
        ("सड़क पर नमस्ते दुनिया", "मस", "नमस्ते"),  # vowel signs and a virama
        ("सड़क पर नमस्ते दुनिया", "दुन", "दुनिया"),
        ("أهلاً بالعالم", "هل", "أهلاً"),
        ("Привет, мир", "вет", "Привет"),
        ("안녕하세요 세계", "녕하", "안녕하세요"),  # Korean has spaces
        (SCHOOL, "国語", "国語"),
        (SCHOOL, "小学校", "小学校"),
        ("東京は日本の首都", "は", "は"),
        ("กรุงเทพเป็นเมือง", "เทพ", "เทพ"),
        ("กรุงเทพ", "ร", "รุ"),  # the vowel sign belongs to its letter
        ("我们在北京2024年", "02", "2024"),
        ("a 👩\u200d👩\u200d👧 b", "👧", "👩\u200d👩\u200d👧"),
        ("vive la 🇫🇷!", "🇫", "🇫🇷"),
    ],
)
def test_a_span_widens_to_whole_words(text: str, cut: str, whole: str) -> None:
    start = text.index(cut)
    assert text[slice(*Words(text).widen(start, start + len(cut)))] == whole


@pytest.mark.slow
@given(st.text("ab1'., \u0301国語กิ😀\u200d\n", min_size=1, max_size=20), st.data())
def test_widening_contains_the_span_and_is_idempotent(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    words = Words(text)
    wide = words.widen(start, end)
    assert 0 <= wide[0] <= start < end <= wide[1] <= len(text)
    assert words.widen(*wide) == wide
