"""`qwen-vl-lora worker`: a further machine for a run."""

from __future__ import annotations

import os

import click


class _Endpoint(click.ParamType):
    name = "HOST:PORT"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from qwen_vl_lora.parameters import check_endpoint

        try:
            return check_endpoint(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.option("--rendezvous", required=True, type=_Endpoint(), help="The run's launcher.rdzv_endpoint.")
@click.option("--timeout", default=900, show_default=True, type=click.IntRange(min=1), help="Seconds to wait for it.")
@click.pass_context
def worker(context: click.Context, rendezvous: str, timeout: int) -> None:
    """Give this machine's processors to the run that waits at HOST:PORT, until that run ends.

    Call it inside the same project folder as the run, on a filesystem that both see. It reads no
    catalog and saves nothing. Ends with code 1 if the run fails.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # read when torch comes in
    from qwen_vl_lora.ranks.board import Address
    from qwen_vl_lora.ranks.joining import take_part

    if not take_part(Address.parse(rendezvous), timeout):
        context.exit(1)
