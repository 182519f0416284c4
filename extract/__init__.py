"""Videos -> windows of pixels -> frozen backbone -> rows for a writer. Knows nothing of training.

config.py      what an extraction is told      sources*.py  paths -> clips, also in archives
sampling.py    clip times -> windows           decoders.py  a clip's frames, in order and right
child.py       runs decoders in a process      pool.py      keeps those processes alive and honest
pixels.py      crop, resize, flip              backbone.py  the frozen DINOv3
calibration.py the scales of int8              shard_writer.py  features -> shards
run.py         all of it, resumable            ledger.py    which shards are done, and whose
"""
