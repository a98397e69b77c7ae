"""Chat rows as the model sees them: what is learned, what is cut, and NeMo's class as the reference for its form."""

import json
from pathlib import Path

import forked
import pytest
import toy

from nemo_tiedlora.errors import UsageError

pytestmark = pytest.mark.slow

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}A:{% generation %}{{ message['content'] }};"
    "{% endgeneration %}{% else %}Q:{{ message['content'] }}{% endif %}{% endfor %}"
)
SCRIPT = Path(__file__).parents[2] / "examples" / "megatron_gpt_finetuning.py"
#: Says how many messages follow, so that no conversation begins as a longer one does.
UNSTEADY = "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
UNMARKED = (
    "{% for message in messages %}{% if false %}{% generation %}{% endgeneration %}{% endif %}{{ message }}{% endfor %}"
)
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{{ message['content'] }}{% endfor %}"
)


def hugging_face(folder, template):
    """NeMo's tokenizer around a Hugging Face one with a token for each byte, and special ones."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", chat_template=template)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.save_pretrained(folder / "tokenizer")
    return AutoTokenizer(str(folder / "tokenizer"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    from nemo_tiedlora.embedded.tokenizer import train

    return SentencePieceTokenizer(str(train(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")))


def messages(*contents, system=None):
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}, *turns] if system is not None else turns}


def conversation(*values, system="Be kind.", **others):
    turns = [{"from": ("User", "Assistant")[index % 2], "value": text} for index, text in enumerate(values)]
    return {"system": system, "mask": "User", "conversations": turns} | others


def dataset(folder, tokenizer, rows, cls=None, **settings):
    from nemo_tiedlora.nemo.chat import ChatDataset

    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = {"max_seq_length": 512, "memmap_workers": 1, "index_mapping_dir": str(folder / "index")}
    return (cls or ChatDataset)(str(file), tokenizer, **defaults | settings)


def seen(dataset, index=0):
    """A row as text, what is learned between « and »."""
    from nemo_tiedlora.job.preview import marked, stretches

    row = dataset.row(index)
    return marked(stretches(dataset.tokenizer, row["input_ids"].tolist(), dataset.learned(row)), False).plain


def test_without_a_template_turns_are_lines_and_answers_end_the_text(tmp_path, sentencepiece):
    rows = [messages("Who?", "Kate", "And then?", "Ben", system="Answer."), messages("Who?", "Kate", "Why?")]
    chat = dataset(tmp_path, sentencepiece, rows)
    first = "system: Answer.\nuser: Who?\nassistant:« Kate</s>»user: And then?\nassistant:« Ben</s>»"
    assert seen(chat) == first
    assert seen(chat, 1) == "user: Who?\nassistant:« Kate</s>»"  # nobody answers the last one
    row = chat.row(0)
    assert sentencepiece.ids_to_text(row["answer_ids"].tolist()) == "Ben"
    assert row["context_ids"].tolist() + row["answer_ids"].tolist() == row["input_ids"].tolist()
    # What the model is asked later, as one text, is what it was trained on.
    assert row["input_ids"].tolist()[:12] == sentencepiece.text_to_ids("system: Answer.\nuser: Who?\nassistant:")[:12]


def test_a_chat_template_writes_the_turns_and_the_answers_are_found(tmp_path):
    chat = dataset(
        tmp_path, hugging_face(tmp_path, CHATML), [messages("Hé?", "Kate ✓", "And?", "Ben", system="Answer.")]
    )
    assert seen(chat) == (
        "<|im_start|>system\nAnswer.<|im_end|>\n"
        "<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n«Kate ✓<|im_end|>\n»"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n«Ben<|im_end|>\n»"
    )
    # A generated answer, with which it is compared, has no line break after its end.
    assert chat.tokenizer.tokenizer.decode(chat.row(0)["answer_ids"]) == "Ben<|im_end|>"


def test_a_template_with_generation_marks_says_itself_what_is_learned(tmp_path):
    assert seen(dataset(tmp_path, hugging_face(tmp_path, MARKED), [messages("Hé?", "Kate", "And?", "Ben")])) == (
        "Q:Hé?A:«Kate;»Q:And?A:«Ben;»"
    )


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (UNSTEADY, messages("Who?", "Kate", "And?", "Ben"), "answers cannot be told from prompts"),
        (UNMARKED, messages("Who?", "Kate"), "marks nothing of it as generated"),
        (ALTERNATING, messages("Who?", "Kate", system="Answer."), "refuses it (Roles must alternate)"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_with_the_line(tmp_path, template, row, message):
    chat = dataset(tmp_path, hugging_face(tmp_path, template), [messages("Who?", "Kate"), row])
    with pytest.raises(UsageError) as error:
        for index in range(2):
            chat.row(index)
    assert message in str(error.value) and f"of {chat.file_path}" in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        conversation("Who?", "Kate", "And then?", "Ben"),
        conversation("Who?", "Kate", system=""),
        conversation("Who?", "Kate", type="VALUE_TO_TEXT"),
        conversation("Kate", "Who?", "And?", mask="Assistant"),
    ],
)
def test_nemos_rows_are_as_nemo_makes_them(tmp_path, sentencepiece, row):
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import GPTSFTChatDataset

    ours, nemos = dataset(tmp_path, sentencepiece, [row]), dataset(tmp_path, sentencepiece, [row], GPTSFTChatDataset)
    batches = [chat.collate_fn([chat[0]]) for chat in (ours, nemos)]
    for name in ("tokens", "labels", "loss_mask", "contexts", "context_lengths", "answers"):
        assert batches[0][name].tolist() == batches[1][name].tolist(), name


def test_a_tokenizer_that_joins_turns_is_refused_for_nemos_rows(tmp_path):
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    joins = SentencePieceTokenizer(str(toy.tokenizer(tmp_path / "tokenizer")))  # knows no line ends
    with pytest.raises(UsageError, match="model.data.chat_prompt_tokens"):
        dataset(tmp_path, joins, [conversation("what is 1", "2", "and 2", "4")]).row(0)


def test_long_rows_lose_exchanges_then_prompt_then_answer(tmp_path, sentencepiece):
    long = messages(*"a? b c? d e? f".split(), system="Answer.")
    last = "system: Answer.\nuser: e?\nassistant:« f</s>»"

    def at(limit, row=long, **settings):
        return seen(dataset(tmp_path, sentencepiece, [row], max_seq_length=limit, **settings))

    needed = len(sentencepiece.text_to_ids(last.replace("«", "").replace("</s>»", ""))) + 1
    assert at(needed) == at(needed + 3) == last
    assert at(needed + 5, tokens_to_generate=6) == at(needed + 4, tokens_to_generate=6) == last
    shorter = at(needed - 2)
    assert last.endswith(shorter) and shorter != last  # by its beginning, without the answer
    cut = at(8, messages("Who? " * 9, "Kate Ben Vera Leo Emma Anna"))
    prompt, answer = cut.split("«")
    assert len(sentencepiece.text_to_ids(prompt)) >= 3 and answer.startswith(" Kate")
    with pytest.raises(UsageError, match="max_seq_length=1: no room for a prompt and its answer: line 1 of"):
        at(1)


def test_nemos_rows_that_are_too_long_keep_their_last_answer(tmp_path, sentencepiece):
    row = conversation("a?", "b", "c?", "d", system="")
    whole = seen(dataset(tmp_path, sentencepiece, [row]))
    length = len(dataset(tmp_path, sentencepiece, [row]).row(0)["input_ids"])
    short = seen(dataset(tmp_path, sentencepiece, [row], max_seq_length=length - 1))
    assert "b" in whole and "b" not in short.replace("table", "") and short.endswith("«d\n<extra_id_1>»")


def test_virtual_tokens_come_first_and_are_not_learned(tmp_path, sentencepiece):
    chat = dataset(tmp_path, sentencepiece, [messages("Who?", "Kate")], virtual_tokens=3)
    row = chat.row(0)
    assert row["input_ids"][:3].tolist() == [sentencepiece.eos_id] * 3 and not row["mask"][:3].any()


def test_a_changed_file_is_read_anew_and_a_byte_order_mark_is_no_part_of_it(tmp_path, sentencepiece):
    chat = dataset(tmp_path, sentencepiece, [messages("Who?", "Kate")])
    expected = seen(chat)
    file = tmp_path / "rows.jsonl"
    content = file.read_bytes()
    file.unlink()  # NeMo maps it into memory
    file.write_bytes(b"\xef\xbb\xbf" + content * 2)
    again = type(chat)(
        str(file), sentencepiece, memmap_workers=1, index_mapping_dir=str(tmp_path / "index"), max_seq_length=64
    )
    assert len(again) == 2 and seen(again) == seen(again, 1) == expected


@pytest.mark.parametrize(("row", "steps"), [(messages("Say a name", "Kate"), 40), (conversation("Who?", "Kate"), 2)])
def test_the_main_job_learns_and_answers_chat(tmp_path, row, steps):
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    code, out, err = forked.script(
        SCRIPT,
        "model.data.chat=true",
        "model.data.train_ds.file_names=[chat.jsonl]",
        "model.data.validation_ds.file_names=[chat.jsonl]",
        "model.data.train_ds.max_seq_length=96",
        "model.data.validation_ds.metric.name=exact_string_match",
        "model.data.validation_ds.tokens_to_generate=6",
        "model.global_batch_size=1",
        "model.micro_batch_size=1",
        "model.peft.tied_lora_tuning.target_modules=[all]",
        "model.optim.lr=3e-2",
        "model.optim.sched.warmup_steps=10",
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps}",
        cwd=tmp_path,
    )
    assert code == 0, err[-2000:]
    assert out.startswith("first training row, what is learned between « and »:") and out.count("Kate") >= 2
    summary = json.loads((tmp_path / out.splitlines()[-1]).read_text())
    (sample,) = summary["samples"]
    assert Path(summary["adapter"]).is_file() and sample["input"] and "Kate" in sample["expected"]
    if steps > 2:
        assert sample["expected"] == sample["after"] == "Kate"
        assert (summary["metric_before"], summary["metric_after"]) == (0, 1)
