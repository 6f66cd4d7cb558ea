"""A vocabulary of a dataset's own sentences, for models that are trained from random weights.

Words that the sentences have become few pieces; any other text is still read, byte by byte. The
prompts of a small model are a handful of tokens that way, instead of one for each letter.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pi0.checkpoint.outputs import replacing

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def write_vocabulary(path: Path, sentences: Iterable[str], size: int) -> None:
    """Writes a tokenizer.json of at most `size` pieces, the same for the same sentences.

    Pieces are joined by frequency (byte pair encoding, arXiv 1508.07909), not across blanks.
    """
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    texts = sorted({" ".join(sentence.replace("_", " ").split()) for sentence in sentences})
    words = pre_tokenizers.Split(Regex(r" ?[^ ]+"), behavior="isolated")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    learning = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    learning.pre_tokenizer = words
    # Letters come first in a learned vocabulary, each before the pieces made of it.
    learning.train_from_iterator(
        texts,
        BpeTrainer(vocab_size=size, special_tokens=[*SPECIAL, *bytes_], show_progress=False),
    )
    with replacing(path) as temporary:
        learning.save(str(temporary))
