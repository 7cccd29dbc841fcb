"""Rows of the forms that users have, as conversations in transformers' form, and their images and videos.

    LLaVA        {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...]}
    chat         [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", ...}]}, ...]
                 or a row {"messages": [...], "images": [...]}, whose messages only say where the images are
    columns      {"image": ..., "question": "What is it?", "answer": "A cat."}, under names of the user's

Each becomes a Conversation, so that everything after this file knows one form.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLUMNS = ("image", "video", "question", "answer", "messages", "conversations")
_MARKER = re.compile("(<image>|<video>)")  # where the medium goes, in the texts of LLaVA's form and of columns
_LLAVA_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_SOURCES = {"image": ("image", "url", "path", "base64", "image_url"), "video": ("video", "url", "path")}


class BadRow(ValueError):
    """Why a row cannot be used."""


@dataclass
class Conversation:
    """messages: transformers' form, in which {"type": "image"} and {"type": "video"} only say where the medium goes.

    images, videos: the media in the order of those parts; not loaded yet before `load_media`.
    """

    messages: list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)


def read_row(row: Any, columns: Mapping[str, str]) -> Conversation:
    """The conversation of a row in one of the forms above.  columns: our names (COLUMNS) -> the row's.

    Raises BadRow for a row of no such form, media that do not match their places, and a row without an answer.
    """
    if _is_list(row):
        conversation = _from_messages(row, [], [])
    elif isinstance(row, Mapping):
        conversation = _from_mapping(row, columns)
    else:
        raise BadRow(f"a row must be a dict or a list of chat messages, got {type(row).__name__}")
    answers = (_text_of(m["content"]) for m in conversation.messages if m["role"] == "assistant")
    if not any(answer.strip() for answer in answers):
        raise BadRow("no answer: no turn of the assistant has text")
    return conversation


def _from_mapping(row: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    def column(name: str) -> Any:
        if name in columns and columns[name] not in row:
            raise BadRow(f"no column {columns[name]!r}, got {sorted(map(str, row))}")
        return row.get(columns.get(name, name))

    def media(name: str) -> list[Any]:
        values = column(name)
        if values is None and name not in columns and row.get(f"{name}s") is not None:
            return list(_listed(row[f"{name}s"], f"{name}s"))
        if values is None or (isinstance(values, str | bytes) and not values):
            return []
        # A list of images is several images; a list of frames is one video.
        several = _is_list(values) and (name == "image" or all(_is_list(v) or _dimensions(v) == 4 for v in values))
        return list(values) if several else [values]

    images, videos = media("image"), media("video")
    if (messages := column("messages")) is not None:
        return _from_messages(messages, images, videos)
    if (turns := column("conversations")) is not None:
        return _from_turns([_llava_turn(turn) for turn in _listed(turns, "conversations")], images, videos)
    question, answer = column("question"), column("answer")
    if question is None and answer is None:
        raise BadRow(
            f"no messages, no conversations, no question and answer: got {sorted(map(str, row))}; name the columns, "
            'such as columns={"question": ..., "answer": ...}'
        )
    for name, text in (("question", question), ("answer", answer)):
        if not isinstance(text, str):
            what = "no answer: it" if name == "answer" and text is None else f"the {name}"
            raise BadRow(f"{what} must be a text, got {type(text).__name__}")
    return _from_turns([("user", question), ("assistant", answer)], images, videos)


def _llava_turn(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise BadRow(f'a turn must be {{"from": ..., "value": text}}, got {_short(turn)}')
    if (role := _LLAVA_ROLES.get(turn.get("from", ""))) is None:
        raise BadRow(f"a turn must be from one of {', '.join(_LLAVA_ROLES)}, got {turn.get('from')!r}")
    return role, turn["value"]


def _from_turns(turns: list[tuple[str, str]], images: list[Any], videos: list[Any]) -> Conversation:
    """Texts whose markers say where the media go; without any marker they go before the first question."""
    messages: list[dict[str, Any]] = []
    if not any(_MARKER.search(text) for role, text in turns if role == "user"):
        users = [i for i, (role, _) in enumerate(turns) if role == "user"]
        if users:
            turns[users[0]] = ("user", "<video>" * len(videos) + "<image>" * len(images) + turns[users[0]][1])
    for role, text in turns:
        pieces = _MARKER.split(text) if role == "user" else [text]
        # The line break around a marker belongs to LLaVA's form: templates put their own.
        content = [
            {"type": piece[1:-1]} if _MARKER.fullmatch(piece) else {"type": "text", "text": piece.strip()}
            for piece in pieces
            if piece.strip()
        ]
        messages.append({"role": role, "content": content})
    _match_media(messages, images, videos)
    return Conversation(messages, images, videos)


def _from_messages(messages: Any, images: list[Any], videos: list[Any]) -> Conversation:
    """Chat messages that bring their media along, or places for those of the row's columns."""
    found: dict[str, list[Any]] = {"image": [], "video": []}
    plain: list[dict[str, Any]] = []
    for message in _listed(messages, "messages"):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise BadRow(f'a message must be {{"role": ..., "content": ...}}, got {_short(message)}')
        content = message["content"]
        if not isinstance(content, str):
            content = [_bare_part(part, found) for part in _listed(content, "content")]
        plain.append({**message, "content": content})
    inline = bool(found["image"] or found["video"])
    if inline and (images or videos):
        raise BadRow("images or videos both in the messages and beside them: keep one of the two")
    if inline:
        images, videos = found["image"], found["video"]
    _match_media(plain, images, videos)
    return Conversation(plain, images, videos)


def _bare_part(part: Any, found: dict[str, list[Any]]) -> dict[str, Any]:
    """The part without its medium, which is appended to `found`."""
    if not isinstance(part, Mapping):
        raise BadRow(f'a part of a message must be a dict with a "type", got {_short(part)}')
    kind = "image" if part.get("type") == "image_url" else part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in _SOURCES:
        raise BadRow(f'a part of a message must be of type "text", "image" or "video", got {_short(part)}')
    # Rows of a datasets Dataset have every key in every part, None where it is missing.
    key = next((key for key in _SOURCES[kind] if part.get(key) is not None), None)
    if key is not None:
        medium = part[key]
        if isinstance(medium, Mapping) and "url" in medium:  # OpenAI's form wraps the address once more
            medium = medium["url"]
        found[kind].append(f"data:image/;base64,{medium}" if key == "base64" else medium)
    return {"type": kind}


def _match_media(messages: Sequence[Mapping[str, Any]], images: list[Any], videos: list[Any]) -> None:
    for kind, media in (("image", images), ("video", videos)):
        places = sum(p["type"] == kind for m in messages if not isinstance(m["content"], str) for p in m["content"])
        if places != len(media):
            raise BadRow(
                f"{places} place{'s' * (places != 1)} for {kind}s in the conversation, but the row has {len(media)}"
            )


def load_media(conversation: Conversation, image_folder: str | os.PathLike[str] | None) -> Conversation:
    """The conversation with its images as RGB PIL images, upright by their EXIF tag, and its videos' frames loaded.

    Raises BadRow for what cannot be opened, ImportError without Pillow.
    """

    def image(source: Any) -> Any:
        return load_image(source, image_folder)

    videos = [_load_video(video, image, image_folder) for video in conversation.videos]
    return Conversation(conversation.messages, [image(source) for source in conversation.images], videos)


def load_image(source: Any, image_folder: str | os.PathLike[str] | None = None) -> Any:
    """An RGB PIL image from a path, URL, base64 text, bytes, (H, W, 3) uint8 array, or PIL image."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("calibration data with images needs Pillow: pip install pillow") from error
    from transformers.image_utils import load_image as transformers_load_image

    if isinstance(source, Mapping):  # as datasets gives an image that it was told not to decode
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str | os.PathLike) and not _is_address(source):
        source = Path(_existing_file(source, image_folder, "image"))
    data = isinstance(source, str) and source.startswith("data:")
    name = source if isinstance(source, str | Path) and not data else "of the row"
    try:
        if data:
            source = base64.b64decode(source.partition(",")[2])
        if isinstance(source, bytes | Path):
            # Opened here, as transformers leaves a file open that breaks off.
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                return transformers_load_image(opened)
        if hasattr(source, "__array_interface__") and not isinstance(source, Image.Image):
            source = Image.fromarray(source)
        return transformers_load_image(source, timeout=60)  # by default it waits forever
    except Exception as error:  # whatever a decoder or the network may raise: the row is bad, the run goes on
        reason = str(error).partition(" <_io")[0]  # the address of a buffer says nothing
        if isinstance(error, UnidentifiedImageError) and _is_address(name):
            reason = "what is found there is no image (a page that says so, where there is none)"
        raise BadRow(f"image {name} cannot be opened: {reason}") from error


def _load_video(video: Any, image: Callable[[Any], Any], image_folder: str | os.PathLike[str] | None) -> Any:
    """Frames of a list are opened; arrays (T, H, W, 3) are the processor's to read, and so are video files."""
    if _is_list(video):
        return [image(frame) for frame in video]
    if isinstance(video, str | os.PathLike) and not _is_address(video):
        return _existing_file(video, image_folder, "video")
    return video


def _existing_file(source: str | os.PathLike[str], image_folder: str | os.PathLike[str] | None, kind: str) -> str:
    path = Path(image_folder or "", source)
    if not path.is_file():
        hint = "" if image_folder or path.is_absolute() else "; paths are relative to image_folder, which was not given"
        raise BadRow(f"{kind} file not found: {path}{hint}")
    return str(path)


def _is_address(source: str | os.PathLike[str]) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://", "data:"))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _dimensions(value: Any) -> int:
    return getattr(value, "ndim", 0)


def _listed(value: Any, name: str) -> Sequence[Any]:
    if not _is_list(value):
        raise BadRow(f"{name} must be a list, got {type(value).__name__}")
    return value


def _text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
