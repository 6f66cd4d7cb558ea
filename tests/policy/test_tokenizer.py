"""Prompts, with the byte tokenizer, a SentencePiece model and Gemma's real vocabulary."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceTrainer

from pi0.checkpoint.synth import byte_tokenizer
from pi0.config import PALIGEMMA_VOCABULARY
from pi0.errors import ObservationError, Pi0Error
from pi0.policy.tokenizer import (
    PromptFormat,
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
    load_tokenizer_of,
)

GEMMA = Path(
    os.environ.get(
        "PI0_TEST_TOKENIZER", Path(__file__).parents[2] / ".cache" / "gemma" / "tokenizer.json"
    )
)


@pytest.fixture
def bytes_(tmp_path: Path) -> Tokenizer:
    path = tmp_path / "tokenizer.json"
    byte_tokenizer().save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def gemma() -> Tokenizer:
    if not GEMMA.exists():
        pytest.skip(f"Gemma's tokenizer.json is not in {GEMMA} (make tokenizer, needs npm)")
    return load_tokenizer(GEMMA)


def test_a_byte_order_mark(bytes_: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "marked.json"
    path.write_text(bytes_.source.read_text("utf-8"), encoding="utf-8-sig")
    assert load_tokenizer(path).encode("pick é") == bytes_.encode("pick é")


def text_of(ids: torch.Tensor, mask: torch.Tensor) -> str:
    """The text behind the byte tokenizer's ids, without <bos>."""
    return bytes(int(i) - 4 for i in ids[mask][1:]).decode()


@pytest.mark.parametrize(
    ("prompt", "openpi", "lerobot"),
    [
        ("go", "go\n", "go\n"),
        (" pick_up\nit ", "pick up it\n", " pick_up\nit \n"),
        ("go\n", "go\n", "go\n"),
    ],
)
def test_cleaning(bytes_: Tokenizer, prompt: str, openpi: str, lerobot: str) -> None:
    assert text_of(*bytes_.tokenize(prompt, PromptFormat("openpi", 24))) == openpi
    assert text_of(*bytes_.tokenize(prompt, PromptFormat("lerobot", 24))) == lerobot


def test_padding(bytes_: Tokenizer) -> None:
    ids, mask = bytes_.tokenize("go", PromptFormat("openpi", 8))
    assert ids.tolist() == [2, 4 + ord("g"), 4 + ord("o"), 4 + ord("\n"), 0, 0, 0, 0]
    assert mask.tolist() == [True] * 4 + [False] * 4
    assert ids.dtype == torch.int64


def test_longest_prompt(bytes_: Tokenizer) -> None:
    assert bytes_.tokenize("x" * 46, PromptFormat("openpi", 48))[1].all()
    with pytest.raises(ObservationError, match="at most 48 tokens, found 49. Shorten"):
        bytes_.tokenize("x" * 47, PromptFormat("openpi", 48))


def test_gemma(gemma: Tokenizer) -> None:
    """Ids of PaliGemma's published vocabulary."""
    ids, mask = gemma.tokenize("pick_up the cube ", PromptFormat("openpi", 48))
    assert ids[0] == 2, "<bos>"
    assert ids[mask][-1] == 108, "line break"
    clean, _ = gemma.tokenize("pick up the cube", PromptFormat("lerobot", 48))
    assert torch.equal(ids, clean)
    assert mask.sum() == 6
    raw, _ = gemma.tokenize("pick_up the cube ", PromptFormat("lerobot", 48))
    assert not torch.equal(ids, raw)


def test_gemma_is_the_vocabulary_of_paligemma(gemma: Tokenizer) -> None:
    assert load_tokenizer_of(gemma.source, PALIGEMMA_VOCABULARY).bos == 2


def test_gemma_knows_the_words(gemma: Tokenizer) -> None:
    assert gemma.encode("pick up the cube") == [18075, 908, 573, 28660]


def test_sentencepiece(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("pick up the red cube and put it in the blue bowl\n" * 50)
    SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(find_tokenizer(tmp_path))
    assert tokenizer.source.name == "tokenizer.model"
    ids, mask = tokenizer.tokenize("put_it in", PromptFormat("openpi", 48))
    assert ids[0] == 2
    again, _ = tokenizer.tokenize("put it in", PromptFormat("openpi", 48))
    assert torch.equal(ids, again)
    assert 3 < int(mask.sum()) < 12


def test_two_vocabularies_in_one_folder(bytes_: Tokenizer, tmp_path: Path) -> None:
    """Of the same vocabulary they may lie side by side."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    shutil.copy(bytes_.source, folder)
    SentencePieceTrainer.train(
        sentence_iterator=iter(["pick up the red cube"] * 50),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=280,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(Pi0Error, match=r"found tokenizer.model and tokenizer.json, .* --tokenizer"):
        find_tokenizer(folder)
    shutil.copy(folder / "tokenizer.model", folder / "paligemma_tokenizer.model")
    (folder / "tokenizer.json").unlink()
    assert find_tokenizer(folder) == folder / "tokenizer.model"


def test_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "openpi"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    checkpoint = tmp_path / "ckpt"
    with pytest.raises(Pi0Error, match=r"paligemma_tokenizer.model.* found none. Put PaliGemma"):
        find_tokenizer(checkpoint)
    snapshot = "hf/hub/models--google--paligemma-3b-pt-224/snapshots/abc/tokenizer.json"
    places = [snapshot, "openpi/big_vision/paligemma_tokenizer.model", "ckpt/tokenizer.json"]
    for place in places:  # the later ones go first
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        path.touch()
        assert find_tokenizer(checkpoint) == path


def test_a_link_to_nothing(tmp_path: Path) -> None:
    """As a cache of Hugging Face is left by a download that was cut short."""
    (tmp_path / "tokenizer.json").symlink_to("blobs/abc")
    with pytest.raises(Pi0Error, match=r"tokenizer.json: .*a link to blobs/abc, which does not"):
        find_tokenizer(tmp_path)


def test_bad_files(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        path = tmp_path / name
        with pytest.raises(Pi0Error, match="expected a file, found none"):
            load_tokenizer(path)
        path.write_bytes(b"{}")
        with pytest.raises(Pi0Error, match="cannot be read as one.* another with --tokenizer"):
            load_tokenizer(path)


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(Pi0Error, match="found a Git LFS pointer"):
        load_tokenizer(path)
