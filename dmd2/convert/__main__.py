"""``dmd2 convert``."""

from pathlib import Path
from typing import Annotated

import typer

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import read_json, sha256


def main(
    source: Annotated[
        Path, typer.Argument(help=".pkl of NVlabs, .bin, .pt or .safetensors; with --to-edm a diffusers folder")
    ],
    folder: Annotated[Path | None, typer.Argument(help="diffusers folder to write")] = None,
    to_edm_file: Annotated[
        Path | None, typer.Option("--to-edm", help="safetensors file to write (an augmentation layer is gone)")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="diffusers folder of the teacher's UNet, for students of Stable Diffusion")
    ] = None,
) -> None:
    """Convert a network of NVlabs' EDM, or a released DMD2 student, to a diffusers folder; or such a folder back."""
    from dmd2.convert.unets import CONFIG, WEIGHTS, convert, empty, empty_unet, export_edm

    with readable_errors():
        if (folder is None) == (to_edm_file is None):
            raise UserError("name the folder to write, or with --to-edm the file, and not both")
        if folder is not None:
            network, made = convert(source, folder, base), folder
            weights = made / WEIGHTS
        else:
            assert to_edm_file is not None
            network, weights = source, export_edm(source, to_edm_file)
            made = weights
        config = read_json(network / CONFIG)
        count = sum(p.numel() for p in (empty(config) if base is None else empty_unet(network)).parameters())
        print(f"{made}: {config['_class_name']}, {count:,} parameters, sha256 {sha256(weights)}")


if __name__ == "__main__":
    typer.run(main)
