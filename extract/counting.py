"""How many windows clips will give, without decoding them whole: what `--plan` looks at many clips
with, where it can time only a few.

Runs as a decoding process of `pool.py`, so that a file that hangs or crashes costs itself alone. A
sound video is counted from its packets' times and its first frame; one whose container is damaged
or gives no window is decoded to its end, because only that tells. What comes back are the windows
of the clip, all of them of one black pixel.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..shards.errors import UnusableClip
from ..shards.records import Quarantined
from .config import ExtractConfig
from .decoding.clip import DecodedFrames, DecoderName, decode_drawn, opened_clip
from .decoding.container import Float64, VideoFile, read_index
from .decoding.pool import DecodedClip, DecodePool, default_num_workers
from .decoding.worker import DecodeRequest, main
from .sampling import SamplingPolicy, WindowDraw, draw_windows
from .sources.clip import Clip

COUNT_COMMAND = (sys.executable, "-P", "-m", "deltatok.extract.counting")


def count_windows(
    config: ExtractConfig, clips: Sequence[Clip], *, within: Callable[[], bool]
) -> tuple[dict[str, int], list[Quarantined]]:
    """Clip -> the windows it will give, 0 for those that would go to quarantine, and why they do.

    Clips in the order given, until `within` says no.
    """
    windows: dict[str, int] = {}
    refused: list[Quarantined] = []
    with DecodePool(
        SamplingPolicy.from_config(config),
        num_workers=config.workers or default_num_workers(),
        timeout_s=config.decode_timeout_s,
        decode_threads=config.decode_threads,
        decoder=config.decoder,
        worker_command=COUNT_COMMAND,
    ) as pool:
        for result in pool.decode(clips):
            if isinstance(result, DecodedClip):
                windows[result.key] = len(result.windows)
            else:
                windows[result.clip] = 0
                refused.append(result)
            if not within():
                break
    return windows, refused


def count_request(request: DecodeRequest, starting: Callable[[DecoderName], None]) -> DecodedFrames:
    """The windows of the clip a request names, one pixel each (child.py's `decode`)."""
    policy, clip = request.policy, request.clip
    assert isinstance(policy, SamplingPolicy)
    drawn: list[WindowDraw] = []

    def draw(times_s: Float64, height: int, width: int) -> list[WindowDraw]:
        drawn[:] = draw_windows(policy, clip.key, times_s, height, width)
        return [replace(drawn[0], frame_index=(0,), timestamps_s=(0.0,))]

    decoder: DecoderName = "pyav"
    starting(decoder)
    if not _drawn_from_packets(clip, draw):
        decoder = decode_drawn(
            clip.path,
            draw=draw,
            source=clip.source,
            size_bytes=clip.size_bytes,
            decoder=request.decoder,
            threads=request.threads,
            starting=starting,
        ).decoder
    pixel = np.zeros((1, 1, 3), np.uint8)
    still = WindowDraw(
        frame_index=(0,) * policy.num_frames,
        timestamps_s=(0.0,) * policy.num_frames,
        crop=(0, 0, 1, 1),
        flipped=False,
    )
    return DecodedFrames(decoder, [still] * len(drawn), {0: pixel})


def _drawn_from_packets(clip: Clip, draw: Callable[[Float64, int, int], list[WindowDraw]]) -> bool:
    """Calls `draw` if the clip is a video that can be counted so."""
    with opened_clip(clip.path, clip.source, size_bytes=clip.size_bytes) as opened:
        if not isinstance(opened, VideoFile):
            return False
        index = read_index(opened)
        if not index.regular:
            return False
        try:
            draw(index.times_s, *index.first_frame.shape[:2])
        except UnusableClip:
            return False
        return True


if __name__ == "__main__":
    main(sys.argv[1:], decode=count_request)
