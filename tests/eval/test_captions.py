"""Captions come one for each image, from a text or a table, and what is wrong with them is one sentence."""

import re

import pandas as pd
import pytest

from dmd2.errors import UserError
from eval.captions import read_captions

CAPTIONS = ["a cat", "  two dogs, on a beach ", "NA", '"quoted", caf\u00e9', "42", "2024-01-01", "one\u2028separator"]


def write(path, captions=CAPTIONS):
    table = pd.DataFrame({"id": range(len(captions)), "caption": captions})
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        path.write_text("\n".join(captions) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["c.txt", "c.csv", "c.jsonl", "c.parquet", "c.CAPTIONS"])
def test_every_form_gives_the_same_captions(tmp_path, name) -> None:
    assert read_captions(write(tmp_path / name)) == CAPTIONS


@pytest.mark.parametrize("text", ["a\nb\n", "a\nb", "a\r\nb\r\n", "\ufeffa\nb\n"])
def test_line_ends_and_byte_order_mark_are_no_part_of_a_caption(tmp_path, text) -> None:
    (tmp_path / "c.txt").write_bytes(text.encode())
    assert read_captions(tmp_path / "c.txt") == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", b"a\n\nb\n", r"c\.txt: line 2 is blank"),
        ("c.txt", b"a\nb\n \t\n", r"c\.txt: line 3 is blank"),
        ("c.csv", b"caption,id\na,1\n,2\n", r"c\.csv: row 1 \(from 0\) is blank"),
        ("c.csv", b"caption\na\n\nb\n", r"c\.csv: row 1 \(from 0\) is blank"),
        ("c.jsonl", b'{"caption": "a"}\n{"caption": null}\n', r"c\.jsonl: row 1 \(from 0\) is blank"),
        ("c.csv", b"text,id\na,1\n", r"c\.csv has no column caption, only text, id"),
        ("c.csv", b"", r"c\.csv is not a readable table"),
        ("c.jsonl", b"{", r"c\.jsonl is not a readable table"),
        ("c.parquet", b"PAR1", r"c\.parquet is not a readable table"),
        ("c.txt", b"\xff\xfe", r"c\.txt is not a readable UTF-8 text"),
        ("c.txt", b"", r"c\.txt holds no captions"),
        ("missing.txt", None, r"missing\.txt is not a readable UTF-8 text"),
        ("missing.csv", None, r"missing\.csv is not a readable table"),
    ],
)
def test_bad_captions_are_one_sentence(tmp_path, name, content, message) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_captions(tmp_path / name)
    assert re.fullmatch(r"[^\n]{10,400}", str(error.value))
