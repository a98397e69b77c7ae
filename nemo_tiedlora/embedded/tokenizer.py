"""The tokenizer of the built-in base: its own words whole, common English in pieces, everything else as bytes."""

from __future__ import annotations

import io
import string
from itertools import islice
from pathlib import Path
from random import Random

from nemo_tiedlora.embedded.language import documents

VOCABULARY = 704
UNKNOWN, BEGIN, END, PAD = 0, 1, 2, 3
#: Words of the fine-tuning tasks. The base never reads them; here they get a piece each.
TASK_WORDS = ("Before", "Second", "after", "Return", "from", "Beside")
#: Frequent words, so that real English does not fall apart into letters.
ENGLISH = """
the of and to in a is that it was for on with as be at by this had not are but or have an they which one you were all
her she there would their we him been has when who will no more if out so up said what its about than into them can only
other time new some could these two may first then do any like my now over such our man me even most made after also
well must through years where much your way down should because long each just state those people too good very make
world still see own work men here get both between life being under three never know same last another while us might
great go year come since against right came take used himself few house use place during without again home around small
however found thought school part once high upon say every does war until always away something fact water less public
put thing almost hand enough far took head yet better set told nothing night end why called eyes find going look asked
later point next city day give room number course side light let name called question answer example help write text
information please using model data list number yes thank sure hello user assistant system story explain
ing ed er ly tion ment ness able ight ould ough ther ever ation ous ive al en es re un con pro com
""".split()


def train(path: Path) -> Path:
    """Train the tokenizer, the same every time, and write its sentencepiece model to `path`."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        # Text comes back exactly as it went in: nothing normalised, spaces counted, line breaks a piece of their own.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        character_coverage=1.0,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        max_sentencepiece_length=12,
        unk_id=UNKNOWN,
        bos_id=BEGIN,
        eos_id=END,
        pad_id=PAD,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def load(path: Path):
    """The sentencepiece processor of a trained tokenizer."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def _corpus() -> list[str]:
    known = {
        word.strip(".:")
        for about, exercises in islice(documents(seed=0), 300)
        for text in (str(about), *(f"{exercise.question} {exercise.answer}" for exercise in exercises))
        for word in text.split()
    }
    # Often enough to stay whole: every further piece of a word of ours would make all its lists longer.
    lines = [word for word in (*sorted(known), *TASK_WORDS) for _ in range(1000)]
    draw = Random(0)
    weights = [1 / (rank + 10) for rank in range(len(ENGLISH))]
    return lines + [" ".join(draw.choices(ENGLISH, weights, k=12)) for _ in range(2000)]
