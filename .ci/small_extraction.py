"""Makes a few clips and a random backbone for the check of the installed wheel."""

import sys
from pathlib import Path

from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
from deltatok.pipeline.little_world.files import make_little_world
from deltatok.pipeline.little_world.simulation import LittleWorldConfig

root = Path(sys.argv[1])
make_little_world(
    LittleWorldConfig(
        out=str(root / "all"), num_train_clips=4, num_head_clips=0, num_val_clips=0, frame_size=64
    )
)
(root / "all" / "train").rename(root / "clips")
make_tiny_backbone(
    TinyBackboneConfig(out=str(root / "backbone"), hidden_size=32, num_hidden_layers=1)
)
