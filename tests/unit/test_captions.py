"""Captions come one for each image, from a text or a table, and what is wrong with them is one sentence."""

import json
import pickle
import re
import subprocess
import sys

import pandas as pd
import pytest

from dmd2.core.errors import UserError
from dmd2.core.files import listing, write_json
from dmd2.data.captions import captions_of, read_captions, read_prompts, save_captions

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
        ("c.csv", b"title,id\na,1\n", r"c\.csv: there is no column caption, only title, id"),
        ("c.csv", b"text,prompt\na,b\n", r"c\.csv: there is no column caption, only text, prompt"),
        (
            "c.jsonl",
            b'{"caption": "a"}\n{"caption": ["b", "c"]}\n',
            r"c\.jsonl: row 1 \(from 0\) has \['b', 'c'\] instead of",
        ),
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


@pytest.mark.parametrize("name", ["c.txt", "c.csv", "c.jsonl", "c.parquet"])
def test_prompts_are_read_like_captions(tmp_path, name) -> None:
    assert read_prompts(write(tmp_path / name)) == CAPTIONS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a\n\n  \nb\n\n"),
        ("p.csv", "prompt,id\na,1\n\nb,2\n\n"),
        ("p.csv", "id,text\n1,a\n2,b\n"),
        ("p.csv", "\ufefftext,caption,prompt\nx,a,y\nx,b,y\n"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n'),
    ],
)
def test_prompts_skip_blank_lines_and_take_the_only_candidate(tmp_path, name, content) -> None:
    (tmp_path / name).write_text(content)
    assert read_prompts(tmp_path / name) == ["a", "b"]


def test_a_quoted_nothing_is_the_empty_prompt_and_no_blank_line(tmp_path) -> None:
    pd.DataFrame({"caption": ["a", "", "b"]}).to_csv(tmp_path / "p.csv", index=False)
    assert read_prompts(tmp_path / "p.csv") == ["a", "", "b"]


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.parquet"])
def test_a_row_without_text_is_the_empty_prompt(tmp_path, name) -> None:
    assert read_prompts(write(tmp_path / name, ["a", None, "", "b"])) == ["a", "", "", "b"]
    with pytest.raises(UserError, match=r"row 1 \(from 0\) is blank"):
        read_captions(tmp_path / name)


def test_no_prompts_is_one_sentence(tmp_path) -> None:
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"p\.txt holds no prompts$"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("read", [read_captions, read_prompts])
def test_a_pickled_list_is_refused_with_the_command_that_converts_it(tmp_path, read) -> None:
    with open(tmp_path / "p.pkl", "wb") as file:
        pickle.dump(["a", None, "caf\u00e9"], file)
    with pytest.raises(UserError, match=r"p\.pkl is a pickle, which may run code") as error:
        read(tmp_path / "p.pkl")
    command = re.search(r"python (-c .*)$", str(error.value))
    assert command and "\n" not in str(error.value)
    subprocess.run(f"{sys.executable} {command[1]}", shell=True, cwd=tmp_path, check=True)
    assert read_prompts(tmp_path / "p.jsonl") == ["a", "", "caf\u00e9"]


def test_saved_captions_come_back_in_the_order_of_the_manifest(tmp_path) -> None:
    parts = [tmp_path / "part" / "captions-00000.jsonl", tmp_path / "captions-00001.jsonl"]
    save_captions(parts[0], CAPTIONS)
    save_captions(parts[1], ["last", ""])
    (tmp_path / "shard-00000.safetensors").write_bytes(b"heavy")
    files = listing([tmp_path / "shard-00000.safetensors", *parts], tmp_path)
    write_json(tmp_path / "manifest.json", {"files": files})
    assert captions_of(tmp_path / "manifest.json") == [*CAPTIONS, "last", ""]
    assert json.loads(parts[1].read_text().splitlines()[0]) == {"caption": "last"}
    save_captions(parts[1], ["LAST", ""])
    with pytest.raises(UserError, match=r"captions-00001\.jsonl does not match the checksum"):
        captions_of(tmp_path / "manifest.json")
    write_json(tmp_path / "manifest.json", {"files": files[:1]})
    with pytest.raises(UserError, match=r"lists no captions-\*\.jsonl"):
        captions_of(tmp_path / "manifest.json")
