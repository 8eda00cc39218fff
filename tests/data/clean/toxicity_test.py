"""Checks word lists: boundaries, scripts, phrases, thresholds by language; and the model, where it is installed."""

import time
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from datatrove.data import Document
from pydantic import ValidationError

from llmtrain.config.clean.content import ToxicityConfig
from llmtrain.config.clean.web import WordsConfig
from llmtrain.data.clean.toxicity import Toxicity, make
from llmtrain.data.clean.wordlist import WordList, normalised, read_lists
from tests.shared_data import shared_data


@pytest.fixture
def lists(tmp_path: Path) -> str:
    (tmp_path / "en").write_text("darn\nbloody hell\nhell\n\U0001f595\na$$\n2g1c\n")
    (tmp_path / "de").write_text("Mist\r\nScheibenkleister\n")
    (tmp_path / "ja").write_text("ばか\nばかやろう\n")
    (tmp_path / "hi").write_text("कमीना\n")
    (tmp_path / "LICENSE").write_text("darn this\n")
    (tmp_path / "PROVENANCE.txt").write_text("hell\n")
    return str(tmp_path)


def judged(text: str, language: str | None, **settings: object) -> tuple[str | None, Document, Toxicity]:
    check = make(ToxicityConfig(**settings), WordsConfig())
    document = Document(text=text, id="0", metadata={"language": language})
    return check(document), document, check


@pytest.mark.parametrize(
    ("text", "language", "count", "share"),
    [
        ("Darn, it is (DARN) so.", "en", 2, 2 / 5),
        ("darned hello shell darnit", "en", 0, 0.0),
        ("Bloody\nhell: hell", "en", 2, 3 / 3),  # the phrase of two words, then the word
        ("bloody-hell hell-hole", "en", 2, 3 / 4),
        ("what\U0001f595now", "en", 1, 1 / 3),
        ("an a$$ here", "en", 1, 1 / 3),
        ("ｄａｒｎ da\u00adrn d\u200barn", "en", 3, 1.0),  # full width, soft hyphen, zero-width space
        ("darn darn darn", "en", 3, 1.0),
        ("So ein MIST, Mistwetter", "de", 1, 1 / 4),
        ("このばかやろうめ", "ja", 1, 5 / 8),  # the longest, of eight characters
        ("वह कमीना है", "hi", 1, 1 / 3),
        ("वह कमीनापन है", "hi", 0, 0.0),
        ("", "en", 0, 0.0),
        ("\0 ... \ud800", "en", 0, 0.0),
    ],
)
def test_listed_words_are_counted(lists: str, text: str, language: str, count: int, share: float) -> None:
    reason, document, _ = judged(text, language, word_lists=lists)
    assert document.metadata["toxic_words"] == count
    assert document.metadata["toxic_share"] == pytest.approx(share, abs=1e-6)
    assert reason == ("listed_words" if count else None)


def test_thresholds_are_by_language(lists: str) -> None:
    text = "darn hell Mist Mist one two three four"
    assert judged(text, "en", word_lists=lists, max_count=2)[0] is None
    assert judged(text, "en", word_lists=lists, max_count=1)[0] == "listed_words"
    assert judged(text, "en", word_lists=lists, max_share=0.25)[0] is None  # 2 of 8
    assert judged(text, "en", word_lists=lists, max_share=0.24)[0] == "listed_words"
    assert judged(text, "de", word_lists=lists, max_shares={"de": 0.25})[0] is None
    assert judged(text, "en", word_lists=lists, max_shares={"de": 0.25})[0] == "listed_words"
    assert judged(text, "de", word_lists=lists, max_count=0, max_counts={"de": 2})[0] is None


def test_a_language_without_list_is_counted(lists: str) -> None:
    reason, document, check = judged("darn", "fr", word_lists=lists)
    assert reason is None and "toxic_words" not in document.metadata and check.counts == {"no_word_list/fr": 1}
    reason, _, check = judged("darn", None, word_lists=lists, missing="drop")
    assert reason == "no_word_list" and check.counts == {"no_word_list/unknown": 1}


def test_what_judges_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="names neither word_lists nor model"):
        ToxicityConfig()
    with pytest.raises(ValueError, match=r"word_lists=.*gone: not a directory; give one"):
        read_lists(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="no file is named by a language code"):
        read_lists(str(tmp_path))
    (tmp_path / "en").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        read_lists(str(tmp_path))
    (tmp_path / "en").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no word"):
        read_lists(str(tmp_path))


def test_hostile_text_takes_linear_time() -> None:
    own = WordList(["a", "a a", "a a a", "b" * 50], spaced=True)
    for unit in ("a ", "b", "b" * 49 + " ", "\U0001f595", "\u200b", ".", "\u0300\u0323", " "):
        start = time.process_time()
        own.found(unit * (500_000 // len(unit)))
        assert time.process_time() - start < 3.0, unit
    assert own.found("a a a a") == (2, 1.0) and normalised("  A.b\u00ad c ") == " a b c "


def test_published_lists_are_read() -> None:
    directory = str(shared_data("ldnoobw"))
    own = read_lists(directory)
    assert len(own) == 28 and {"en", "zh", "fil", "fr-CA-u-sd-caqc"} <= own.keys()
    for language in own:
        lines = (Path(directory) / language).read_text(encoding="utf-8").splitlines()
        listed = [line for line in lines if normalised(line).strip()]
        missed = [line for line in listed if own[language].found(f"x {line} y")[0] == 0]
        assert not missed, (language, missed)


def test_prose_has_few_listed_words() -> None:
    import pydoc_data.topics as topics

    own = read_lists(str(shared_data("ldnoobw")))["en"]
    found = [own.found(text)[0] for text in topics.topics.values()]
    play = shared_data("tinyshakespeare/input.txt").read_text(encoding="utf-8").split("\n\n")
    in_plays = sum(own.found(text)[0] > 0 for text in play)
    print(f"topics: {sum(map(bool, found))} of {len(found)}; plays: {in_plays} of {len(play)}")
    assert sum(map(bool, found)) <= 1


def test_the_model_judges_lines_of_english() -> None:
    pytest.importorskip("profanity_check")
    text = "You are a wonderful person.\nfuck you bitch\n\n" + "fine words\n" * 8
    assert judged(text, "en", model=True)[0] is None  # one of ten lines
    reason, document, _ = judged(f"{text}fuck off", "en", model=True)
    assert reason == "profane" and document.metadata["profane_share"] == pytest.approx(2 / 11, abs=1e-6)
    assert judged(text, "de", model=True, model_share=0.0)[0] is None and judged("", "en", model=True)[0] is None


def test_the_model_without_its_extra_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "profanity_check", None)
    with pytest.raises(ValueError, match=r"model=true: needs the extra `toxicity`"):
        make(ToxicityConfig(model=True), WordsConfig())
