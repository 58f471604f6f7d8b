"""`heddle-loadtest baseline`: options to settings, and a server until Ctrl-C."""

from pathlib import Path
from typing import Annotated

import typer

from heddle_loadtest.baseline.settings import BaselineKind, BaselineSettings, Device, Dtype, Quantization
from heddle_loadtest.duration import read_duration_seconds
from heddle_loadtest.errors import LoadTestError, SpecError

_OPTIONS = {  # field of a LoadTestError -> option, where it is not simply --field
    "base": "BASE",
    "baseline": "baseline",
    "max_batch": "--max-batch",
    "max_wait_seconds": "--max-wait",
    "switch_seconds": "--switch-after",
    "num_threads": "--threads",
    "model_name": "--model-name",
}


def baseline(
    kind: Annotated[BaselineKind, typer.Argument(help="How the adapters are served.")],
    base: Annotated[Path, typer.Argument(help="Folder of the base, as transformers saves one.")],
    adapters: Annotated[Path, typer.Option(help="Folder that holds one PEFT folder per adapter, named as it.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for any that is free.")] = 8001,
    max_batch: Annotated[int, typer.Option(help="Requests computed together, at most.")] = 32,
    max_wait: Annotated[str, typer.Option(help="How long a static batch waits for more requests.")] = "20ms",
    switch_after: Annotated[
        str, typer.Option(help="A continuous batch ends for its adapter once a request for another waits this long.")
    ] = "5s",
    device: Annotated[Device, typer.Option(help="auto: an NVIDIA GPU if there is one.")] = Device.AUTO,
    dtype: Annotated[Dtype, typer.Option(help="What the model computes in.")] = Dtype.BFLOAT16,
    quantization: Annotated[Quantization, typer.Option(help="What the base's linears are kept in.")] = Quantization.NF4,
    threads: Annotated[int | None, typer.Option(help="CPU threads; as torch chooses if not given.")] = None,
    model_name: Annotated[str, typer.Option(help="What the base is called.")] = "base",
) -> None:
    """Serve a base and adapters by PEFT or transformers, over the interface that heddle has, to measure against.

    peft-mixed: what waits goes through one `generate`, each row with its adapter. peft-grouped: the same, one adapter
    at a time. transformers-cb-grouped: transformers' continuous batching, one adapter at a time. Ctrl-C stops it.
    """
    try:
        settings = BaselineSettings(
            kind=kind,
            base=base,
            adapters=adapters,
            host=host,
            port=port,
            max_batch=max_batch,
            max_wait_seconds=read_duration_seconds("max_wait_seconds", max_wait),
            switch_seconds=read_duration_seconds("switch_seconds", switch_after),
            device=device,
            dtype=dtype,
            quantization=quantization,
            num_threads=threads,
            model_name=model_name,
        )
        _serve(settings)
    except LoadTestError as error:
        typer.echo(f"error: {error.describe(_OPTIONS.get(error.field, f'--{error.field}'))}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:  # while it was still loading
        raise typer.Exit(130) from None


def _serve(settings: BaselineSettings) -> None:
    try:
        from heddle_loadtest.baseline.server import serve_baseline
    except ModuleNotFoundError as error:
        remedy = "Install what it needs: pip install 'heddle[baselines]'"
        raise SpecError("baseline", settings.kind, f"{error.name} is not installed", remedy) from error
    serve_baseline(settings, typer.echo)
