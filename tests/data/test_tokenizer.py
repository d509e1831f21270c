# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from transformers import AddedToken, AutoTokenizer, Qwen2Tokenizer

from geode.data.tokenizer import TOKEN_ATTRIBUTES, add_geode_tokens, train_tokenizer


TEXTS = [
    "How far is the chair from the table, in meters?",
    "The distance between the chair and the table is 2.31 meters.",
    "How many chair(s) are in this room? There are 12 chairs in this room.",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *TOKEN_ATTRIBUTES.values()]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


def test_train_tokenizer_has_the_size_that_was_asked_for(tokenizer):
    # 256 bytes, 9 special tokens, and so 55 merges.
    assert len(tokenizer) == 320
    assert len(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]) == 55


def test_train_tokenizer_encodes_any_text_without_loss(tokenizer):
    for text in (*TEXTS, "Stra\u00dfe \u5ba4\u5185 \U0001f600\n\ttab  two", "\x00\x7f", " leading and trailing "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_train_tokenizer_splits_digits_one_by_one(tokenizer):
    assert tokenizer.tokenize("12.345") == ["1", "2", ".", "3", "4", "5"]


def test_train_tokenizer_is_deterministic(tokenizer):
    assert train_tokenizer(iter(TEXTS), 320).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_train_tokenizer_learns_the_texts(tokenizer):
    untrained = train_tokenizer([], 320)
    assert len(untrained) == 265
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(untrained(TEXTS[0])["input_ids"]) == len(TEXTS[0])


def test_train_tokenizer_has_qwen2_and_geode_tokens(tokenizer):
    for token in SPECIALS:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
        assert tokenizer.decode(tokenizer(f"a{token}b")["input_ids"], skip_special_tokens=True) == "ab"
        plain = tokenizer(token, split_special_tokens=True)["input_ids"]
        assert len(plain) > 1
        assert tokenizer.decode(plain) == token
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == (
        "<|endoftext|>",
        "<|im_end|>",
        "left",
    )
    assert set(SPECIALS) <= set(tokenizer.all_special_tokens)


def test_train_tokenizer_refuses_too_few_tokens():
    with pytest.raises(ValueError, match="must be at least 265, for 256 bytes and 9 special tokens, got 264"):
        train_tokenizer(TEXTS, 264)


def test_trained_tokenizer_is_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\n12 chairs <spatio><REG><|im_end|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == "user\n12 chairs "
    for name, token in TOKEN_ATTRIBUTES.items():
        assert getattr(loaded, name) == token
        assert getattr(loaded, f"{name}_id") == tokenizer.convert_tokens_to_ids(token)
    assert (loaded.pad_token, loaded.eos_token, loaded.padding_side) == ("<|endoftext|>", "<|im_end|>", "left")


def qwen_like(*extra: str, is_special: bool = True) -> Qwen2Tokenizer:
    """A tokenizer as Qwen2.5's: no merges, but its special tokens, and one that is not special."""
    tokenizer = Qwen2Tokenizer(vocab={chr(97 + index): index for index in range(26)}, pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<|vision_start|>"]})
    tokenizer.add_tokens([AddedToken(token, special=is_special) for token in extra])
    tokenizer.add_tokens([AddedToken("<tool_call>")])
    return tokenizer


def test_add_geode_tokens_keeps_the_tokens_that_are_there():
    tokenizer = qwen_like()
    before, size = tokenizer.get_vocab(), len(tokenizer)
    added = add_geode_tokens(tokenizer)
    assert added is tokenizer
    assert len(tokenizer) == size + 6
    assert {token: tokenizer.get_vocab()[token] for token in before} == before
    assert [tokenizer.convert_tokens_to_ids(token) for token in TOKEN_ATTRIBUTES.values()] == list(
        range(size, size + 6)
    )
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert special == {*SPECIALS, "<|vision_start|>"}
    assert "<|vision_start|>" in tokenizer.all_special_tokens
    assert tokenizer.decode(tokenizer("<|vision_start|>a<REG>")["input_ids"], skip_special_tokens=True) == "a"


@pytest.mark.parametrize("is_special", [True, False])
def test_add_geode_tokens_takes_over_those_of_internvl(is_special):
    tokenizer = qwen_like("<img>", "</img>", "<IMG_CONTEXT>", is_special=is_special)
    ids = tokenizer.convert_tokens_to_ids(["<img>", "</img>", "<IMG_CONTEXT>"])
    size = len(tokenizer)
    add_geode_tokens(tokenizer)
    assert len(tokenizer) == size + 3
    assert tokenizer.convert_tokens_to_ids(["<img>", "</img>", "<IMG_CONTEXT>"]) == ids
    assert all(tokenizer.added_tokens_decoder[index].special for index in ids)
    assert ids[0] not in tokenizer("<img>", split_special_tokens=True)["input_ids"]
    assert tokenizer.image_token_id == ids[2]


def test_add_geode_tokens_twice_is_as_once(tmp_path):
    tokenizer = add_geode_tokens(qwen_like())
    add_geode_tokens(tokenizer).save_pretrained(tmp_path / "twice")
    add_geode_tokens(qwen_like()).save_pretrained(tmp_path / "once")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "once" / name).read_text() == (tmp_path / "twice" / name).read_text()


def test_add_geode_tokens_refuses_a_tokenizer_of_another_kind():
    with pytest.raises(ValueError, match=r"lacks \['<\|im_start\|>', '<\|im_end\|>'\]"):
        add_geode_tokens(Qwen2Tokenizer())
