"""The models of one profile and the path through them; blocking, for one thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from cloud_server.backends import Backend, Question, backends
from cloud_server.vision.clip import ClipTower, Sight, VisionNeeds
from cloud_server.vision.neck import TransformNeck
from shared.bitstream import Bitstream
from shared.codecs.codec import Codec
from shared.conversation import Answer, Box, Conversation, Timings
from shared.errors import BadInput, ComneckError, UnknownName, WeightsUnavailable
from shared.images import Photo, Placement, Preparation
from shared.profiles import Dtype, Profile, get_profile
from shared.weights.digest import load_tensors
from shared.weights.store import digest_of, ensure

log = logging.getLogger(__name__)


class SightCache:
    """What CLIP has seen of the photos that were asked about last, by their bitstreams.

    Args:
        photos: that are kept; a photo takes 0.8 MB for each block that a backend reads, with ViT-B/16 at 256 pixels.
    """

    def __init__(self, photos: int = 0) -> None:
        self._photos = photos
        self._sights: dict[bytes, Sight] = {}

    def get(self, bitstream: bytes) -> Sight | None:
        return self._sights.get(bitstream)

    def put(self, bitstream: bytes, sight: Sight) -> None:
        """Makes it the last one; the first one may have to go."""
        self._sights.pop(bitstream, None)
        self._sights[bitstream] = sight
        while len(self._sights) > self._photos:
            del self._sights[next(iter(self._sights))]


@dataclass(frozen=True, eq=False)
class Entrance:
    """The way of a quality's bitstreams into CLIP; qualities of the same weights share one.

    Attributes:
        neck_digest: SHA-256 in hex of the neck's artefact.
    """

    codec: Codec
    neck: TransformNeck
    neck_digest: str


@dataclass(frozen=True)
class Pipeline:
    """Codecs, necks, CLIP and backends of one profile, on one device. The codecs stay on the CPU.

    Attributes:
        entrances: by quality, ascending; at least one.
        seen: what CLIP has seen of the last photos.
    """

    profile: Profile
    entrances: dict[int, Entrance]
    tower: ClipTower
    backends: dict[str, Backend]
    device: torch.device
    seen: SightCache = field(default_factory=SightCache)

    @classmethod
    def load(
        cls, name: str, device: str = "auto", threads: int = 0, cache_photos: int = 0, dtype: Dtype = "auto"
    ) -> Pipeline:
        """Loads every model of profile ``name``, fetching what is missing.

        Qualities whose weights cannot be had are left out; the log says which and why.

        Args:
            device: ``cpu``, ``cuda``, or ``auto``: the GPU where there is one.
            threads: for the CPU; 0: all of its cores.
            dtype: that language models compute in, where it is not as the profile says.
            cache_photos: of so many photos it is kept what CLIP has seen of them.

        Raises:
            WeightsUnavailable: a model could not be had; of codecs and necks, those of all qualities.
        """
        profile = get_profile(name)
        if threads:
            torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        place = torch.device(device)
        specs = [spec if dtype == "auto" else replace(spec, dtype=dtype) for spec in profile.backends]
        return cls(
            profile=profile,
            entrances=load_entrances(profile, place),
            tower=ClipTower.load(profile.clip, ensure(profile.clip.weights)).to(place),
            backends={spec.name: backends.get(spec.name).load(spec, profile, place) for spec in specs},
            device=place,
            seen=SightCache(cache_photos),
        )

    def codec(self, quality: int) -> Codec:
        """The codec of a quality that is served."""
        return self.entrances[quality].codec

    def backend(self, name: str) -> Backend:
        """The backend of that name; of the empty name, the default."""
        return self.backends[name] if name else next(iter(self.backends.values()))

    def digests(self, backend: Backend, qualities: Iterable[int] | None = None) -> dict[str, str]:
        """SHA-256 of every model that takes part in an answer, by role; of several in one role, a space between them.

        Args:
            qualities: of the photos that it is about; all that are served where left out.
        """
        taken = [self.entrances[quality] for quality in (self.entrances if qualities is None else qualities)]
        roles = {"clip": digest_of(self.profile.clip.weights), **backend.digests}
        if taken:
            roles["codec"] = " ".join(dict.fromkeys(entrance.codec.digest for entrance in taken))
            roles["neck"] = " ".join(dict.fromkeys(entrance.neck_digest for entrance in taken))
        return roles

    @torch.inference_mode()
    def enter(self, bitstreams: Sequence[Bitstream]) -> Tensor:
        """Bitstreams of one size -> the tokens that enter CLIP's third block, (B, 1 + patches, D)."""
        groups: dict[Entrance, list[int]] = {}
        for place, bitstream in enumerate(bitstreams):
            groups.setdefault(self.entrances[bitstream.quality], []).append(place)
        tokens: list[Tensor] = []
        for entrance, places in groups.items():
            latents = entrance.codec.decode_all([bitstreams[place] for place in places])
            tokens.append(entrance.neck(torch.cat([one.y_hat for one in latents]).to(self.device)))
        order = torch.tensor([place for places in groups.values() for place in places], device=self.device)
        return torch.cat(tokens)[order.argsort()]

    def sights(self, bitstreams: Sequence[Bitstream]) -> list[Sight]:
        """What is seen of each photo so far: all that earlier questions made of it, or what its neck gives."""
        found = [self.seen.get(bytes(bitstream)) for bitstream in bitstreams]
        if missing := [place for place, sight in enumerate(found) if sight is None]:
            for place, tokens in zip(missing, self.enter([bitstreams[place] for place in missing]), strict=True):
                found[place] = {self.tower.spec.entry_block - 1: tokens}
        sights = [sight for sight in found if sight is not None]
        for bitstream, sight in zip(bitstreams, sights, strict=True):
            self.seen.put(bytes(bitstream), sight)
        return sights

    @torch.inference_mode()
    def look(self, sights: Sequence[Sight], needs: VisionNeeds) -> list[Tensor]:
        """What a backend reads of each photo, (1 + patches, D or projection). No block of CLIP runs twice."""
        self.tower.see(sights, needs.last_block, [backend.needs.last_block for backend in self.backends.values()])
        return [self.tower.read(sight, needs) for sight in sights]

    @torch.inference_mode()
    def look_at_pixels(self, photos: Sequence[Photo], needs: VisionNeeds) -> list[Tensor]:
        """Prepared photos through the whole of CLIP: the upper bound that the neck is measured against."""
        pixels = torch.stack([torch.from_numpy(photo.pixels.copy()).permute(2, 0, 1) for photo in photos])
        return self.look([{-1: tokens} for tokens in self.tower.embed(pixels.to(self.device).float() / 255)], needs)

    def answer(self, conversation: Conversation, queue_ms: float = 0.0) -> Iterator[str | Answer]:
        """Pieces of text, then the answer."""
        backend = self.backend(conversation.backend)
        started = time.perf_counter()
        sights = self.sights(conversation.images)
        entered = time.perf_counter()
        photos = iter(self.look(sights, backend.needs))
        looked = time.perf_counter()
        question = Question(
            parts=tuple(part if isinstance(part, str) else next(photos) for part in conversation.parts),
            task=conversation.task or backend.tasks[0],
            choices=conversation.choices,
        )
        text, count, finish = "", 0, None
        for piece in backend.write([question], conversation.generation):
            count += 1
            text += piece.texts[0]
            (finish,) = piece.finished
            if piece.texts[0]:
                yield piece.texts[0]
        found = backend.find(text, question)
        written = time.perf_counter()
        name = conversation.backend or self.profile.backends[0].name
        yield Answer(
            text=text,
            finish=finish or "length",
            tokens=count,
            backend=name,
            profile=self.profile.name,
            timings=Timings(
                queue=queue_ms,
                decode=1000 * (entered - started),
                vision=1000 * (looked - entered),
                generation=1000 * (written - looked),
            ),
            digests=self.digests(backend, [bitstream.quality for bitstream in conversation.images]),
            task=question.task,
            choice=found.choice,
            box=found.box
            and in_photo(found.box, conversation.images[0].original_size, self.profile.preparation_for(name)),
        )


def in_photo(box: tuple[float, float, float, float], size: tuple[int, int], preparation: Preparation) -> Box:
    """A box in fractions of the prepared picture -> in pixels of a photo of ``size`` (width, height)."""
    placement = Placement.of(size, preparation)
    corners = [placement.to_photo(x * preparation.width, y * preparation.height) for x, y in (box[:2], box[2:])]
    (left, right), (top, bottom) = (
        sorted(min(max(0.0, value), float(limit)) for value in values)
        for values, limit in zip(zip(*corners, strict=True), size, strict=True)
    )
    return Box(left, top, right, bottom)


def load_entrances(profile: Profile, device: torch.device) -> dict[int, Entrance]:
    """Codec and neck of every quality whose weights are here or to be had; none are loaded twice.

    Raises:
        WeightsUnavailable: there is no such quality.
    """
    clip = profile.clip

    @cache
    def codec(name: str) -> Codec:
        return Codec.load(ensure(name))

    @cache
    def neck(name: str, channels: int) -> TransformNeck:
        made = TransformNeck(channels, clip.grid, clip.width, clip.heads)
        made.load_state_dict({key: value.float() for key, value in load_tensors(ensure(name)).items()})
        return made.eval().requires_grad_(False).to(device)

    @cache
    def entrance(codec_name: str, neck_name: str) -> Entrance | ComneckError:
        try:
            for name in (codec_name, neck_name):
                ensure(name)  # both, before either is loaded
            own = codec(codec_name)
            return Entrance(own, neck(neck_name, own.M), digest_of(neck_name))
        except (UnknownName, WeightsUnavailable) as problem:
            return problem

    found: dict[int, Entrance] = {}
    missing: dict[int, ComneckError] = {}
    for quality in profile.codec.qualities:
        weights = profile.codec_weights(quality)
        result = entrance(weights, profile.neck_weights(quality))
        if not isinstance(result, Entrance):
            missing[quality] = result
        elif quality not in result.codec.qualities:
            known = ", ".join(map(str, result.codec.qualities))
            missing[quality] = BadInput(f"{weights} has no quality {quality}; it has {known}")
        else:
            found[quality] = result
    if not found:
        raise WeightsUnavailable(
            f"no quality of profile {profile.name!r} can be decoded here: {missing[profile.quality]}"
        )
    for quality, problem in missing.items():
        log.warning("quality %d of profile %s is left out: %s", quality, profile.name, problem)
    return found
