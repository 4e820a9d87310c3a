"""The command line. Exit 0: good; 1: it could not start; 2: bad configuration or arguments."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from proxy import __version__, is_compiled, logs
from proxy.config import ConfigError, Loaded, load
from proxy.config_reference import reference_markdown, schema
from proxy.processes.loops import run_loop
from proxy.processes.signals import end_quietly_until_ready
from proxy.settings import LogLevel, Logs, Settings

logger = logging.getLogger("payload_logger")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options)
    except ConfigError as error:
        for problem in error.problems:
            print(f"payload-logger: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `payload-logger schema | head`
        sys.stderr.close()
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="payload-logger",
        description="Stands in front of a model server and records its traffic as Azure ML data-collector events.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the proxy", description="Runs the proxy until it is told to stop.")
    _add_settings(run)
    run.set_defaults(command=_run)

    check = commands.add_parser(
        "check",
        help="check a configuration",
        description="Checks a configuration and says what it means; changes nothing (but see --connect).",
    )
    _add_settings(check)
    check.add_argument(
        "--connect",
        action="store_true",
        help="also try the model server, the folders and the destination (writes and removes a probe)",
    )
    check.set_defaults(command=_check)

    sdk = commands.add_parser(
        "sdk-env",
        help="print the environment that the azureml-ai-monitoring SDK needs",
        description="Prints NAME=value lines for the environment of a scoring script that uses azureml-ai-monitoring.",
    )
    _add_settings(sdk)
    sdk.set_defaults(command=_sdk_env)

    reference = commands.add_parser("schema", help="print the JSON Schema of the configuration")
    reference.add_argument("--markdown", action="store_true", help="print the reference in Markdown instead")
    reference.set_defaults(command=_schema)

    _add_selftest(commands)

    demo = commands.add_parser(
        "demo",
        help="see it work: a dummy model, the proxy before it, three requests",
        description="Starts a dummy model and the proxy before it, sends three requests and shows what was recorded.",
    )
    demo.add_argument("--once", action="store_true", help="exit after showing what was recorded")
    demo.add_argument("--listen", metavar="HOST:PORT", help="where the proxy listens (default: 127.0.0.1:8080)")
    demo.add_argument(
        "--storage",
        default="demo-data",
        metavar="PATH_OR_URL",
        help="where the dataset goes (default: ./%(default)s)",
    )
    demo.set_defaults(command=_demo)
    return parser


def _add_selftest(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "selftest",
        help="compare a model server's answers with and without the proxy",
        description="Sends the same requests to a model server directly and through a proxy that it starts itself, and says "
        "what differs, the latency added, and what has to be known of the server.",
        epilog="Nothing is sent but the request that is named here, in ways that mean the same: about 50 times, and 2.2 times "
        "--count to measure. The number is said at the beginning and at the end. Without --body it is GET, with HEAD and "
        "OPTIONS beside it. Exit 0: nothing differs but what docs/transparency.md "
        "lists; 1: something does, or the server can't be reached; 2: bad arguments.",
    )
    _add_source(parser)
    parser.add_argument("--path", default="/", metavar="PATH", help="path and query (default: %(default)s)")
    parser.add_argument("--body", type=Path, metavar="FILE", help="send what is in FILE, by default with POST")
    parser.add_argument("--content-type", metavar="TYPE", help="of --body (default: application/json)")
    parser.add_argument("--method", metavar="METHOD", help="another method than GET, or POST with --body")
    parser.add_argument("--header", action="append", default=[], metavar="'NAME: VALUE'", help="can be repeated")
    parser.add_argument(
        "--count", type=int, metavar="N", help="timed requests each way (default: 200 of GET, 50 of others; 0: none)"
    )
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="for an answer (default: 60)")
    parser.add_argument("--quick", action="store_true", help="do not wait to see when the server ends idle connections")
    parser.set_defaults(command=_selftest, listen=None, storage=None)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--listen", metavar="HOST:PORT", help="where clients connect (default: 0.0.0.0:8080)")
    parser.add_argument("--storage", metavar="PATH_OR_URL", help="where the dataset goes")


def _add_source(parser: argparse.ArgumentParser) -> None:
    file = parser.add_mutually_exclusive_group()
    file.add_argument("-c", "--config", type=Path, metavar="FILE", help="configuration (YAML)")
    file.add_argument("--deployment", type=Path, metavar="FILE", help="an Azure ML online deployment YAML, as it is")
    parser.add_argument("--upstream", metavar="URL", help="the model server: http://HOST:PORT, https://… or unix:/PATH")


def _load(options: argparse.Namespace) -> Loaded:
    flags = {"proxy.upstream": options.upstream, "proxy.listen": options.listen, "storage.url": options.storage}
    return load(
        config=options.config,
        deployment=options.deployment,
        overrides={key: value for key, value in flags.items() if value is not None},
        environ=os.environ,
    )


def _run(options: argparse.Namespace) -> int:
    from proxy.processes.serve import serve

    end_quietly_until_ready()
    loaded = _load(options)
    logs.configure(loaded.settings.logs)
    for warning in loaded.warnings:
        logger.warning("%s", warning)
    return run_loop(serve(loaded.settings, partial(_load, options)))


def _version() -> str:
    kind = "compiled" if is_compiled() else "pure Python"
    return f"payload-logger {__version__} ({kind}, Python {platform.python_version()})"


def _check(options: argparse.Namespace) -> int:
    from proxy.places import places, spool_path
    from proxy.spool.layout import FOLDERS

    loaded = _load(options)
    settings = loaded.settings
    for warning in loaded.warnings:
        print(f"warning: {warning}")
    found = places(settings)
    rows = [("listen", settings.proxy.listen), ("upstream", settings.proxy.upstream)]
    for name, place in found.items():
        root = place.root_url if place.remote else place.root
        rows.append((name, f"{root}/{FOLDERS[settings.data_collector.rolling_rate]}/*.jsonl"))
    if settings.sdk_endpoint is not None:
        rows.append(("frames", f"{settings.sdk_endpoint.listen} (custom logging)"))
    if settings.admin is not None:
        rows.append(("admin", settings.admin.listen))
    rows.append(("spool" if any(place.remote for place in found.values()) else "locks", str(spool_path(settings))))
    width = max(10, *(len(name) for name, _ in rows))
    for name, words in rows:
        print(f"{name:<{width}} {words}")
    print("The configuration is valid.")
    return run_loop(_connect(settings)) if options.connect else 0


def _sdk_env(options: argparse.Namespace) -> int:
    from proxy.custom_logging.sdk import environment

    settings = _load(options).settings
    if settings.sdk_endpoint is None:
        raise ConfigError(
            [
                "data_collector.collections: none is enabled but request and response; add 'model_inputs: {enabled: true}'"
            ]
        )
    try:
        variables = environment(settings, settings.sdk_endpoint)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    for name, value in variables.items():
        print(f"{name}={value}")
    return 0


async def _connect(settings: Settings) -> int:
    from proxy.connect import findings

    good = True
    async for finding in findings(settings):
        print(finding, flush=True)
        good &= finding.good is not False
    print("All of it works." if good else "Not all of it works.")
    return 0 if good else 1


def _schema(options: argparse.Namespace) -> int:
    if options.markdown:
        print(reference_markdown(), end="")
    else:
        print(json.dumps(schema(), indent=2))
    return 0


def _selftest(options: argparse.Namespace) -> int:
    from proxy.selftest.plan import plan
    from proxy.selftest.run import selftest

    try:
        body = None if options.body is None else options.body.read_bytes()
    except OSError as error:
        raise ConfigError([f"--body: {options.body} cannot be read: {error.strerror}"]) from None
    wanted = plan(
        path=options.path,
        method=options.method,
        headers=options.header,
        body=body,
        content_type=options.content_type,
        count=options.count,
        timeout_seconds=options.timeout,
        quick=options.quick,
    )
    settings = _load(options).settings
    logs.configure(Logs(level=LogLevel.ERROR))
    print(_version())
    return run_loop(selftest(settings, wanted, partial(print, flush=True)))


def _demo(options: argparse.Namespace) -> int:
    from proxy.demo import demo

    return run_loop(demo(listen=options.listen, storage=options.storage, once=options.once))
