"""calibration_data with bad rows and bad arguments: each named, counted, and a way out."""

import json
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from expecttest import assert_expected_inline as expect
from PIL import Image
from processors import CHAT_TEMPLATE, MARKED_TEMPLATE, build_processor, build_tokenizer

from mbq_ao import calibration_data

IMAGE = Image.new("RGB", (30, 30))
GOOD = {"image": IMAGE, "question": "Which?", "answer": "red"}


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


def user_warnings(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def why(row: Any, processor: Any, **options: Any) -> str:
    """What is said of the row: the same with a good one beside it, under strict, and alone."""
    rows = [row, GOOD]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        assert len(calibration_data(rows, processor, n_samples=2, **options)) == 1
    (warning,) = user_warnings(caught)
    head, text = warning.split("\n  row 0: ")
    assert head == "calibration data: n_samples=2 wanted, 1 used: the source has 2 rows\n1 bad:"
    with pytest.raises(ValueError) as strict:
        calibration_data(rows, processor, n_samples=2, strict=True, **options)
    assert str(strict.value) == f"row 0: {text} (strict=False skips such rows)"
    with pytest.raises(ValueError) as alone:
        calibration_data([row, row], processor, n_samples=1, **options)
    assert str(alone.value).startswith("none of the 2 rows can be used for calibration; 2 bad:\n  row 1: ")
    return text


def refused(exception: type[Exception], *args: Any, **options: Any) -> str:
    with pytest.raises(exception) as caught:
        calibration_data(*args, **options)
    return str(caught.value)


def chat(*content: Any, answer: Any = "red") -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]


def llava(*turns: str, **row: Any) -> dict[str, Any]:
    speakers = ("human", "gpt")
    return {"conversations": [{"from": speakers[i % 2], "value": turn} for i, turn in enumerate(turns)], **row}


IMAGE_PART = {"type": "image", "image": IMAGE}


def test_images_that_cannot_be_opened(processor: Any, tmp_path: Path) -> None:
    expect(
        why({**GOOD, "image": "a.png"}, processor),
        """image file not found: a.png; paths are relative to image_folder, which was not given""",
    )
    (tmp_path / "text.png").write_text("no image")
    said = why({**GOOD, "image": "text.png"}, processor, image_folder=tmp_path)
    expect(
        said.replace(str(tmp_path), "FOLDER"),
        """image FOLDER/text.png cannot be opened: cannot identify image file 'FOLDER/text.png'""",
    )
    Image.new("RGB", (300, 300), (3, 4, 5)).save(tmp_path / "cut.bmp")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "cut.bmp").read_bytes()[:5000])
    said = why({**GOOD, "image": "cut.bmp"}, processor, image_folder=tmp_path)
    expect(
        said.replace(str(tmp_path), "FOLDER"),
        """image FOLDER/cut.bmp cannot be opened: image file is truncated (446 bytes not processed)""",
    )
    expect(
        why({**GOOD, "image": "data:image/png;base64,AAAA"}, processor),
        """image of the row cannot be opened: cannot identify image file""",
    )
    expect(
        why({**GOOD, "image": 7}, processor),
        """\
image of the row cannot be opened: Incorrect format used for image. Should be an url linking to an image, a base64 \
string, a local path, or a PIL image.""",
    )
    said = why({**GOOD, "image": "gone.png"}, processor, image_folder=tmp_path)
    expect(said.replace(str(tmp_path), "FOLDER"), """image file not found: FOLDER/gone.png""")


def test_rows_without_an_answer(processor: Any) -> None:
    expect(why({**GOOD, "answer": None}, processor), """no answer: it must be a text, got NoneType""")
    expect(why({**GOOD, "answer": " "}, processor), """no answer: no turn of the assistant has text""")
    expect(why(llava("<image>Which?", image=IMAGE), processor), """no answer: no turn of the assistant has text""")
    expect(why(chat(IMAGE_PART)[:1], processor), """no answer: no turn of the assistant has text""")
    expect(why({**GOOD, "answer": ["red", "dark red"]}, processor), """the answer must be a text, got list""")
    expect(
        why({"image": IMAGE, "caption": "red"}, processor),
        """\
no messages, no conversations, no question and answer: got ['caption', 'image']; name the columns, such as \
columns={"question": ..., "answer": ...}""",
    )
    expect(
        why([{"role": "assistant", "content": "red"}], processor),
        """the conversation begins with an answer: no prompt leads to it""",
    )


def test_images_that_do_not_match_their_places(processor: Any) -> None:
    expect(
        why(llava("<image><image>Which?", "red", image=IMAGE), processor),
        """2 places for images in the conversation, but the row has 1""",
    )
    expect(
        why(llava("<image>Which?", "red", image=[IMAGE, IMAGE]), processor),
        """1 place for images in the conversation, but the row has 2""",
    )
    expect(
        why(llava("<image>Which?", "red"), processor), """1 place for images in the conversation, but the row has 0"""
    )
    expect(
        why({"messages": chat({"type": "image"}), "images": []}, processor),
        """1 place for images in the conversation, but the row has 0""",
    )
    expect(
        why({"messages": chat(IMAGE_PART), "images": [IMAGE]}, processor),
        """images or videos both in the messages and beside them: keep one of the two""",
    )
    expect(
        why(chat(IMAGE_PART, {"type": "text", "text": "Is <image> a token?"}), processor),
        """\
LlavaProcessor refuses the row: ValueError: The total number of <image> tokens in the prompts should be the same as \
the number of images passed. Found total 2 <image> tokens and 1 images.""",
    )
    expect(why(chat({"type": "video", "video": [IMAGE]}), processor), """LlavaProcessor takes no videos""")


def test_rows_of_no_known_form(processor: Any) -> None:
    expect(why("Which?", processor), """a row must be a dict or a list of chat messages, got str""")
    expect(why({"messages": "Which?"}, processor), """messages must be a list, got str""")
    expect(
        why({"messages": ["Which?"]}, processor), """a message must be {"role": ..., "content": ...}, got 'Which?'"""
    )
    expect(why(chat("Which?"), processor), """a part of a message must be a dict with a "type", got 'Which?'""")
    expect(
        why(chat({"type": "audio", "audio": "a.wav"}), processor),
        """a part of a message must be of type "text", "image" or "video", got {'type': 'audio', 'audio': 'a.wav'}""",
    )
    expect(
        why({"conversations": [{"from": "cat", "value": "Meow"}]}, processor),
        """a turn must be from one of human, user, gpt, chatgpt, assistant, system, got 'cat'""",
    )
    expect(
        why({"conversations": [{"from": "human"}]}, processor),
        """a turn must be {"from": ..., "value": text}, got {'from': 'human'}""",
    )


def test_columns(processor: Any) -> None:
    rows = [{"picture": IMAGE, "question": "Which?", "answer": "red"}]
    expect(
        refused(ValueError, rows, processor, columns={"image": "photo"}),
        """\
none of the 1 rows can be used for calibration; 1 bad:
  row 0: no column 'photo', got ['answer', 'picture', 'question']""",
    )
    expect(
        refused(ValueError, rows, processor, columns={"picture": "image"}),
        """columns knows the names image, video, question, answer, messages, conversations, got picture""",
    )


def test_templates_that_hide_the_answer() -> None:
    other = build_processor(
        chat_template=CHAT_TEMPLATE.replace("'[assistant]' }}{%- endif", "'[assistant]? ' }}{%- endif")
    )
    expect(
        refused(ValueError, [GOOD], other),
        """\
none of the 1 rows can be used for calibration; 1 bad:
  row 0: the chat template does not continue its own prompt: turn 1 is asked for after \
'[user]<image>Which?<end>\\n[assistant]? ', which the whole conversation does not have there""",
    )
    silent = build_processor(
        chat_template=MARKED_TEMPLATE.replace("{{- message['content'][0]['text'] + '<end>' }}", "")
    )
    expect(
        refused(ValueError, [GOOD], silent),
        """\
none of the 1 rows can be used for calibration; 1 bad:
  row 0: no answer: the chat template writes none of the assistant's turns""",
    )
    strict = build_processor(chat_template="{{ raise_exception('Roles must alternate') }}")
    expect(
        refused(ValueError, [GOOD], strict),
        """\
none of the 1 rows can be used for calibration; 1 bad:
  row 0: the chat template refuses the conversation: TemplateError: Roles must alternate""",
    )


def test_tokens_that_hide_the_answer() -> None:
    # The line break that ends the prompt and the one that begins the answer are one token.
    joins = build_processor(
        chat_template=CHAT_TEMPLATE.replace("'[assistant]'", "'[assistant]\\n'").replace(
            "'[' + message['role'] + ']'", "'[' + message['role'] + ']\\n'"
        )
    )
    expect(
        refused(ValueError, [chat(IMAGE_PART, answer="\nred")], joins),
        """\
none of the 1 rows can be used for calibration; 1 bad:
  row 0: the tokens of the prompt change with the answer that follows, so the answer cannot be told apart""",
    )


def test_a_tokenizer_for_images() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    expect(
        refused(ValueError, [GOOD], tokenizer),
        """\
none of the 1 rows can be used for calibration; 1 bad:
  row 0: an image or a video, but a tokenizer was passed as the processor: pass the model's AutoProcessor""",
    )


def test_lines_that_are_no_json(processor: Any, tmp_path: Path) -> None:
    line = json.dumps({"question": "Which?", "answer": "red"})
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{line}\n\n{line[:-3]}\n{line}\n")
    with pytest.warns(UserWarning) as caught:
        assert len(calibration_data(str(file), processor, n_samples=3)) == 2
    expect(
        user_warnings(caught)[0],
        """\
calibration data: n_samples=3 wanted, 2 used: the source has 3 rows
1 bad:
  rows.jsonl line 3: not JSON: Unterminated string starting at at column 34""",
    )
    expect(
        refused(ValueError, file, processor, n_samples=3, strict=True),
        """rows.jsonl line 3: not JSON: Unterminated string starting at at column 34 (strict=False skips such \
rows)""",
    )


def test_files(processor: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[{"question": "Which?",\n "answer": }]')
    expect(refused(ValueError, file, processor), """rows.json line 2 is not JSON: Expecting value at column 12""")
    file.write_text("{}")
    expect(refused(ValueError, file, processor), """rows.json must hold a list of rows, got dict""")
    file.write_text("[]")
    expect(refused(ValueError, file, processor), """source has no rows""")
    expect(refused(ValueError, "rows.csv", processor), """source must be a .json or .jsonl file, got 'rows.csv'""")
    expect(refused(FileNotFoundError, "rows.json", processor), """[Errno 2] No such file or directory: 'rows.json'""")
    expect(
        refused(FileNotFoundError, [GOOD], processor, image_folder="no/folder"),
        """\
image_folder is no folder: no/folder""",
    )


def test_sources(processor: Any) -> None:
    expect(
        refused(TypeError, iter([GOOD]), processor),
        """\
source must be a path, a sequence of rows or a datasets.Dataset (one split of it), got list_iterator; of a stream, \
take some rows first, list(itertools.islice(stream, 1000)), of a pandas frame its frame.to_dict('records')""",
    )
    assert "got dict; " in refused(TypeError, {"train": [GOOD]}, processor)
    assert "got NoneType; " in refused(TypeError, None, processor)


def test_processors() -> None:
    expect(
        refused(TypeError, [GOOD], None),
        """\
processor must be the model's own, AutoProcessor.from_pretrained(name), got None""",
    )
    expect(
        refused(TypeError, [GOOD], "llava-hf/llava-1.5-7b-hf"),
        """\
processor must be the model's own, AutoProcessor.from_pretrained(name), got str""",
    )
    expect(
        refused(ValueError, [GOOD], build_processor(chat_template=None)),
        """\
LlavaProcessor has no chat template, which says how a question and its answer are written; set \
processor.chat_template, or make the batches by hand (see mbq_config)""",
    )


def test_choices(processor: Any) -> None:
    expect(
        refused(ValueError, [GOOD], processor, n_samples=0),
        """n_samples must be an integer of at least 1 in mode 'single', got 0""",
    )
    expect(
        refused(ValueError, [GOOD], processor, n_samples=1, mode="few_shot"),
        """n_samples must be an integer of at least 2 in mode 'few_shot', got 1""",
    )
    expect(
        refused(ValueError, [GOOD], processor, mode="many_shot"),
        """mode must be one of 'single', 'interleave', 'few_shot', got 'many_shot'""",
    )
    expect(
        refused(ValueError, [GOOD], processor, mode="interleave"),
        """\
mode="interleave" puts text between two pairs: pass texts=[...], documents of any kind""",
    )
    expect(
        refused(ValueError, [GOOD], processor, texts=["a"]),
        """\
texts are for mode="interleave", got mode='single'""",
    )
    expect(
        refused(ValueError, [GOOD], processor, max_length=0),
        """\
max_length must be a positive integer or None, got 0""",
    )
    expect(
        refused(ValueError, [GOOD], processor, max_length=5),
        """\
none of the 1 rows can be used for calibration; 1 of more than max_length=5 tokens""",
    )
    expect(
        refused(ValueError, [GOOD], processor, n_samples=2, mode="few_shot"),
        """\
none of the 1 rows can be used for calibration; two rows are needed for a batch""",
    )


def test_many_bad_rows_are_counted_in_one_warning(processor: Any) -> None:
    rows = [{**GOOD, "image": f"{i}.png"} for i in range(8)] + [GOOD] * 2
    with pytest.warns(UserWarning) as caught:
        assert len(calibration_data(rows, processor, n_samples=10)) == 2
    (warning,) = user_warnings(caught)
    expect(
        warning,
        """\
calibration data: n_samples=10 wanted, 2 used: the source has 10 rows
8 bad:
  row 6: image file not found: 6.png; paths are relative to image_folder, which was not given
  row 0: image file not found: 0.png; paths are relative to image_folder, which was not given
  row 2: image file not found: 2.png; paths are relative to image_folder, which was not given
  row 4: image file not found: 4.png; paths are relative to image_folder, which was not given
  row 3: image file not found: 3.png; paths are relative to image_folder, which was not given
  and 3 more""",
    )


def test_without_pillow(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    expect(refused(ImportError, [GOOD], processor), """calibration data with images needs Pillow: pip install pillow""")
