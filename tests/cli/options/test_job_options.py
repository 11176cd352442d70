"""The options of ``extract`` and ``plan`` are the fields of a job."""

from typing import Any

import click
import pytest

from actstore.cli.commands.extract import extract_command
from actstore.cli.commands.plan import plan_command
from actstore.cli.options.job_options import job_fields, job_options
from actstore.extraction.planning.job import Job, parse_job


@pytest.mark.parametrize("command", [extract_command, plan_command])
def test_every_field_is_an_option_that_says_the_same(command: click.Command) -> None:
    options = {option.name: option for option in command.params}
    for name, field in Job.model_fields.items():
        option = options[name]
        assert isinstance(option, click.Option)
        assert option.opts == [f"--{name.replace('_', '-')}"]
        assert option.help is not None
        assert option.help.startswith(str(field.description))


def parsed(*args: str) -> dict[str, Any]:
    """The fields of a job that a command line gives."""

    @click.command()
    @job_options
    def command(job_file: str | None, **options: Any) -> dict[str, Any]:
        del job_file
        return job_fields(options)

    fields: dict[str, Any] = command.main(list(args), standalone_mode=False)
    return fields


def test_options_that_are_not_given_are_left_to_the_job() -> None:
    assert parsed() == {}


@pytest.mark.parametrize("name", Job.model_fields)
def test_each_option_sets_its_field(name: str) -> None:
    required: dict[str, Any] = {
        "model": "m",
        "tokens": "t",
        "hooks": "*.hook_resid_post",
        "context_length": 8,
        "out": "o",
    }
    values: dict[str, Any] = {
        "documents": "line",
        "dtype": "float16",
        "packing": "document",
        "compression": "zstd",
        "context_length": 16,
        "truncate": "left",
    }
    value: Any
    if name == "truncate":
        required["packing"] = "document"
    if name in ("covariance", "append", "strict", "chat", "add_generation_prompt", "token_roles"):
        value, args = True, [f"--{name.replace('_', '-')}"]
    elif name == "chat_template_arguments":
        value, args = {"enable_thinking": False}, ["--chat-template-arguments", '{"enable_thinking": false}']
    else:
        kind = Job.model_json_schema()["properties"][name].get("anyOf", [{}])[0].get("type")
        is_number = kind == "integer" or name == "context_length"
        value = values.get(name, 3 if is_number else "text")
        args = [f"--{name.replace('_', '-')}", str(value)]
    assert parsed(*args) == {name: value}
    assert getattr(parse_job(required | parsed(*args)), name) == value


def test_chats_can_be_ruled_out() -> None:
    assert parsed("--no-chat") == {"chat": False}


def test_hooks_can_be_repeated_and_token_names_are_text() -> None:
    assert parsed("--hooks", "a,b", "--hooks", "c", "--pad-token", "eos") == {
        "hooks": "a,b,c",
        "pad_token": "eos",
    }
    with pytest.raises(click.BadParameter, match="is not one of"):
        parsed("--packing", "none")
