"""Nothing in a golden folder goes unchecked."""

import json


def test_there_is_golden_data(golden):
    assert golden, "pass --golden DIR, or keep tests/golden"


def test_every_case_is_of_a_kind_that_is_tested(golden, tested_kinds):
    for folder in golden:
        for file in folder.glob("*/config.json"):
            if file.parent.name != "backbone":
                assert json.loads(file.read_text())["kind"] in tested_kinds, file


def test_every_function_file_is_tested(golden, tested_files):
    for folder in golden:
        for case in folder.iterdir():
            is_case = case.is_dir() and not case.name.startswith("format-")  # golden caches
            if is_case and not (case / "config.json").exists():
                found = {file.name for file in case.glob("*.json")}
                assert found <= tested_files.get(case.name, set()), case
