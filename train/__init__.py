"""Everything that has gradients, and patch tokens -> delta tokens. Reads caches, never videos.

config.py, config_selection.py, checks.py    what each command is told, as frozen dataclasses
tokenizer.py       deltatok-train tokenizer    world.py   deltatok-train world
dinoworld.py, config_dinoworld.py    deltatok-train dinoworld, the baseline
head.py            deltatok-train head         tokenize.py   patch cache -> delta cache
loop.py, stage.py  the loop that they all share, and what it asks of each
run_folder.py, checkpoints.py, stop.py    going on after a kill as if there was none
logs.py, trackers.py, flops.py, finite.py, disk.py    what a run tells, and what it stops for
order.py, data.py, labels.py, prefetch.py, memory.py    which samples a step sees; reading them
draws.py           every random number, as a function of what it is for
devices.py, schedule.py, first_weights.py, optim.py    device and ranks, when, from what, how
losses.py, probes.py    the losses, is the tokenizer alive
best_of_many.py, noise.py, selection.py    the best of K candidates; their noise; a stage's use
pretrained.py, official.py    model folders; the released checkpoints
models/            the networks
"""
