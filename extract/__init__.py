"""Videos -> windows of pixels -> frozen backbone -> rows for a writer. Knows nothing of training.

config.py      what an extraction is told      sources*.py  paths -> clips, also in archives
sampling.py    clip times -> windows           decoders.py  a clip's frames, in order and right
child.py       runs decoders in a process      pool.py      keeps those processes alive and honest
pixels.py      crop, resize, flip              backbone.py  the frozen DINOv3
quantise.py    float16, bfloat16, int8         calibration.py  the scales of int8
writer.py      features -> shards              run.py       all of it, resumable
leases.py      who works on which shard       work.py      the next shard that is free
making.py      shard after shard              common.py    what one process at a time may do
"""
