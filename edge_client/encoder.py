"""From a photo to a bitstream, as a profile wants it: what an edge device computes."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from shared.bitstream import Bitstream
from shared.conversation import ServerProfile
from shared.errors import ProfileMismatch
from shared.images import Photo, load_photo, prepare
from shared.profiles import get_profile, profile_names


class Encoder:
    """One profile's preparation and codec.

    Args:
        profile: its name.

    Raises:
        UnknownName: no such profile.
        WeightsUnavailable: the codec is neither here nor to be had.
    """

    def __init__(self, profile: str) -> None:
        from shared.codecs.codec import Codec
        from shared.weights.store import ensure

        self.profile = get_profile(profile)
        self.codec = Codec.load(ensure(self.profile.codec.weights))

    @classmethod
    def for_server(cls, server: ServerProfile) -> Encoder:
        """The encoder whose bitstreams that server decodes.

        Raises:
            ProfileMismatch: this side does not know the profile, or has other weights for its codec.
        """
        if server.profile not in profile_names():
            raise ProfileMismatch(
                f"the server speaks profile {server.profile!r}, this client knows {', '.join(profile_names())}: "
                f"install the server's version of comneck, {server.version}"
            )
        encoder = cls(server.profile)
        if encoder.codec.digest_bytes.hex() != server.codec_digest:
            raise ProfileMismatch(
                f"the server's codec of profile {server.profile!r} is {server.codec_digest}, this client's is "
                f"{encoder.codec.digest_bytes.hex()}: install the server's version of comneck, {server.version}"
            )
        return encoder

    def prepare(self, source: Path | bytes | Photo) -> Photo:
        """The codec's input. Raises what ``load_photo`` raises."""
        photo = source if isinstance(source, Photo) else load_photo(source)
        return prepare(photo, self.profile.preparation)

    def encode(self, source: Path | bytes | Photo) -> Bitstream:
        """Prepares, then encodes. A photo that is prepared stays as it is."""
        return self.codec.encode(self.prepare(source), self.profile.scenario, self.profile.rate)


def jpeg_size(photo: Photo, quality: int = 75) -> int:
    """Bytes of the photo as JPEG, as small as its encoder makes them: the baseline that a bitstream is held against."""
    file = io.BytesIO()
    Image.fromarray(photo.pixels).save(file, "JPEG", quality=quality, optimize=True, progressive=True)
    return file.tell()
