"""`orion-oie hardware`: what this machine offers, and which models suit it.

Parses, calls the library, prints.
"""

import click

from orion_oie.backends.llama.host.devices import probe_devices
from orion_oie.cli.compatibility import compatibility, report_lines
from orion_oie.cli.console import print_json, print_row, printable
from orion_oie.cli.places import Places, pass_places, registry_place
from orion_oie.hardware.machine import detect, find_gpus


@click.command()
@click.option("--json", "is_json", is_flag=True, help="print it as JSON, for programs")
@registry_place
@pass_places
@click.pass_context
def hardware(context: click.Context, places: Places, is_json: bool) -> None:
    """Describe this machine, and say which models suit it.

    Says what llama.cpp can use of it, and what to do where that is less than it has. Has
    status 1 when llama.cpp does not work here.
    """
    recommendations = places.registry().data.recommendations
    llama = probe_devices()
    report = compatibility(detect(llama.devices), llama, find_gpus(), recommendations)
    if is_json:
        print_json(report.model_dump(mode="json"))
    else:
        for line in report_lines(report):
            if line[2:3].isdigit():
                click.echo(printable(line))  # advice: with commands to be copied
            else:
                print_row(line)
    context.exit(0 if llama.is_working else 1)
