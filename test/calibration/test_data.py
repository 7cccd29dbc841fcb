"""calibration_data: forms of rows, labels, sampling, joined pairs, and real calibrations with what it gives."""

import base64
import functools
import http.server
import json
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import IMAGE
from models import build_model, model_inputs
from PIL import Image
from processors import CHAT_TEMPLATE, MARKED_TEMPLATE, PROCESSORS, build_processor, build_tokenizer
from tokenizers.normalizers import Prepend
from tokenizers.processors import TemplateProcessing

from mbq_ao import MBQInt3Tensor, calibration_data, mbq_config, quantize_
from mbq_ao.calibration.batch import IGNORE_INDEX
from mbq_ao.calibration.conversations import load_image

COLORS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
PILE = ["Far out in the backwaters of the end of the western arm of the galaxy. " * 20, "A cat sat.", "\n\nred red"]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Nothing is wrong in these tests unless they say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one color each."""
    path = tmp_path_factory.mktemp("images")
    for name, color in COLORS.items():
        Image.new("RGB", (40, 30), color).save(path / f"{name}.png")
    return path


@pytest.fixture(scope="module")
def pairs(folder: Path) -> list[dict[str, str]]:
    return [{"image": str(folder / f"{c}.png"), "question": "Which color?", "answer": c} for c in COLORS]


class Dataset:
    """What of a datasets.Dataset is used: a length, and rows by index."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


def answers_of(processor: Any, batch: dict[str, Any]) -> str:
    labels = batch["labels"][0]
    answer = labels != IGNORE_INDEX
    assert torch.equal(labels[answer], batch["input_ids"][0][answer])
    return processor.tokenizer.decode(labels[answer])


def assert_equal(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def rows_of_form(form: str, folder: Path) -> Any:
    """The same three pairs, one row each."""

    def chat(color: str, image: dict[str, Any]) -> list[dict[str, Any]]:
        user = {"role": "user", "content": [image, {"type": "text", "text": "Which color?"}]}
        return [user, {"role": "assistant", "content": [{"type": "text", "text": color}]}]

    opened = {c: Image.open(folder / f"{c}.png") for c in COLORS}
    llava = [
        {
            "id": c,
            "image": f"{c}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhich color?"},
                {"from": "gpt", "value": c},
            ],
        }
        for c in COLORS
    ]
    if form in ("json", "jsonl"):
        file = folder / f"rows.{form}"
        file.write_text(json.dumps(llava) if form == "json" else "\n\n".join(map(json.dumps, llava)) + "\n")
        return file
    if form == "dataset":
        return Dataset([{"picture": opened[c], "question": "Which color?", "label": c} for c in COLORS])
    if form == "dataset of messages":  # every part has every key, and messages say only where the image is
        rows = [chat(c, {"type": "image", "text": None}) for c in COLORS]
        return Dataset([{"messages": m, "images": [opened[c]]} for c, m in zip(COLORS, rows, strict=True)])
    return {
        "llava": llava,
        "llava, list of images": [{**row, "image": [row["image"]]} for row in llava],
        "llava, no marker": [
            {**row, "conversations": [{"from": "human", "value": "Which color?"}, row["conversations"][1]]}
            for row in llava
        ],
        "columns, bytes": [
            {
                "image": {"bytes": (folder / f"{c}.png").read_bytes(), "path": None},
                "question": "Which color?",
                "answer": c,
            }
            for c in COLORS
        ],
        "columns, array": [{"image": np.asarray(opened[c]), "question": "Which color?", "answer": c} for c in COLORS],
        "chat, PIL": [chat(c, {"type": "image", "image": opened[c]}) for c in COLORS],
        "chat, path": [chat(c, {"type": "image", "path": f"{c}.png"}) for c in COLORS],
        "chat, Path": [chat(c, {"type": "image", "image": folder / f"{c}.png"}) for c in COLORS],
        "chat, url": [
            chat(c, {"type": "image_url", "image_url": {"url": data_address(folder / f"{c}.png")}}) for c in COLORS
        ],
        "chat, base64": [
            chat(c, {"type": "image", "base64": data_address(folder / f"{c}.png").partition(",")[2]}) for c in COLORS
        ],
        "chat, answer a string": [
            [chat(c, {"type": "image", "image": opened[c]})[0], {"role": "assistant", "content": c}] for c in COLORS
        ],
    }[form]


def data_address(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


FORMS = (
    *("json", "jsonl", "llava", "llava, list of images", "llava, no marker"),
    *("dataset", "dataset of messages", "columns, bytes", "columns, array"),
    *("chat, PIL", "chat, path", "chat, Path", "chat, url", "chat, base64", "chat, answer a string"),
)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_batches(
    processor: Any, folder: Path, pairs: list[dict[str, str]], form: str
) -> None:
    columns = {"image": "picture", "answer": "label"} if form == "dataset" else None
    source = rows_of_form(form, folder)
    batches = calibration_data(source, processor, n_samples=3, image_folder=folder, columns=columns)
    assert_equal(batches, calibration_data(pairs, processor, n_samples=3))
    assert sorted(answers_of(processor, batch) for batch in batches) == ["blue<end>", "green<end>", "red<end>"]


def test_one_conversation(processor: Any, folder: Path) -> None:
    chat = rows_of_form("chat, PIL", folder)[0]
    (batch,) = calibration_data(chat, processor, n_samples=1)
    assert answers_of(processor, batch) == "red<end>"


def conversation(num_images: int = 2) -> list[dict[str, Any]]:
    """Two answers; the first holds what a template writes between turns, and ends as the second begins."""
    images = [{"type": "image", "image": Image.new("RGB", (60, 30), color)} for color in COLORS.values()]
    return [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [*images[:num_images], {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red\n\ncat: red"}]},
        {"role": "user", "content": [images[2], {"type": "text", "text": "And here?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]


@pytest.mark.parametrize("family", PROCESSORS)
def test_labels_of_real_processors_are_the_answers(family: str) -> None:
    processor = build_processor(family)
    chat = conversation()
    (batch,) = calibration_data([chat], processor, n_samples=1)
    assert answers_of(processor, batch) == "A red\n\ncat: red<end>red<end>"
    expected = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert batch.keys() == {*expected, "labels"}
    assert_equal([model_inputs(batch)], [dict(expected)])
    # The prompt of the labels is what the model is asked with, token for token.
    asked = processor.apply_chat_template(
        chat[:4], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    length = asked["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], asked["input_ids"])
    assert (batch["labels"][0, length:] != IGNORE_INDEX).sum() == 2
    assert batch["labels"][0, length] != IGNORE_INDEX


def test_images_that_are_tiled_only_alone() -> None:
    # One image alone has ten tokens, of several each has five; counting the prompt's tokens alone would be wrong.
    processor = build_processor("llava_onevision")
    row = {"image": Image.new("RGB", (60, 30)), "question": "What?", "answer": "red"}
    (alone,) = calibration_data([row], processor, n_samples=1)
    (joined,) = calibration_data([row, row], processor, n_samples=2, mode="few_shot")
    assert (joined["input_ids"] == IMAGE).sum() < 2 * (alone["input_ids"] == IMAGE).sum()
    assert answers_of(processor, joined) == "red<end>red<end>"


def test_generation_marks_agree_with_differences_and_with_transformers(processor: Any) -> None:
    marked = build_processor(chat_template=MARKED_TEMPLATE)
    batches = calibration_data([conversation()], marked, n_samples=1)
    assert_equal(batches, calibration_data([conversation()], processor, n_samples=1))
    theirs = marked.apply_chat_template(
        conversation(), tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    assert torch.equal(batches[0]["labels"] != IGNORE_INDEX, torch.as_tensor(theirs["assistant_masks"]).bool())


@pytest.mark.parametrize("headers", ["[assistant] ", "[assistant]:"], ids=["blank in the prompt", "blank before"])
@pytest.mark.parametrize("marks", [("", ""), ("{%- generation %}", "{%- endgeneration %}")], ids=["plain", "marked"])
def test_a_blank_before_the_answer(headers: str, marks: tuple[str, str]) -> None:
    # " red" is one token, and no special token ends the answer.
    processor = build_processor(
        chat_template="{%- for message in messages %}"
        "{%- if message['role'] == 'user' %}{{- 'USER: <image>What?' }}"
        f"{{%- else %}}{{{{- '{headers.strip()}' + ' ' }}}}{marks[0]}"
        f"{{{{- message['content'][0]['text'] + ' ' }}}}{marks[1]}"
        "{%- endif %}{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{- '{headers}' }}}}{{%- endif %}}"
    )
    row = {"image": Image.new("RGB", (30, 30)), "question": "What?", "answer": "red"}
    (batch,) = calibration_data([row], processor, n_samples=1)
    assert answers_of(processor, batch) == " red"
    assert (batch["labels"] != IGNORE_INDEX).sum() == 1


@pytest.mark.parametrize("marks", [("", ""), ("{%- generation %}", "{%- endgeneration %}")], ids=["plain", "marked"])
def test_a_tokenizer_that_puts_a_blank_after_special_tokens(marks: tuple[str, str]) -> None:
    # As LLaVA-1.5: no special token but the image's in the text, and SentencePiece's blank at each beginning.
    processor = build_processor(
        chat_template="{%- for message in messages %}{{- message['role'].upper() + ': ' }}"
        "{%- for part in message['content'] %}"
        "{%- if part['type'] == 'image' %}{{- '<image>' }}"
        "{%- elif message['role'] != 'assistant' %}{{- part['text'] + ' ' }}"
        f"{{%- else %}}{marks[0]}{{{{- part['text'] + ' ' }}}}{marks[1]}"
        "{%- endif %}{%- endfor %}{%- endfor %}{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"
    )
    processor.tokenizer.backend_tokenizer.normalizer = Prepend(" ")
    (batch,) = calibration_data([conversation()], processor, n_samples=1)
    assert answers_of(processor, batch) == " A red\n\ncat: red red"


def test_first_token_is_not_doubled(processor: Any, pairs: list[dict[str, str]]) -> None:
    with_bos = build_processor(chat_template="{{- '<s>' }}" + CHAT_TEMPLATE)
    special = [("<s>", with_bos.tokenizer.bos_token_id)]
    with_bos.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    for mode in ("single", "few_shot"):
        for batch in calibration_data(pairs, with_bos, n_samples=2, mode=mode):
            assert batch["input_ids"][0, :2].tolist() == with_bos.tokenizer.encode("<s>[", add_special_tokens=False)


def test_seeds_and_sizes(processor: Any, pairs: list[dict[str, str]]) -> None:
    rows = [{**pairs[0], "answer": str(i)} for i in range(20)]

    def drawn(seed: int, n: int = 6) -> list[str]:
        return [answers_of(processor, b) for b in calibration_data(rows, processor, n_samples=n, seed=seed)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 6
    assert drawn(0, n=9)[:6] == drawn(0)
    with pytest.warns(UserWarning) as caught:
        assert len(drawn(0, n=25)) == 20
    assert [str(w.message) for w in caught] == [
        "calibration data: n_samples=25 wanted, 20 used: the source has 20 rows"
    ]


def test_max_length_leaves_out_and_never_cuts(processor: Any, pairs: list[dict[str, str]]) -> None:
    rows = [*pairs, {**pairs[0], "answer": "red" * 50}]
    with pytest.warns(UserWarning, match="4 wanted, 3 used: the source has 4 rows\n1 of more than max_length=60"):
        batches = calibration_data(rows, processor, n_samples=4, max_length=60, strict=True)
    assert max(batch["input_ids"].shape[1] for batch in batches) <= 60


def test_dtype(processor: Any, pairs: list[dict[str, str]]) -> None:
    (batch,) = calibration_data(pairs, processor, n_samples=1, dtype=torch.bfloat16)
    assert batch["pixel_values"].dtype == torch.bfloat16 and batch["input_ids"].dtype == torch.int64


# LLaVA-OneVision's images have other tokens in company than alone: test_images_that_are_tiled_only_alone.
@pytest.mark.parametrize("family", sorted(PROCESSORS.keys() - {"llava_onevision"}))
def test_few_shot_is_two_pairs_joined(family: str, pairs: list[dict[str, str]]) -> None:
    processor = build_processor(family)
    singles = calibration_data(pairs, processor, n_samples=2)
    (joined,) = calibration_data(pairs, processor, n_samples=2, mode="few_shot")
    for key in ("input_ids", "labels", "attention_mask"):
        first, second = (single[key] for single in singles)
        if family == "mllama":  # its processor puts a first token before every text
            second = second[:, 1:]
        assert torch.equal(joined[key], torch.cat([first, second], 1)), key


@pytest.mark.parametrize("seed", range(4))
def test_interleave_puts_512_text_tokens_between_two_pairs(pairs: list[dict[str, str]], seed: int) -> None:
    processor = build_processor()
    first, second = calibration_data(pairs, processor, n_samples=2, seed=seed)
    (joined,) = calibration_data(pairs, processor, n_samples=2, seed=seed, mode="interleave", texts=PILE[seed % 3 :])
    before, after = first["input_ids"].shape[1], second["input_ids"].shape[1]
    assert joined["input_ids"].shape == (1, before + 512 + after)
    for key in ("input_ids", "labels"):
        assert torch.equal(joined[key][:, :before], first[key])
        assert torch.equal(joined[key][:, -after:], second[key])
    # In the published code the text counts as answer.
    assert torch.equal(joined["labels"][:, before:-after], joined["input_ids"][:, before:-after])
    text = processor.tokenizer.decode(joined["input_ids"][0, before:-after])
    assert text.startswith((PILE + PILE)[seed % 3].strip()[:10]) and "<" not in text


def test_text_only_warns(processor: Any) -> None:
    rows = [{"question": "Which color?", "answer": "red"}]
    with pytest.warns(UserWarning, match="no row has an image or a video.*expect lower accuracy on images"):
        (batch,) = calibration_data(rows, processor, n_samples=1)
    assert answers_of(processor, batch) == "red<end>" and "pixel_values" not in batch


def test_text_with_a_tokenizer() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    rows = [{"question": "Which color?", "answer": "red"}]
    with pytest.warns(UserWarning, match="no row has an image"):
        (batch,) = calibration_data(rows, tokenizer, n_samples=1)
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == "red<end>"


@pytest.mark.parametrize("video", ["list of frames", "paths", "array", "messages"])
def test_videos(folder: Path, video: str) -> None:
    # The video processor is a stand-in: those of transformers need torchvision.
    processor = build_processor("qwen2_5_vl")
    paths = [str(folder / f"{c}.png") for c in COLORS] + [str(folder / "red.png")]
    frames = [Image.open(path) for path in paths]
    array = np.stack([np.asarray(frame) for frame in frames])
    rows: list[Any] = {
        "list of frames": [{"video": frames, "question": "Which?", "answer": "red"}],
        "paths": [
            {
                "video": paths,
                "conversations": [{"from": "human", "value": "<video>\nWhich?"}, {"from": "gpt", "value": "red"}],
            }
        ],
        "array": [{"videos": [array], "question": "Which?", "answer": "red"}],
        "messages": [
            [
                {"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "Which?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            ]
        ],
    }[video]
    (batch,) = calibration_data(rows, processor, n_samples=1)
    assert answers_of(processor, batch) == "red<end>"
    assert batch["video_grid_thw"].tolist() == [[4, 4, 6]]
    (given,) = processor.video_processor.seen[0][0]
    assert np.array_equal(np.stack([np.asarray(frame) for frame in given]), array)


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """Of a server on this computer with the images."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_images_from_the_network(processor: Any, pairs: list[dict[str, str]], address: str) -> None:
    rows = [{**row, "image": f"{address}/{row['answer']}.png"} for row in pairs]
    there, here = (calibration_data(source, processor, n_samples=3) for source in (rows, pairs))
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(there, here, strict=True))
    rows[1]["image"] = f"{address}/none.png"
    with pytest.warns(
        UserWarning, match=rf"image {address}/none.png cannot be opened: what is found there is no image"
    ):
        assert len(calibration_data(rows, processor, n_samples=3)) == 2


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "CMYK", "LA"])
def test_images_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.new("RGB", (8, 6), (200, 200, 200)).convert(mode).save(path)
    image = load_image(str(path))
    assert image.mode == "RGB" and image.size == (8, 6)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    Image.new("RGB", (8, 6)).save(tmp_path / "image.jpg", exif=exif)
    assert load_image("image.jpg", tmp_path).size == (6, 8)
    assert load_image(Image.open(tmp_path / "image.jpg")).size == (6, 8)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("mode", ["single", "few_shot"])
def test_calibrates_a_real_model(family: str, mode: Any, pairs: list[dict[str, str]]) -> None:
    model = build_model(family)
    data = calibration_data(pairs, build_processor(family), n_samples=2, mode=mode)
    report = quantize_(model, mbq_config(data, group_size=32, n_grid=2, recipe="mbq"), progress=False)
    assert report is not None and str(report)
    assert isinstance(model.model.language_model.layers[0].self_attn.q_proj.weight, MBQInt3Tensor)
    assert model(**data[0]).loss.isfinite()
