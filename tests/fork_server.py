"""Run as a program by the fixture `run_program`: runs other programs, each in a fork of itself.

Importing torch takes seconds, and is done once here instead of once for each of them. A line of
standard input is a program: JSON [path, file for its output, file for its errors, arguments...].
Its answer is its exit status, negative for a signal.
"""

import json
import os
import runpy
import signal
import sys

import transformers

import deltatok.extract.run
import deltatok.train.tokenizer  # noqa: F401

_ = transformers.AutoModel, transformers.DINOv3ViTModel  # imported when they are named

LIMIT_S = 300

for line in sys.stdin:
    program, output, errors, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, path in ((1, output), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
