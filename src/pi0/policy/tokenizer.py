"""Prompts to token ids, with a tokenizer file that is already on this machine.

π0 reads PaliGemma's vocabulary: a SentencePiece model (`tokenizer.model`,
`paligemma_tokenizer.model`) or its `tokenizer.json`. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pi0.checkpoint.damage import LFS_HINT, LFS_POINTER
from pi0.config import PALIGEMMA_VOCABULARY
from pi0.errors import ObservationError, Pi0Error
from pi0.policy.normalize import Floats

BINS = 256  # of a state in the prompt of π0.5
FILE_NAMES = ("tokenizer.model", "paligemma_tokenizer.model", "tokenizer.json")
BOS_PIECE = "<bos>"
PALIGEMMA_BOS, PALIGEMMA_NEWLINE = 2, [108]
PROBE = "Task: pick up the 2nd cup, State: 17 255"  # other vocabularies read other ids


@dataclass(frozen=True)
class PromptFormat:
    """How a checkpoint's prompts are made into tokens.

    Attributes:
        convention: "openpi" strips the prompt, turns "_" and line breaks into blanks and appends
            the piece for a line break; "lerobot" appends a line break if there is none. Both write
            prompts with a state in the same way, see `with_state`; "lerobot" rounds it to float32.
        max_tokens: the length that prompts are padded to.
        newline: False: "lerobot" does not append one, since the checkpoint has no such step.
        padding_side: "right" or "left".
        state: whether the prompt holds the state, as in π0.5.
    """

    convention: str
    max_tokens: int
    newline: bool = True
    padding_side: str = "right"
    state: bool = False


class Tokenizer:
    """Encodes prompts; made from a file by `load_tokenizer`.

    Attributes:
        encode: text → ids, without special tokens.
        bos: the id that begins a prompt.
        size: of the vocabulary.
        source: the file.
    """

    def __init__(
        self, encode: Callable[[str], list[int]], bos: int, size: int, source: Path
    ) -> None:
        self.encode = encode
        self.bos = bos
        self.size = size
        self.source = source

    def tokenize(
        self, prompt: str, form: PromptFormat, state: Floats | None = None
    ) -> tuple[Tensor, Tensor]:
        """A prompt padded with 0: ids [max_tokens] int64 and mask [max_tokens] bool.

        Args:
            state: [D] normalised and not padded, for a format that has it in the prompt.

        Raises:
            ObservationError: the prompt is longer than max_tokens. It is never cut.
        """
        if form.state:
            assert state is not None
            # LeRobot normalises in float32, in which more states are on the edge of a bin.
            lerobot = form.convention == "lerobot"
            prompt = with_state(prompt, state.astype(np.float32) if lerobot else state)
        if form.convention == "openpi" and not form.state:
            ids = [self.bos, *self.encode(_clean(prompt)), *self.encode("\n")]
        else:
            ending = "\n" if form.newline and not prompt.endswith("\n") else ""
            ids = [self.bos, *self.encode(prompt + ending)]
        length, free = form.max_tokens, form.max_tokens - len(ids)
        if free < 0:
            held = ", with the state in it" if form.state else ""
            raise ObservationError(
                f"prompt: expected at most {length} tokens, found {len(ids)}{held}. Shorten it."
            )
        start = free if form.padding_side == "left" else 0
        tokens, mask = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool)
        tokens[start : start + len(ids)] = torch.tensor(ids)
        mask[start : start + len(ids)] = True
        return tokens, mask


def with_state(prompt: str, state: Floats) -> str:
    """The prompt of π0.5: the task, and the state as the numbers of its bins.

    256 bins of equal width over [-1, 1]; values below are in bin -1, values above in bin 255.
    Source: openpi `tokenizer.py`, LeRobot `processor_pi05.py`.

    Args:
        state: [D] normalised and not padded.
    """
    bins = np.digitize(state, np.linspace(-1, 1, BINS + 1)[:-1]) - 1
    return f"Task: {_clean(prompt)}, State: {' '.join(map(str, bins))};\nAction: "


def _clean(prompt: str) -> str:
    return prompt.strip().replace("_", " ").replace("\n", " ")


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer file of a checkpoint: in its folder, else in the caches of openpi and the hub.

    Raises:
        Pi0Error: there is none, or several in its folder, of different vocabularies.
    """
    for path in own_tokenizers(folder) or _cached():
        if path.is_file():
            return path
    raise Pi0Error(
        f"tokenizer: expected one of {', '.join(FILE_NAMES)} in {folder} or in the cache of openpi "
        "or Hugging Face, found none. Put PaliGemma's tokenizer.model (from google/"
        "paligemma-3b-pt-224) or openpi's paligemma_tokenizer.model there, or name it with "
        "--tokenizer."
    )


def own_tokenizers(folder: Path) -> list[Path]:
    """The tokenizer files in a folder, which are of one vocabulary.

    Raises:
        Pi0Error: they differ, or one is a link to nothing.
    """
    for path in (folder / name for name in FILE_NAMES):
        if path.is_symlink() and not path.exists():
            raise Pi0Error(
                f"tokenizer {path}: expected a file, found a link to {path.readlink()}, which does "
                "not exist. Restore it or remove the link."
            )
    paths = [path for name in FILE_NAMES if (path := folder / name).is_file()]
    if len(paths) < 2:
        return paths
    read = [(t.bos, t.encode(PROBE)) for t in map(load_tokenizer, paths)]
    for path, ids in zip(paths, read, strict=True):
        if ids != read[0]:
            raise Pi0Error(
                f"tokenizer: expected one vocabulary in {path.parent}, found {paths[0].name} and "
                f"{path.name}, which read {PROBE!r} as other words. Name the one that it was "
                "trained with, with --tokenizer."
            )
    return paths


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from a SentencePiece .model or a tokenizer.json.

    Raises:
        Pi0Error: no such file, or not a tokenizer with a <bos> piece.
    """
    if not path.is_file():
        raise Pi0Error(f"tokenizer {path}: expected a file, found none.")
    try:
        load = _load_json if path.suffix == ".json" else _load_sentencepiece
        encode, bos, size = load(path)
    except Exception as error:  # both libraries raise bare RuntimeError or Exception
        with open(path, "rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
        found = LFS_HINT if pointer else f"a file that cannot be read as one ({error})."
        raise Pi0Error(
            f"tokenizer {path}: expected a SentencePiece model or a tokenizer.json, found {found} "
            "Copy the file again, or name another with --tokenizer."
        ) from error
    if bos is None or bos < 0:
        raise Pi0Error(f"tokenizer {path}: expected a {BOS_PIECE} piece, found none.")
    return Tokenizer(encode, bos, size, path)


def load_tokenizer_of(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model with a vocabulary of this size.

    Raises:
        Pi0Error: see `load_tokenizer`; or it is another vocabulary's.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.size > vocab_size:
        raise Pi0Error(
            f"tokenizer {path}: expected at most the {vocab_size} pieces of the model's "
            f"vocabulary, found {tokenizer.size}. Use the tokenizer that belongs to the checkpoint."
        )
    found = (tokenizer.bos, tokenizer.encode("\n"))
    if vocab_size == PALIGEMMA_VOCABULARY and found != (PALIGEMMA_BOS, PALIGEMMA_NEWLINE):
        raise Pi0Error(
            f"tokenizer {path}: expected PaliGemma's, with <bos> {PALIGEMMA_BOS} and a line break "
            f"{PALIGEMMA_NEWLINE}, found {found[0]} and {found[1]} in {tokenizer.size} pieces: the "
            "model would read other words. Use the tokenizer.model of google/paligemma-3b-pt-224."
        )
    return tokenizer


def _cached() -> Iterator[Path]:
    openpi = Path(os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")).expanduser()
    yield openpi / "big_vision" / "paligemma_tokenizer.model"
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    for model in ("paligemma-3b-pt-224", "paligemma-3b-mix-224"):
        for snapshot in sorted(hub.glob(f"models--google--{model}/snapshots/*")):
            yield from (snapshot / name for name in FILE_NAMES)


Loaded = tuple[Callable[[str], list[int]], "int | None", int]


def _load_json(path: Path) -> Loaded:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(path.read_text(encoding="utf-8-sig"))
    return (
        lambda text: list(backend.encode(text, add_special_tokens=False).ids),
        backend.token_to_id(BOS_PIECE),
        backend.get_vocab_size(),
    )


def _load_sentencepiece(path: Path) -> Loaded:
    from sentencepiece import SentencePieceProcessor

    backend = SentencePieceProcessor(model_file=str(path))
    return lambda text: list(backend.encode(text)), int(backend.bos_id()), len(backend)
