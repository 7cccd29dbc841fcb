"""A folder that remembers a calibration's finished steps, so that a killed run is taken up again: `work_dir=`.

    mbq_ao.lock              held by the process that uses the folder; the kernel lets go of it when that dies
    run.safetensors          the fingerprint of model, data and settings, and the environment
    sensitivity.safetensors  r of every inspected module
    block_0000.safetensors   of one decoder layer: its groups' scales, fitted weights, and reports
    stack_00_block_0000.safetensors  the same of a block of the vision tower, or of what else `targets` chose

Scales, fitted weights and reports are all there is to keep: other new weights, the streams between the layers and the
checks follow from them and from the model, in the same operations as in a run that was not interrupted, hence bit for
bit.

A file is written beside its place, fsynced, renamed, and the folder fsynced: after a kill or a power cut it is there
whole or not at all. It carries a checksum, and a key over the fingerprint and whatever else its content follows from.
A file that fails either is computed again. Only the run file's fingerprint refuses, as it alone can say what differs.

Of all this, reading the model is what takes time: sha256 of its parameters, 0.7 s a GB on one core of an AMD EPYC.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import platform
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import keystr, tree_flatten_with_path
from tqdm.auto import tqdm

import mbq_ao
from mbq_ao.calibration.batch import CalibrationBatch
from mbq_ao.calibration.report import some
from mbq_ao.calibration.settings import RECIPES, CalibrationSettings

_FORMAT = 4  # to be raised when a step comes to compute something else from the same fingerprint
_LOCK = "mbq_ao.lock"
_MOST = 10  # lines about what differs
_HASH = " sha256:"
# Of the model's config: where it came from and what wrote it. dtypes are those of the parameters.
_NOT_COMPUTED_WITH = ("transformers_version", "architectures", "dtype", "torch_dtype")


@dataclass
class State:
    """What one step found.

    record: JSON values, finite or not.  tensors: any shapes and dtypes; on the CPU when they were read.
    resumed: whether it was read instead of computed.
    """

    record: Any
    tensors: list[Tensor] = field(default_factory=list)
    resumed: bool = False


@dataclass(frozen=True)
class RunDescription:
    """What a run is told by: text by name.

    fingerprint: what its results follow from; another one is another run.
    environment: what may change their last bits.
    """

    fingerprint: dict[str, str]
    environment: dict[str, str]


class Store:
    """What `calibrate` asks for its steps. This one remembers nothing: every step is computed."""

    def check(self, describe: Callable[[], RunDescription]) -> None:
        """Make sure that what is remembered is of this run, before the first call of `once`."""

    def once(self, name: str, compute: Callable[[], State], *, follows_from: object = None) -> State:
        """The state of the step `name`: what is remembered, or what `compute` returns, which is remembered from then.

        follows_from: what the state depends on beyond the run's fingerprint; its repr is compared.
        """
        return compute()


class WorkDir(Store):
    """As the module says. Made by `open_work_dir`, which holds the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_key = ""

    def check(self, describe: Callable[[], RunDescription]) -> None:
        """Raises ValueError if the folder is of a run with another fingerprint; warns of another environment."""
        run = describe()
        self.run_key = _sha256(json.dumps(run.fingerprint, sort_keys=True).encode())
        known = self._read("run", "run")
        if known is None:
            self._write("run", "run", State({"fingerprint": run.fingerprint, "environment": run.environment}))
            return
        if found := differences(known.record["fingerprint"], run.fingerprint):
            raise ValueError(
                f"work_dir {str(self.path)!r} is of another run; pass another folder, or delete this one. "
                f"What differs:\n{found}"
            )
        if found := differences(known.record["environment"], run.environment):
            warnings.warn(
                f"work_dir {str(self.path)!r} was begun under other conditions, so that the last bits of the result "
                f"may differ from an uninterrupted run's:\n{found}",
                stacklevel=2,
            )

    def once(self, name: str, compute: Callable[[], State], *, follows_from: object = None) -> State:
        """Raises OSError if the state cannot be written."""
        key = _sha256(f"{self.run_key}\n{name}\n{follows_from!r}".encode())
        state = self._read(name, key)
        if state is None:
            state = compute()
            self._write(name, key, state)
        return state

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def _write(self, name: str, key: str, state: State) -> None:
        record = json.dumps(state.record)
        tensors = {str(i): tensor.detach().cpu().contiguous() for i, tensor in enumerate(state.tensors)}
        # One entry, as safetensors writes several in any order: the same state is the same bytes.
        entry = {"key": key, "record": record, "checksum": _checksum(key, record, list(tensors.values()))}
        with _told(self.path):
            _write_durably(self._file(name), safetensors.torch.save(tensors, {"mbq_ao": json.dumps(entry)}))

    def _read(self, name: str, key: str) -> State | None:
        """None if there is no file; None and a warning if it is damaged or follows from something else."""
        path = self._file(name)
        try:
            if not path.exists():
                return None
            with safetensors.safe_open(path, "pt") as file:
                entry = json.loads(file.metadata()["mbq_ao"])
                tensors = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
            if _checksum(entry["key"], entry["record"], tensors) != entry["checksum"]:
                raise ValueError("its checksum is wrong")
            if entry["key"] != key:
                raise ValueError("it is of another run")
            return State(json.loads(entry["record"]), tensors, resumed=True)
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(
                f"{path} cannot be used and is computed again ({type(error).__name__}: {error})", stacklevel=4
            )
            return None


@contextmanager
def open_work_dir(path: str | os.PathLike[str] | None) -> Iterator[Store]:
    """The folder as a WorkDir, made if it is missing and locked until the end; None: a Store that remembers nothing.

    Raises ValueError if another process (or thread) uses it, if it holds files but no calibration, or if it is a file;
    OSError if it cannot be written.
    """
    if path is None:
        yield Store()
        return
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"work_dir must be a folder, but {str(folder)!r} is a file")
    # The lock file is the first one written, so a folder without it was not made by us.
    if folder.exists() and not (folder / _LOCK).exists() and any(folder.iterdir()):
        raise ValueError(
            f"work_dir {str(folder)!r} holds files but no calibration; pass a new or empty folder, so that it can be "
            "deleted as a whole"
        )
    with _told(folder):
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)  # another process may have been faster
            _sync_folder(folder.parent)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(lock, folder)
        yield WorkDir(folder)
    finally:
        os.close(lock)  # lets go of it


def _lock(file: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError as error:
        raise NotImplementedError("work_dir needs POSIX file locks, which this platform lacks; leave it out") from error

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(file, 200).decode(errors="replace") or "unknown"
        raise ValueError(
            f"work_dir {str(folder)!r} is in use by another call of quantize_ ({holder}); wait for it, or pass "
            "another folder"
        ) from error
    except OSError as error:  # some network file systems
        warnings.warn(
            f"work_dir {str(folder)!r} cannot be locked ({error.strerror}): see to it that no other process uses it",
            stacklevel=4,
        )
    with _told(folder):
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """An OSError inside says what it means for the run."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}: work_dir {str(folder)!r} cannot be written. The model is as it was, and the "
            "decoder layers finished before are kept: repair that (make room, change the permissions) and call "
            "quantize_ again with the same work_dir",
        ) from error


def _write_durably(path: Path, content: bytes) -> None:
    """Whole or not at all, also after a power cut. The folder is locked, so the name beside it is ours."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def describe_run(
    model: nn.Module,
    batches: Sequence[CalibrationBatch],
    settings: CalibrationSettings,
    selected: Mapping[str, Mapping[str, nn.Linear]],
    *,
    device: torch.device | None = None,
    progress: bool = False,
) -> RunDescription:
    """device: computes; None: the batches'.  selected: block -> {name in the block: linear}, what is quantized.

    Raises ValueError for a calibration batch with something in it that cannot be compared.
    """
    config: Any = getattr(model, "config", None)
    device = device or batches[0].labels.device
    # A buffer that is not saved is computed from the config, by some models (dynamic RoPE) anew in every forward.
    saved = model.state_dict().keys()
    named = [*model.named_parameters(), *((name, b) for name, b in model.named_buffers() if name in saved)]
    fingerprint = {
        "format of the files": str(_FORMAT),
        "model class": type(model).__name__,
        **{f"model config {k}": v for k, v in _flat(config.to_dict() if hasattr(config, "to_dict") else {})},
        **{
            name: tensor_text(tensor)
            for name, tensor in tqdm(named, desc="fingerprint", disable=not progress, leave=False)
        },
        **{f"quantized linear {block}.{name}": "" for block, linears in selected.items() for name in linears},
        "recipe": repr(next((name for name, r in RECIPES.items() if r == settings.recipe), settings.recipe)),
        **{name: repr(getattr(settings, name)) for name in ("quantizer", "balance", "loss", "propagate_error")},
        **{name: repr(getattr(settings, name)) for name in ("n_grid", "scale_groups", "route_weighted")},
    }
    fingerprint.update(_describe_batches(batches))
    computer = f"{platform.machine()}, {torch.get_num_threads()} threads"
    environment = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({computer})",
        "attention": str(getattr(config, "_attn_implementation", None)),
        "mbq_ao": mbq_ao.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return RunDescription(fingerprint, environment)


def describe_data(batches: Sequence[CalibrationBatch]) -> dict[str, Any]:
    """What a checkpoint tells of the data that it was calibrated on: how many batches, and one sha256 of all."""
    text = json.dumps(_describe_batches(batches), sort_keys=True)
    return {"num_batches": len(batches), "sha256": _sha256(text.encode())}


def _describe_batches(batches: Sequence[CalibrationBatch]) -> dict[str, str]:
    result = {}
    for index, batch in enumerate(batches):
        masks = {"labels": batch.labels, "vision_mask": batch.vision, "answer_mask": batch.answer, "valid": batch.valid}
        for path, leaf in tree_flatten_with_path({**batch.inputs, **masks})[0]:
            name = f"calibration batch {index}{keystr(path)}"
            result[name] = tensor_text(leaf) if isinstance(leaf, Tensor) else _value_text(name, leaf)
    return result


def _flat(config: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every value of a nested config that the model may compute with."""
    for key, value in config.items():
        if str(key).startswith("_") or key in _NOT_COMPUTED_WITH:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)


def tensor_text(tensor: Tensor) -> str:
    """dtype, shape and a hash of the values."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}{_HASH}{_sha256(*_bytes_of(tensor))}"


def _bytes_of(tensor: Tensor) -> Iterator[memoryview | bytes]:
    """The values' bytes, without a copy if they lie together in the CPU's memory."""
    if is_traceable_wrapper_subclass(tensor):  # a part of the model that is quantized already
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield tensor_text(getattr(tensor, name)).encode()
    else:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _value_text(name: str, value: object) -> str:
    if isinstance(value, str | int | float | None):
        return repr(value)
    try:
        return f"{type(value).__name__}{_HASH}{_sha256(pickle.dumps(value))}"
    except Exception as error:
        raise ValueError(
            f"{name} is a {type(value).__name__} that cannot be pickled, so it cannot be told whether it is "
            "the same in the next call (work_dir) or on the other ranks; pass tensors and numbers"
        ) from error


def _sha256(*parts: memoryview | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _checksum(key: str, record: str, tensors: Sequence[Tensor]) -> str:
    return _sha256("\n".join([key, record, *map(tensor_text, tensors)]).encode())


def differences(
    before: Mapping[str, str],
    now: Mapping[str, str],
    then: str = "in work_dir",
    here: str = "in this call",
) -> str:
    """The names whose text differs, one line for those that differ in the same way; "" if none does.

    then, here: where the two are.
    """
    names_by_text: dict[str, list[str]] = {}
    for name in dict.fromkeys([*now, *before]):
        if name not in before or name not in now:
            text = f"only {here if name in now else then}"
        elif before[name] != now[name]:
            (old, _, _), (new, _, _) = (text.partition(_HASH) for text in (before[name], now[name]))
            text = f"{old} {then}, {new} {here}" if old != new else "other values"
        else:
            continue
        names_by_text.setdefault(text, []).append(name)
    lines = [f"  {some(names, most=2)}: {text}" for text, names in names_by_text.items()]
    more = [f"  and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    return "\n".join(lines[:_MOST] + more)
