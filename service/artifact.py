"""The artifact: one ONNX file that describes itself and proves itself.

    NAME-VERSION.onnx
      graph                 the step function, see `Detector.step`
      metadata_props
        onset.manifest      JSON of `Manifest`
        onset.selftest      base64 of a compressed npz, see `SelfTest`
        onset.sha256        SHA-256 of the file with these 64 digits set to '0'

Reading needs no ONNX library: the hash is checked on the raw bytes before anything parses them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import zipfile
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import re2
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from service.asking import SHIPPED, SHIPPED_MODELS
from service.errors import ArtifactError
from service.wire import Malformed, field

FORMAT = 1
AUDIT = "audit"
MANIFEST_KEY, SELFTEST_KEY, SHA256_KEY = "onset.manifest", "onset.selftest", "onset.sha256"
SEEN = 10
"""Events of this rate that a calibration must have had room for, to say how often they come."""
MAX_FEATURES = 300
SELFTEST_STEPS, SELFTEST_ROWS = 32, 8
SELFTEST_BYTES = 64 * 1024 * 1024
"""Of a self-test unpacked, at most; the largest that is made, of MAX_FEATURES and 65,536 floats of state, has 4 MB."""

MODEL_BYTES, METADATA_BYTES = 2**31, 32 * 1024 * 1024
"""Of a file, at most, as protobuf has it; and of what it says of itself: MAX_TEMPLATES of a hundred characters are 10 MB."""
_METADATA = 14
"""Number of `metadata_props` in a ModelProto."""

NEW = 0
"""Code of a line that no template matches; templates are 1 to V, and V + 1 is the end of a session.

What the graph reads of such a line is kind ÷ (2·NEW_KINDS), below a half: lines that begin alike are of one kind.
"""
NEW_KINDS = 16
NEW_TEXT, END_TEXT = "(new pattern)", "(end of session)"
"""How a code without a template is written."""
TEMPLATE, GAP = "template", "gap"
NUMBERS = ("number_1", "number_2", "number_3", "number_4")
"""The features of a log model, in this order; of the numbers as many as it takes."""
MAX_TEMPLATES = 100_000
WILDCARD, NUMBER = "<*>", "<NUM>"
"""In a template: any one token; and what masks write in place of a plain number, which is kept as a parameter of the line."""

UNSEALED = "0" * 64
# A metadata entry is a protobuf StringStringEntryProto: field 1 is the key, field 2 (tag 0x12) the value, here 0x40 = 64 bytes.
_SEAL = re.compile(re.escape(SHA256_KEY).encode() + rb"\x12\x40([0-9a-f]{64})")

_QUIET = re2.Options()
_QUIET.log_errors = False  # what is wrong with an expression is raised

Float32 = NDArray[np.float32]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Feature(_Frozen):
    """One number of an event. Context features are given to the network but never scored."""

    name: str = Field(min_length=1, max_length=128)
    unit: str | None = None
    role: Literal["scored", "context"] = "scored"


class Slice(_Frozen):
    """A named part of the state vector: `size` float32 each, in order, without gaps."""

    name: str
    size: int = Field(gt=0)


class Cell(_Frozen):
    """The recurrent network inside the graph."""

    variant: str
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    code: int = Field(gt=0)
    decoder_hidden: int = Field(gt=0)


class Mask(_Frozen):
    """What is replaced in every word of a line before it is matched, because it tells lines of one pattern apart."""

    name: str = Field(min_length=1, max_length=64)
    pattern: str = Field(min_length=1, max_length=1000)
    """In RE2's syntax; `^` and `$` are the ends of the word, `\\d` and `\\w` are ASCII."""
    replacement: str = Field(max_length=64, pattern=r"^([^\s<>]*<[^\s<>]+>[^\s<>]*)?$")
    """As it stands, such as <USER> or _<ID>; NUMBER where the replaced text is a number that belongs to the line's parameters; "" = none:
    what is found is a name (an event id, a status), stays as it is, and no other mask replaces it."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        if compiled(pattern).fullmatch(""):
            raise ValueError(f"{pattern!r} matches a text without characters, so it would match everywhere")
        return pattern


class Lines(_Frozen):
    """How a line becomes an event of a log model, see lines.py: the same codes on every replica, for as long as the model lives."""

    header: str = Field(default="", max_length=1000)
    """What a line may begin with that is none of its message (time, host, ...), in RE2's syntax; "" = nothing."""
    masks: list[Mask] = Field(default_factory=list, max_length=100)
    """The leftmost match is replaced first; of those that begin at the same place, the first in this list."""
    delimiters: str = Field(default="", max_length=32)
    """Characters that separate tokens, besides blanks; they are applied after the masks."""
    templates: list[str] = Field(min_length=1, max_length=MAX_TEMPLATES)
    """Tokens joined by one blank; WILDCARD stands for any token. Place in the list + 1 = code."""
    session_seconds: float | None = Field(default=None, gt=0)
    """Silence after which a session counts as over; None = streams are long-lived and never end by silence."""
    likely: int = Field(default=3, ge=1, le=20)
    """How many of the likeliest next lines the step names."""
    before: int = Field(default=5, ge=1, le=20)
    """How many of the lines before the step names."""

    @field_validator("header")
    @classmethod
    def _compiles(cls, header: str) -> str:
        compiled(header)
        return header

    @field_validator("templates")
    @classmethod
    def _distinct(cls, templates: list[str]) -> list[str]:
        if len(set(templates)) != len(templates):
            raise ValueError("templates are not unique")
        odd = next((template for template in templates if " ".join(template.split()) != template or not template), None)
        if odd is not None:
            raise ValueError(f"template {odd[:64]!r} is not tokens joined by one blank")
        return templates

    @property
    def end(self) -> int:
        """Code of the end of a session."""
        return len(self.templates) + 1

    @property
    def texts(self) -> list[str]:
        """What is written for each code, from NEW to the end of a session."""
        return [NEW_TEXT, *self.templates, END_TEXT]


class Training(_Frozen):
    """What the artifact was made from, and how to make it again."""

    command: str
    seed: int
    data: str
    data_sha256: str
    streams: int = Field(ge=0)
    rows: int = Field(ge=0)
    commit: str
    torch_version: str
    created: str


class Outset(_Frozen):
    """What of a detector is known before it is trained."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    version: str = Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+_-]{0,31}$")
    features: list[Feature] = Field(min_length=1, max_length=MAX_FEATURES)


class Manifest(Outset):
    """What the service has to know of a detector. Everything else is inside the graph."""

    format: Literal[1] = 1
    kind: Literal["sensor", "log"] = "sensor"
    description: str = ""
    lines: Lines | None = None
    """Exactly where `kind` is "log"."""
    state_size: int = Field(gt=0, le=65536)
    layout: list[Slice]
    warmup: int = Field(ge=0, description="events of a fresh stream without a score")
    cell: Cell
    training: Training
    calibration: dict[str, Any] = Field(default_factory=dict)
    quality: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [feature.name for feature in self.features]
        if len(set(names)) != len(names):
            raise ValueError(f"feature names are not unique: {sorted(n for n in set(names) if names.count(n) > 1)}")
        total = sum(part.size for part in self.layout)
        if total != self.state_size:
            raise ValueError(f"the layout's slices add up to {total} floats, state_size says {self.state_size}")
        if (self.lines is not None) != (self.kind == "log"):
            raise ValueError(f"kind is {self.kind!r}: 'lines' belong to the kind 'log', and to that alone")
        if self.lines is not None and tuple(names) != (TEMPLATE, GAP, *NUMBERS)[: max(2, len(names))]:
            raise ValueError(f"the features of a log model are {TEMPLATE}, {GAP} and {NUMBERS}, of the last none to all; these are {names}")
        return self

    @property
    def audit(self) -> slice | None:
        """Where the state keeps the sensitivity that a stream's quiet has earned at its α (training/tail.py); None = it has none."""
        return self.part(AUDIT)

    def part(self, name: str) -> slice | None:
        """Where the state has this slice of the layout; None = nowhere."""
        start = 0
        for part in self.layout:
            if part.name == name:
                return slice(start, start + part.size)
            start += part.size
        return None

    @cached_property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(feature.name for feature in self.features)

    @property
    def age_constant(self) -> float:
        """τ of the calibration: false onsets of a stream's n-th event are 1 + τ/n times as frequent as those of an old stream."""
        return float(self.calibration.get("tau", 0.0))

    @property
    def rarest(self) -> float | None:
        """False onsets per event below which the calibration has seen hardly any, and extrapolates; None = it does not say."""
        events = (self.calibration.get("support") or {}).get("events", 0)
        return SEEN / events if events else None

    @property
    def filename(self) -> str:
        return f"{self.name}-{self.version}.onnx"


@dataclass(frozen=True)
class SelfTest:
    """Inputs and answers of T steps on B streams, starting from zero states: what the file must answer on any machine."""

    x: Float32  # [T, B, F]
    t: Float32  # [T, B, 3]
    learn: Float32  # [T, B]
    alpha: Float32  # [T, B]
    p_value: Float32  # [T, B]
    onset_p: Float32  # [T, B]
    expected: Float32  # [T, B, F]
    lower: Float32  # [T, B, F]
    upper: Float32  # [T, B, F]
    contribution: Float32  # [T, B, F]
    likely: Float32  # [T, B, 2·likely], width 0 for sensors
    before: Float32  # [T, B, before], the same
    state: Float32  # [B, S] after the last step

    def encode(self) -> str:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name), np.float32) for f in fields(self)}
        np.savez_compressed(buffer, **arrays)
        return base64.b64encode(buffer.getvalue()).decode()

    @classmethod
    def decode(cls, text: str) -> SelfTest:
        """Raises ArtifactError when `text` is not what `encode` writes."""
        try:
            packed = io.BytesIO(base64.b64decode(text, validate=True))
            with zipfile.ZipFile(packed) as arrays:
                size = sum(member.file_size for member in arrays.infolist())
            if size > SELFTEST_BYTES:  # a few kB may unpack to gigabytes
                raise ValueError(f"they unpack to {size} bytes, at most {SELFTEST_BYTES}")
            with np.load(packed, allow_pickle=False) as arrays:
                nothing = np.zeros((*arrays["p_value"].shape, 0), np.float32)  # files of before there were log models have no such arrays
                return cls(**{f.name: arrays.get(f.name, nothing).astype(np.float32) for f in fields(cls)})
        except Exception as error:  # base64, zip and npy each have errors of their own; all mean the same here
            raise ArtifactError(f"The self-test vectors cannot be read: {error}") from error


def seal(unsealed: bytes) -> bytes:
    """Write the file's hash into its own metadata. `unsealed` carries `onset.sha256` = 64 zeros exactly once."""
    found = _SEAL.findall(unsealed)
    if found != [UNSEALED.encode()]:
        raise ArtifactError(f"The model has {len(found)} '{SHA256_KEY}' entries of 64 zeros; it must have exactly one.")
    return _with_digest(unsealed, hashlib.sha256(unsealed).hexdigest())


def verify_seal(content: bytes, path: Path) -> str:
    """The file's hash, after checking it. Raises ArtifactError when it is missing or differs."""
    found = _SEAL.findall(content)
    if len(found) != 1:
        raise ArtifactError(f"{path} carries no '{SHA256_KEY}': it was not published by `python -m training fit`.")
    stated: str = found[0].decode()
    actual = hashlib.sha256(_with_digest(content, UNSEALED)).hexdigest()
    if stated != actual:
        raise ArtifactError(f"{path} was changed after it was published: its hash is {actual[:12]}…, it says {stated[:12]}….")
    return stated


def read_bytes(path: Path) -> bytes:
    """Of a model file. Raises ArtifactError, for one beyond MODEL_BYTES without reading it."""
    try:
        if (size := path.stat().st_size) > MODEL_BYTES:
            raise ArtifactError(f"{path} has {size} bytes; a model has {MODEL_BYTES} at most.")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from error


def check_metadata(content: bytes, path: Path) -> None:
    """Raises ArtifactError where a file says more of itself than METADATA_BYTES, before anything makes copies of that."""
    at = size = 0
    try:
        while at < len(content):
            number, _, start, at = field(content, at, len(content))
            size += (at - start) * (number == _METADATA)
    except (Malformed, IndexError) as error:
        raise ArtifactError(f"{path} is no ONNX file: {error}.") from error
    if size > METADATA_BYTES:
        raise ArtifactError(f"{path} has {size} bytes of metadata; a model has {METADATA_BYTES} at most.")


def parse_manifest(text: str, path: Path) -> Manifest:
    """Raises ArtifactError that names the field when the manifest is not valid."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ArtifactError(f"{path}: manifest field {where}: {first['msg']} (got {first.get('input')!r:.100}).") from error


def find_artifacts(path: Path) -> list[Path]:
    """The model files that `path` names: a file, a folder searched flat, SHIPPED, or several of these with commas between.

    Raises ArtifactError where there is none.
    """
    if "," in str(path) and not path.exists():
        return [file for part in str(path).split(",") for file in find_artifacts(Path(part.strip()))]
    if str(path) == SHIPPED and not path.exists():
        path = SHIPPED_MODELS
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.onnx")) if path.is_dir() else []
    if not found:
        raise ArtifactError(f"No model at {path}: give an .onnx file or a folder that holds some (`python -m training fit` makes one).")
    return found


def compiled(pattern: str) -> Any:
    """An expression of RE2's. Raises ValueError, a sentence."""
    try:
        return re2.compile(pattern, _QUIET)
    except re2.error as error:
        said = error.args[0] if error.args else ""
        why = said.decode(errors="replace") if isinstance(said, bytes) else said
        raise ValueError(f"{pattern[:64]!r} is no expression of RE2: {why}") from error


def _with_digest(content: bytes, digest: str) -> bytes:
    return _SEAL.sub(lambda match: match.group(0)[:-64] + digest.encode(), content)
