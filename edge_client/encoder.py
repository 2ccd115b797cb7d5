"""From a photo to a bitstream, as a profile wants it: what an edge device computes."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from shared.bitstream import Bitstream
from shared.conversation import ServerProfile
from shared.errors import BadInput, ProfileMismatch, TooLarge, UnknownName, WeightsUnavailable
from shared.images import Photo, load_photo, prepare
from shared.profiles import get_profile, profile_names

if TYPE_CHECKING:
    from torch import Tensor

    from shared.codecs.codec import Codec

log = logging.getLogger(__name__)


class Encoder:
    """One profile's preparation and codecs. A codec is loaded when a quality first needs it.

    Args:
        profile: its name.
        server: that the bitstreams are for; only what it decodes is then encoded.

    Raises:
        UnknownName: no such profile.
    """

    def __init__(self, profile: str, server: ServerProfile | None = None) -> None:
        self.profile = get_profile(profile)
        self._server = server
        self._loading = threading.Lock()
        self._codecs: dict[str, Codec] = {}

    @classmethod
    def for_server(cls, server: ServerProfile) -> Encoder:
        """The encoder whose bitstreams that server decodes.

        Raises:
            ProfileMismatch: this side does not know the server's profile.
        """
        if server.profile not in profile_names():
            raise ProfileMismatch(
                f"the server speaks profile {server.profile!r}, this client knows {', '.join(profile_names())}: "
                f"install the server's version of comneck, {server.version}"
            )
        return cls(server.profile, server)

    def codec(self, quality: int) -> Codec:
        """The codec that encodes at a quality.

        Raises:
            BadInput: a quality that the profile has not.
            UnknownName, WeightsUnavailable: the codec is neither here nor to be had.
            ProfileMismatch: the server has another codec for that quality, or none.
        """
        weights, server = self.profile.codec_weights(quality), self._server
        if server and quality not in server.qualities:
            raise ProfileMismatch(f"the server does not decode quality {quality}; it decodes {server.offer}")
        with self._loading:
            if weights not in self._codecs:
                from shared.codecs.codec import Codec
                from shared.weights.store import ensure

                self._codecs[weights] = Codec.load(ensure(weights))
        codec = self._codecs[weights]
        digest = codec.digest_bytes.hex()
        if server and digest != server.qualities[quality]:
            raise ProfileMismatch(
                f"the server's codec of profile {server.profile!r} for quality {quality} is "
                f"{server.qualities[quality]}, this client's is {digest}: install the server's version of comneck, "
                f"{server.version}"
            )
        return codec

    def load(self, quality: int | None = None, max_bytes: int | None = None) -> None:
        """Loads the codec that ``encode`` tries first with these arguments; raises what ``encode`` raises."""
        next(self._tries(quality, max_bytes))

    def prepare(self, source: str | Path | bytes | Photo, backend: str = "") -> Photo:
        """The codec's input, for the backend of that name or the default. Raises what ``load_photo`` raises."""
        if not isinstance(source, Photo):
            source = load_photo(Path(source) if isinstance(source, str) else source)
        return prepare(source, self.profile.preparation_for(backend))

    def encode(
        self,
        source: str | Path | bytes | Photo,
        quality: int | None = None,
        max_bytes: int | None = None,
        backend: str = "",
    ) -> Bitstream:
        """Prepares, then encodes. A photo that is prepared stays as it is.

        Args:
            quality: the rate point; the server's or the profile's own where left out.
            max_bytes: of the whole bitstream: the best quality that fits is taken, up to ``quality`` if that is given.
            backend: that it is for; the default where left out.

        Raises:
            BadInput: a quality that there is not.
            TooLarge: no quality fits; the message names the smallest bitstream that there can be.
            UnknownName, WeightsUnavailable, ProfileMismatch: as ``codec``.
        """
        photo = self.prepare(source, backend)
        latents: dict[Codec, Tensor] = {}
        smallest: Bitstream | None = None
        for tried, codec in self._tries(quality, max_bytes):
            if codec not in latents:
                latents[codec] = codec.analyse(photo)
            bitstream = codec.encode(photo, self.profile.scenario, tried, latents[codec])
            if max_bytes is None or len(bitstream) <= max_bytes:
                return bitstream
            if smallest is None or len(bitstream) < len(smallest):
                smallest = bitstream
        assert smallest is not None
        raise TooLarge(
            f"no quality encodes this photo in {max_bytes:,} bytes: the smallest is quality {smallest.quality} with "
            f"{len(smallest):,} bytes; allow that many"
        )

    def _tries(self, quality: int | None, max_bytes: int | None) -> Iterator[tuple[int, Codec]]:
        """The qualities to encode at until one fits, the best first; at least one."""
        if max_bytes is None:
            default = self._server.quality if self._server else self.profile.quality
            chosen = default if quality is None else quality
            yield chosen, self.codec(chosen)
            return
        known = [one for one in self.profile.codec.qualities if not self._server or one in self._server.qualities]
        allowed = [one for one in reversed(known) if quality is None or one <= quality]
        if not allowed:
            raise BadInput(f"there is no quality up to {quality}; there are {', '.join(map(str, known)) or 'none'}")
        missing: Exception | None = None
        found = False
        for one in allowed:
            try:
                codec = self.codec(one)
            except (UnknownName, WeightsUnavailable) as problem:
                log.info("quality %d is not tried: %s", one, problem)
                missing = missing or problem
            else:
                found = True
                yield one, codec
        if missing and not found:
            raise missing


def jpeg_size(photo: Photo, quality: int = 75) -> int:
    """Bytes of the photo as JPEG, as small as its encoder makes them: the baseline that a bitstream is held against."""
    file = io.BytesIO()
    Image.fromarray(photo.pixels).save(file, "JPEG", quality=quality, optimize=True, progressive=True)
    return file.tell()
