"""Table 2 of the Tied-LoRA paper: the parameter columns against the published ones."""

from typer.testing import CliRunner

from nemo_tiedlora import cli

#: (base model, at whose best rank, method) → P% on DialogSum, GSM8K, HellaSwag, IWSLT 2017, SQuAD.
PUBLISHED = {
    ("LLaMA2 7B", "LoRA", "LoRA"): (100.0, 100.0, 100.0, 100.0, 100.0),
    ("LLaMA2 7B", "LoRA", "VeRA"): (9.4, 1.2, 4.7, 9.4, 37.5),
    ("LLaMA2 7B", "LoRA", "TL1"): (0.8, 0.8, 0.8, 0.8, 0.8),
    ("LLaMA2 7B", "LoRA", "TL2"): (10.2, 2.0, 5.5, 10.2, 38.3),
    ("LLaMA2 7B", "LoRA", "TL3"): (2.3, 2.3, 2.3, 2.3, 2.3),
    ("LLaMA2 7B", "LoRA", "TL4"): (2.3, 2.3, 2.3, 2.3, 2.3),
    ("LLaMA2 7B", "LoRA", "TL5"): (3.1, 3.1, 3.1, 3.1, 3.1),
    ("LLaMA2 7B", "LoRA", "TL6"): (12.5, 4.3, 7.8, 12.5, 40.6),
    ("LLaMA2 7B", "VeRA", "VeRA"): (9.4, 1.2, 4.7, 9.4, 37.5),
    ("LLaMA2 7B", "TL1", "TL1"): (1.6, 0.2, 0.2, 6.3, 0.8),
    ("LLaMA2 7B", "TL2", "TL2"): (15.7, 1.4, 4.8, 22.0, 38.2),
    ("LLaMA2 7B", "TL3", "TL3"): (2.3, 0.1, 1.2, 4.7, 9.4),
    ("LLaMA2 7B", "TL4", "TL4"): (4.7, 0.3, 0.6, 4.7, 4.7),
    ("LLaMA2 7B", "TL5", "TL5"): (3.1, 3.1, 3.1, 6.3, 6.3),
    ("LLaMA2 7B", "TL6", "TL6"): (15.6, 4.3, 17.2, 21.9, 43.8),
    ("GPT-2B-001", "LoRA", "LoRA"): (100.0, 100.0, 100.0, 100.0, 100.0),
    ("GPT-2B-001", "LoRA", "VeRA"): (18.8, 1.2, 1.2, 0.6, 2.3),
    ("GPT-2B-001", "LoRA", "TL1"): (1.0, 1.0, 1.0, 1.0, 1.0),
    ("GPT-2B-001", "LoRA", "TL2"): (19.8, 2.2, 2.2, 1.6, 3.4),
    ("GPT-2B-001", "LoRA", "TL3"): (3.1, 3.1, 3.1, 3.1, 3.1),
    ("GPT-2B-001", "LoRA", "TL4"): (3.1, 3.1, 3.1, 3.1, 3.1),
    ("GPT-2B-001", "LoRA", "TL5"): (4.2, 4.2, 4.2, 4.2, 4.2),
    ("GPT-2B-001", "LoRA", "TL6"): (22.9, 5.3, 5.3, 4.8, 6.5),
    ("GPT-2B-001", "VeRA", "VeRA"): (18.8, 1.2, 1.2, 0.6, 2.3),
    ("GPT-2B-001", "TL1", "TL1"): (2.1, 0.1, 0.1, 0.1, 0.1),
    ("GPT-2B-001", "TL2", "TL2"): (20.1, 1.2, 1.2, 0.6, 2.5),
    ("GPT-2B-001", "TL3", "TL3"): (12.5, 0.4, 0.2, 0.1, 0.4),
    ("GPT-2B-001", "TL4", "TL4"): (25.1, 1.6, 0.2, 0.2, 0.8),
    ("GPT-2B-001", "TL5", "TL5"): (8.3, 8.3, 2.1, 2.1, 2.1),
    ("GPT-2B-001", "TL6", "TL6"): (52.2, 2.2, 3.3, 4.8, 10.8),
}


def test_the_table_is_the_published_one():
    lines = CliRunner().invoke(cli.app, ["table"], catch_exceptions=False).output.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0][:5] == ["Base model", "Method", "Best rank of", "DialogSum r", "DialogSum P%"]
    table, printed = {}, 0
    for base, rank_of_method, rank_of, *cells in ([row[0], row[1], row[2], *row[3:]] for row in rows[2:]):
        found = []
        for cell in cells[1::2]:
            ours, _, theirs = cell.partition(" (printed: ")
            printed += bool(theirs)
            assert not theirs or abs(float(ours) - float(theirs.rstrip(")"))) < 0.8
            found.append(float(theirs.rstrip(")")) if theirs else float(ours))
        table[base, rank_of, rank_of_method] = tuple(found)
    assert table == PUBLISHED and list(table) == list(PUBLISHED)
    assert printed == 7
