"""Bitstreams in files: reading one, finding the codec on this machine that decodes it, bringing back its picture."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from PIL import Image

from shared.bitstream import SUFFIX, Bitstream
from shared.errors import BadBitstream, BadInput, ComneckError, ProfileMismatch
from shared.files import read_file
from shared.images import Photo
from shared.profiles import Profile, get_profile, profile_names

if TYPE_CHECKING:
    from shared.codecs.artefact import Artefact
    from shared.codecs.codec import Codec

MAX_FILE_BYTES = 2**20  # a photo of MAX_PIXELS at the best quality takes less


@dataclass(frozen=True)
class Found:
    """A codec on this machine.

    Attributes:
        profile: name of one that has it.
    """

    profile: str
    codec: Codec


def is_stored(source: object) -> TypeGuard[str | Path]:
    """Whether ``source`` is the path of a bitstream, by its suffix."""
    return isinstance(source, str | Path) and Path(source).suffix.lower() == SUFFIX


def read_bitstream(path: str | Path) -> Bitstream:
    """Reads a stored bitstream. What is inside its payload is checked when it is decoded.

    Raises:
        BadInput: no such file, a folder, or one that cannot be read.
        TooLarge: over MAX_FILE_BYTES.
        BadBitstream: no bitstream of ours, or an empty file.
    """
    data = read_file(Path(path), MAX_FILE_BYTES, f"one {SUFFIX} file", "no bitstream is that large")
    if not data:
        raise BadBitstream(f"{path} is empty: 0 bytes")
    try:
        return Bitstream.parse(data)
    except BadBitstream as problem:
        raise BadBitstream(f"{path}: {problem}") from problem


def find_codec(bitstream: Bitstream, profile: str | None = None) -> Found:
    """The codec that a bitstream names, among what the profiles have at its quality.

    Args:
        profile: only this one's, which is fetched if need be; otherwise whatever profile's is on this machine.

    Raises:
        ProfileMismatch: there is none; the message says which codecs there are.
        UnknownName, WeightsUnavailable: the profile, or its codec.
    """
    from shared.codecs.artefact import read_artefact
    from shared.codecs.codec import Codec

    artefacts: dict[Path, Artefact] = {}  # profiles may share one
    reasons = []
    for name in [profile] if profile else profile_names():
        try:
            known = get_profile(name)
            if path := _codec_path(known, bitstream.quality, fetch=profile is not None):
                artefact = artefacts[path] = artefacts.get(path) or read_artefact(path)
                if bytes.fromhex(artefact.digest[:8]) == bitstream.codec_digest:
                    return Found(name, Codec(artefact))
                reasons.append(f"that of profile {name!r} is {artefact.digest[:8]}")
        except ComneckError as problem:
            if profile:
                raise
            reasons.append(f"profile {name!r}: {problem}")  # another profile's trouble is not this bitstream's
    raise ProfileMismatch(
        f"the bitstream is of quality {bitstream.quality} by codec {bitstream.codec_digest.hex()}, which is not on "
        f"this machine: {'; '.join(reasons) or 'no profile has a codec of that quality here'}"
    )


def reconstruct(bitstream: Bitstream, profile: str | None = None) -> Photo:
    """What the codec's g_s makes of a bitstream, for human eyes.

    Raises:
        BadInput: its codec was trained for machines only.
        ComneckError: as ``find_codec`` and ``Codec.decode``.
    """
    if bitstream.scenario == "d3":
        raise BadInput("the bitstream is of scenario d3: its codec was trained for machines only, there is no picture")
    codec = find_codec(bitstream, profile).codec
    return codec.reconstruct(codec.decode(bitstream))


def picture_format(path: Path) -> str:
    """Pillow's name of the format that a file's suffix stands for. Raises BadInput where it writes none such."""
    name = Image.registered_extensions().get(path.suffix.lower(), "")
    if name not in Image.SAVE:
        raise BadInput(f"{path} ends in no picture format that can be written: name it .png, .jpg, .webp, ...")
    return name


def picture_bytes(photo: Photo, name: str) -> bytes:
    """A picture file's bytes in the format of that name. Raises BadInput where it cannot hold the picture."""
    file = io.BytesIO()
    try:
        Image.fromarray(photo.pixels).save(file, name, quality=95)  # where a format has one: not coarse a second time
    except (OSError, ValueError) as problem:
        raise BadInput(f"the picture cannot be written as {name}: {problem}; name it .png") from problem
    return file.getvalue()


def _codec_path(profile: Profile, quality: int, fetch: bool) -> Path | None:
    """Where the codec's artefact lies; None if it is not there and is not to be fetched."""
    from shared.weights.store import Store

    if fetch:
        return Store().ensure(profile.codec_weights(quality))
    if quality not in profile.codec.qualities:
        return None
    return Store().status(profile.codec_weights(quality)).path
