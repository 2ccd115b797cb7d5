"""The models of one profile and the path through them; blocking, for one thread."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cloud_server.backends import Backend, backends
from cloud_server.vision.clip import ClipTower, VisionFeatures, VisionNeeds
from cloud_server.vision.neck import TransformNeck
from shared.bitstream import Bitstream
from shared.codecs.codec import Codec
from shared.conversation import Answer, Conversation, Timings
from shared.images import Photo
from shared.profiles import Profile, get_profile
from shared.weights.digest import load_tensors
from shared.weights.store import digest_of, ensure


@dataclass(frozen=True)
class Pipeline:
    """Codec, neck, CLIP and backends of one profile, on one device. The codec's entropy path stays on the CPU."""

    profile: Profile
    codec: Codec
    neck: TransformNeck
    tower: ClipTower
    backends: dict[str, Backend]
    device: torch.device

    @classmethod
    def load(cls, name: str, device: str = "auto", threads: int = 0) -> Pipeline:
        """Loads every model of profile ``name``, fetching what is missing.

        Args:
            device: ``cpu``, ``cuda``, or ``auto``: the GPU where there is one.
            threads: for the CPU; 0: all of its cores.
        """
        profile = get_profile(name)
        if threads:
            torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        place = torch.device(device)
        codec = Codec.load(ensure(profile.codec.weights))
        clip = profile.clip
        neck = TransformNeck(codec.transforms.config.M, clip.grid, clip.width, clip.heads)
        neck.load_state_dict({key: value.float() for key, value in load_tensors(ensure(profile.neck)).items()})
        return cls(
            profile=profile,
            codec=codec,
            neck=neck.eval().requires_grad_(False).to(place),
            tower=ClipTower.load(clip, ensure(clip.weights)).to(place),
            backends={spec.name: backends.get(spec.name).load(spec, profile, place) for spec in profile.backends},
            device=place,
        )

    def backend(self, name: str) -> Backend:
        """The backend of that name; of the empty name, the default."""
        return self.backends[name] if name else next(iter(self.backends.values()))

    def digests(self, backend: Backend) -> dict[str, str]:
        """SHA-256 of every model that takes part in an answer, by role."""
        own = {
            "codec": self.codec.digest,
            "neck": digest_of(self.profile.neck),
            "clip": digest_of(self.profile.clip.weights),
        }
        return own | backend.digests

    @torch.inference_mode()
    def enter(self, bitstreams: Sequence[Bitstream]) -> Tensor:
        """Bitstreams -> the tokens that enter CLIP's third block, (B, 1 + patches, D)."""
        y_hat = torch.cat([self.codec.decode(bitstream).y_hat for bitstream in bitstreams])
        return self.neck(y_hat.to(self.device))

    @torch.inference_mode()
    def look(self, tokens: Tensor, needs: VisionNeeds) -> VisionFeatures:
        """Tokens of the neck -> what a backend reads."""
        return self.tower.features(tokens, needs)

    @torch.inference_mode()
    def look_at_pixels(self, photos: Sequence[Photo], needs: VisionNeeds) -> VisionFeatures:
        """Prepared photos through the whole of CLIP: the upper bound that the neck is measured against."""
        pixels = torch.stack([torch.from_numpy(photo.pixels.copy()).permute(2, 0, 1) for photo in photos])
        return self.tower.features(self.tower.embed(pixels.to(self.device).float() / 255), needs, first=0)

    def answer(self, conversation: Conversation, queue_ms: float = 0.0) -> Iterator[str | Answer]:
        """Pieces of text, then the answer."""
        backend = self.backend(conversation.backend)
        started = time.perf_counter()
        features = None
        entered = looked = started
        if conversation.images:
            tokens = self.enter(conversation.images)
            entered = time.perf_counter()
            features = self.look(tokens, backend.needs)
            looked = time.perf_counter()
        text, count, finish = "", 0, None
        for piece in backend.write(features, conversation.prompt, conversation.generation):
            count += 1
            text += piece.texts[0]
            (finish,) = piece.finished
            if piece.texts[0]:
                yield piece.texts[0]
        written = time.perf_counter()
        yield Answer(
            text=text,
            finish=finish or "length",
            tokens=count,
            backend=conversation.backend or self.profile.backends[0].name,
            profile=self.profile.name,
            timings=Timings(
                queue=queue_ms,
                decode=1000 * (entered - started),
                vision=1000 * (looked - entered),
                generation=1000 * (written - looked),
            ),
            digests=self.digests(backend),
        )
